from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.infra.errors import GateRefused, InputError, IntegrityError
from sluice.infra.settings import Settings
from sluice.pipelines.sites import verify as verify_here
from sluice.provenance.attestation import PublicKey, Signer
from sluice.provenance.canonical import digest_bytes, hex_of
from sluice.provenance.key_changes import revoke, rotate
from sluice.provenance.releases import record_failure, record_rejection
from sluice.registry.model_signature import sign_model, store_signature
from sluice.registry.transfer.archive import Archive, write_archive
from sluice.registry.transfer.export import write_bundle
from sluice.registry.transfer.readme import script
from sluice.registry.transfer.sites import trust_site
from sluice.registry.transfer.verification import Verification, verify_archive, verify_bundle
from tests.registry.transfer.made_site import MadeSite, resigned


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> MadeSite:
    made = MadeSite(tmp_path_factory.mktemp("site"), "north")
    made.promote(made.release(0))
    return made


@pytest.fixture(scope="module")
def bundle(site: MadeSite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "out.tar"
    write_bundle(path, site.publish(site.release(1)), site.store)
    return path


def verify(path: Path, site: MadeSite, now: datetime | None = None) -> Verification:
    return verify_bundle(path, [site.signer.public_key], now=now)


def failure(path: Path, site: MadeSite, now: datetime | None = None) -> str:
    found = verify(path, site, now)
    assert not found.ok
    return next(check.detail for check in found.checks if not check.ok)


def member_at(bundle: Path, position: int) -> str:
    """The name of the member whose header, bytes or padding a position lies in; the archive's own for its end."""
    with tarfile.open(bundle) as tar:
        for member in tar.getmembers():
            if position < member.offset_data + member.size + -member.size % 512:
                return member.name
    return bundle.name


def test_whole_chain_is_proven_with_the_public_key_alone(bundle: Path, site: MadeSite) -> None:
    found = verify(bundle, site)
    assert found.ok, found.checks
    told = {check.name.split(" of ")[0]: check.detail for check in found.checks}
    assert list(told) == ["signature", "age", "bytes", "ledger", "signer", "decision", "model", "history", "companions"]
    assert "approved by ann" in told["decision"]
    assert "from base-model, harvest through the dataset" in told["history"]
    assert "1 traces" in told["history"]


def test_what_users_wrote_stays_at_the_site(bundle: Path) -> None:
    data = bundle.read_bytes()
    assert b"what a user wrote" not in data
    assert b"<h1>Dataset card</h1>" in data


def test_each_member_with_a_flipped_byte_is_named(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    data = bundle.read_bytes()
    positions = [len(data) - 1, len(data) - 9000]
    with tarfile.open(bundle) as tar:
        for member in tar.getmembers():
            # The header's name, size, checksum and unused end; first, middle and last byte; the last byte of padding.
            start, end = member.offset_data, member.offset_data + member.size
            positions += [start - 512, start - 512 + 130, start - 512 + 150, start - 1]
            positions += [start, (start + end) // 2, end - 1, end + -end % 512 - 1]
    damaged = tmp_path / bundle.name
    for position in positions:
        damaged.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        name = member_at(bundle, position)
        assert failure(damaged, site).startswith(name), f"byte {position}: {failure(damaged, site)}"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(bundle: Path, site: MadeSite, tmp_path: Path, where: float, bit: int) -> None:
    data = bytearray(bundle.read_bytes())
    position = int(where * len(data))
    data[position] ^= 1 << bit
    damaged = tmp_path / bundle.name
    damaged.write_bytes(data)
    assert failure(damaged, site).startswith(member_at(bundle, position))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.9, 0.999])
def test_cut_bundle_is_refused(bundle: Path, site: MadeSite, tmp_path: Path, share: float) -> None:
    data = bundle.read_bytes()
    cut = tmp_path / bundle.name
    cut.write_bytes(data[: int(share * len(data))])
    assert any(word in failure(cut, site) for word in ("cut off", "damaged"))


def test_anything_behind_the_end_is_refused(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    longer = tmp_path / bundle.name
    longer.write_bytes(bundle.read_bytes() + b"\0" * 512)
    assert failure(longer, site).startswith("out.tar: its end")


def test_writing_it_again_gives_the_same_bytes(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    archive = Archive(bundle)
    snapshot = verify(bundle, site).require()
    archive.arrange(snapshot)
    write_archive(tmp_path / "again.tar", archive.envelope, snapshot, archive)
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()
    write_archive(tmp_path / "again.tar", archive.envelope, snapshot, archive)
    (tmp_path / "again.tar").write_bytes(b"mine")
    with pytest.raises(IntegrityError, match=r"bundle\.json"):
        write_archive(tmp_path / "again.tar", archive.envelope, snapshot, archive)


def test_interrupted_export_goes_on_with_what_it_wrote(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    archive = Archive(bundle)
    snapshot = verify(bundle, site).require()
    archive.arrange(snapshot)
    data = bundle.read_bytes()
    asked: list[str] = []

    class Counted:
        def stream(self, key: str, start: int = 0) -> object:
            asked.append(key)
            return archive.stream(key, start)

    # Cut in the middle, and one byte of what was written has rotted since.
    half = bytearray(data[: len(data) // 2])
    (tmp_path / ".out.tar.part").write_bytes(half)
    write_archive(tmp_path / "out.tar", archive.envelope, snapshot, Counted())  # type: ignore[arg-type]
    assert (tmp_path / "out.tar").read_bytes() == data
    assert 0 < len(asked) < len(snapshot.files)
    assert [path.name for path in tmp_path.iterdir()] == ["out.tar"]


def test_public_tools_verify_it_without_this_program(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    (tmp_path / "check.py").write_bytes(script())
    assert b"import sluice" not in script()
    assert b"from sluice" not in script()
    command = [sys.executable, "-I", "check.py", str(bundle), str(site.public_key_file), "model"]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("VERIFIED\n")
    assert [path.name for path in sorted((tmp_path / "model").rglob("*.*"))] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    damaged = bytearray(bundle.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.tar").write_bytes(damaged)
    command[3] = "damaged.tar"
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "NOT VERIFIED" in done.stderr


def test_unsigned_and_foreign_software_is_refused(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    stranger = Signer.load_or_create(tmp_path / "stranger.pem")
    found = verify_bundle(bundle, [stranger.public_key])
    assert not found.ok
    assert "none of them trusted" in found.checks[0].detail
    with pytest.raises(InputError, match="no public key"):
        verify_bundle(bundle, [])
    # A whole bundle of somebody else, in the name of this site.
    other = MadeSite(tmp_path / "other", "north")
    write_bundle(tmp_path / "other.tar", other.publish(other.release()), other.store)
    assert "none of them trusted" in failure(tmp_path / "other.tar", site)
    # And one without any signature.
    published = site.publish(site.release(1))
    envelope = json.loads(published.envelope) | {"signatures": []}
    write_archive(
        tmp_path / "unsigned.tar",
        json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode(),
        published.snapshot.model_copy(update={"files": ()}),
        site.store,
    )
    assert "none of them trusted" in failure(tmp_path / "unsigned.tar", site)


def test_expired_bundle_is_refused(bundle: Path, site: MadeSite) -> None:
    later = datetime.now(UTC) + timedelta(days=31)
    assert "expired at" in failure(bundle, site, now=later)


def test_files_of_two_snapshots_do_not_mix(site: MadeSite, tmp_path: Path) -> None:
    first, second = site.publish(site.release(1)), site.publish(site.release(2))
    write_bundle(tmp_path / "first.tar", first, site.store)
    write_bundle(tmp_path / "second.tar", second, site.store)
    one, two = Archive(tmp_path / "first.tar"), Archive(tmp_path / "second.tar")
    one.arrange(first.snapshot)
    two.arrange(second.snapshot)
    # The new list over the old files: where a file of the same name and size exists, the old one's bytes are put.
    paths = first.snapshot.by_path()
    for file in second.snapshot.files:
        known = paths.get(file.path)
        if known and known.digest != file.digest and known.size == file.size:
            offset, size = two._places[file.path]
            with (tmp_path / "second.tar").open("r+b") as stream:
                stream.seek(offset)
                stream.write(b"".join(one.stream(file.path)))
            assert failure(tmp_path / "second.tar", site).startswith(file.path)
            break
    else:
        # None is of the same size: the old archive with the new list.
        data = (tmp_path / "first.tar").read_bytes()
        size = len(one.envelope) + -len(one.envelope) % 512
        new = len(two.envelope) + -len(two.envelope) % 512
        mixed = (tmp_path / "second.tar").read_bytes()[: 512 + new] + data[512 + size :]
        (tmp_path / "mixed.tar").write_bytes(mixed)
        assert not verify(tmp_path / "mixed.tar", site).ok


def test_snapshot_that_claims_another_decision_is_refused(site: MadeSite, tmp_path: Path) -> None:
    published = site.publish(site.release(1))
    entry = published.snapshot.releases[0].model_dump(mode="json")
    for field, word in (
        ("decision", "another decision"),
        ("dataset", "not trained on"),
        ("evidence", "in that report"),
    ):
        lie = resigned(published, site.signer, releases=[entry | {field: entry["release"]}])
        snapshot = published.snapshot
        path = tmp_path / f"{field}.tar"
        write_bundle(path, type(published)(snapshot, lie, published.extras), site.store)
        assert word in failure(path, site) or "no file 'decision.json'" in failure(path, site)


def test_gap_in_the_history_is_refused(site: MadeSite, tmp_path: Path) -> None:
    published = site.publish(site.release(1))
    adapter = published.snapshot.releases[0].release
    place = next(
        file.path
        for file in published.snapshot.files
        if file.path.startswith("steps/")
        and b'"name":"curate"' in site.store.get(file.path)
        and published.snapshot.releases[0].dataset.encode() in site.store.get(file.path)
    )
    files = [file for file in published.snapshot.files if file.path != place]
    lie = resigned(published, site.signer, files=[file.model_dump(mode="json") for file in files])
    snapshot = published.snapshot.model_copy(update={"files": tuple(files)})
    write_bundle(tmp_path / "gap.tar", type(published)(snapshot, lie, published.extras), site.store)
    assert "No statement says where dataset" in failure(tmp_path / "gap.tar", site)
    assert adapter


def test_file_whose_name_is_another_digest_is_refused(site: MadeSite, tmp_path: Path) -> None:
    published = site.publish(site.release(1))
    files = [file.model_dump(mode="json") for file in published.snapshot.files]
    blob = next(file for file in files if file["path"].startswith("blobs/"))
    blob["digest"] = digest_bytes(b"other")
    lie = resigned(published, site.signer, files=files)
    write_archive(tmp_path / "lie.tar", lie, published.snapshot.model_copy(update={"files": ()}), site.store)
    assert "which is not its name" in failure(tmp_path / "lie.tar", site)


def test_only_an_approved_release_leaves(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    waiting = site.release(1, approved=False)
    with pytest.raises(GateRefused, match="no approval"):
        site.publish(waiting)
    rejected = site.release(2)
    record_rejection(site.ledger, adapter=rejected, approver="bob", reason="no")
    with pytest.raises(GateRefused, match="no approval"):
        site.publish(rejected)
    failed = site.release(3)
    record_failure(site.ledger, release=failed, reason="slow", actor="release")
    with pytest.raises(GateRefused, match="slow"):
        site.publish(failed)
    with pytest.raises(InputError, match="is a base-model"):
        site.publish(site.base)
    with pytest.raises(GateRefused, match="no gate decision"):
        site.publish(site.artifacts.put_files({"a": b""}, "adapter").digest)


def test_ledger_that_passes_what_the_gate_refused_is_refused(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    write_bundle(tmp_path / "out.tar", site.publish(site.release(1, verdict="fail")), site.store)
    assert "the gate's decision says 'fail'" in failure(tmp_path / "out.tar", site)


def test_same_content_is_the_same_snapshot_until_half_of_its_time_is_over(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    release = site.release()
    now = datetime.now(UTC)
    first = site.publish(release, now=now)
    assert site.publish(release, now=now + timedelta(days=14)).envelope == first.envelope
    assert site.publish(release, now=now + timedelta(days=16)).snapshot.number == 2
    assert site.publish(release, now=now + timedelta(days=16), valid_days=5).snapshot.number == 3
    assert site.publish(site.release(1)).snapshot.number == 4


def test_companions_travel_when_they_are_there(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    release = site.release()
    signature = _sign(site, release, site.signer)
    published = site.publish(release)
    assert published.snapshot.releases[0].companions == {"signature": signature}
    assert f"signatures/{hex_of(release)}.json" in published.snapshot.by_path()
    write_bundle(tmp_path / "out.tar", published, site.store)
    found = verify(tmp_path / "out.tar", site)
    assert found.ok, found.checks
    assert f"signed by key {site.signer.public_key.short}" in found.checks[-1].detail


def rotated(site: MadeSite, folder: Path) -> tuple[PublicKey, Signer]:
    """The key of before and the signer of now, after a rotation."""
    lost = site.signer.public_key
    rotate(site.ledger, site.signer, folder / "trusted", "bob")
    new = Signer.load_or_create(folder / "keys" / "signing.pem")
    site.reopen(new, (lost,))
    return lost, new


def checked(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (bundle.parent / "check.py").write_bytes(script())
    command = [sys.executable, "-I", "check.py", str(bundle), *arguments]
    return subprocess.run(command, cwd=bundle.parent, env={}, capture_output=True, text=True, timeout=60, check=False)


def test_after_a_rotation_the_bundle_holds_both_keys_and_the_script_takes_them(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    release = site.release()
    lost, new = rotated(site, tmp_path)
    unused = Signer.load_or_create(tmp_path / "unused.pem").public_key
    path = tmp_path / "out.tar"
    write_bundle(path, site.publish(release, keys=(new.public_key, lost, unused)), site.store)
    with tarfile.open(path) as tar:
        keys = {Path(name).stem for name in tar.getnames() if name.startswith("keys/")}
        stream = tar.extractfile("README.md")
        assert stream is not None
        assert f"- `{lost.key_id}`" in stream.read().decode()
    assert keys == {new.public_key.key_id[:16], lost.key_id[:16]}
    (tmp_path / "old.pub").write_text(lost.pem)
    alone = checked(path, "keys/signing.pem.pub")
    assert "NOT VERIFIED" in alone.stderr
    both = checked(path, "keys/signing.pem.pub", "old.pub", "model")
    assert both.returncode == 0, both.stderr
    assert list((tmp_path / "model").iterdir())
    assert verify_bundle(path, [new.public_key, lost]).ok


def test_a_snapshot_by_a_key_that_its_ledger_revokes_is_refused(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    release = site.release()
    Signer.load_or_create(tmp_path / "stolen.pem")
    (tmp_path / "stolen.pem").write_bytes((tmp_path / "keys" / "signing.pem").read_bytes())
    stolen = Signer.load_or_create(tmp_path / "stolen.pem")
    lost, new = rotated(site, tmp_path)
    revoke(site.ledger, site.artifacts, site.steps.records, lost, signer=new, reason="stolen", actor="bob")
    published = site.publish(release)
    lie = resigned(published, stolen)
    path = tmp_path / "lie.tar"
    write_bundle(path, type(published)(published.snapshot, lie, published.extras), site.store)
    found = verify_bundle(path, [new.public_key, lost])
    assert not found.ok
    assert [check.name for check in found.checks if not check.ok] == ["signer"]
    assert "bob revoked at" in found.checks[-1].detail
    (tmp_path / "old.pub").write_text(lost.pem)
    assert "a key that the ledger revokes" in checked(path, "keys/signing.pem.pub", "old.pub").stderr
    write_bundle(tmp_path / "good.tar", published, site.store)
    assert verify_bundle(tmp_path / "good.tar", [new.public_key, lost]).ok


def test_the_newest_signature_travels_as_the_first(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    release = site.release()
    _sign(site, release, Signer.load_or_create(tmp_path / "stranger.pem"))
    newest = _sign(site, release, site.signer)
    published = site.publish(release)
    assert published.snapshot.releases[0].companions == {"signature": newest}
    assert [file.path for file in published.snapshot.files if file.path.startswith("signatures/")] == [
        f"signatures/{hex_of(release)}.json"
    ]
    write_bundle(tmp_path / "out.tar", published, site.store)
    assert verify(tmp_path / "out.tar", site).ok


def test_without_a_key_only_those_of_the_site_that_it_names_count(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    home = Settings(home=tmp_path / "home")
    trust_site(home.home, "south", site.public_key_file)
    found = verify_here(home, bundle, [], now=now)
    assert [(check.name, check.ok) for check in found.checks] == [("signature", False)]
    assert "is from site 'north'" in found.checks[0].detail
    # This site's own bundle, by its own key.
    own = tmp_path / "own"
    (own / "keys").mkdir(parents=True)
    (own / "keys" / "signing.pem.pub").write_text(site.signer.public_key.pem)
    assert verify_here(Settings(home=own, site="north"), bundle, [], now=now).ok
    assert not verify_here(Settings(home=own, site="west"), bundle, [], now=now).ok


def test_what_was_opened_is_what_is_verified(bundle: Path, site: MadeSite, tmp_path: Path) -> None:
    """A file that is exchanged after it was opened is not taken for the one that was."""
    path = tmp_path / "out.tar"
    path.write_bytes(bundle.read_bytes())
    archive = Archive(path)
    other = tmp_path / "other.tar"
    write_bundle(other, site.publish(site.release(2)), site.store)
    other.replace(path)
    assert verify(path, site).ok
    assert not verify_archive(archive, [site.signer.public_key]).ok


def test_model_signed_by_a_stranger_is_refused(tmp_path: Path) -> None:
    site = MadeSite(tmp_path, "north")
    release = site.release()
    _sign(site, release, Signer.load_or_create(tmp_path / "stranger.pem"))
    write_bundle(tmp_path / "out.tar", site.publish(release), site.store)
    assert "none of those that are trusted" in failure(tmp_path / "out.tar", site)


def _sign(site: MadeSite, release: str, signer: Signer) -> str:
    data = sign_model(site.artifacts.fetch(release), signer)
    signed = datetime.now(UTC).isoformat()
    return store_signature(site.objects, site.artifacts, subject=release, data=data, signed=signed, statement="").digest
