"""TUF's four attacks on an accepting site, and that accepting is all or nothing and may be repeated."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import canonical_json
from sluice.provenance.collecting import GRACE_S
from sluice.provenance.steps import read_records
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.transfer.acceptance import accept, highest_accepted
from sluice.registry.transfer.archive import SNAPSHOT_FILE
from sluice.registry.transfer.companions import find_companions, pointer_key
from sluice.registry.transfer.export import Published
from sluice.registry.transfer.sites import TrustedSite, site_of
from sluice.registry.transfer.snapshot import open_snapshot, require_fresh
from sluice.registry.transfer.sync import Receiver, receive
from tests.registry.transfer.made_site import MadeSite, resigned
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def north(tmp_path: Path) -> MadeSite:
    return MadeSite(tmp_path / "north", "north")


@pytest.fixture
def here(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "here")


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    return tmp_path / "staging"


def take(here: DirectoryStore, site: MadeSite, published: Published, staging: Path, source: object = None) -> None:
    accept(here, published.snapshot, published.envelope, source or site.store, staging)  # type: ignore[arg-type]


def content(store: DirectoryStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("")}


def test_release_arrives_whole_and_apart_from_what_was_made_here(
    north: MadeSite, here: DirectoryStore, staging: Path, tmp_path: Path
) -> None:
    release = north.release()
    take(here, north, north.publish(release), staging)
    folder = ArtifactStore(here, tmp_path / "cache").fetch(release)
    assert (folder / "adapter_model.safetensors").stat().st_size == 3000
    # No foreign record is ever found for a step of this site.
    assert list(read_records(here)) == []
    assert list(here.list("ledger/")) == []
    assert len(list(here.list("sites/north/steps/"))) == 5
    assert len(list(here.list("sites/north/ledger/assistant/"))) == 5
    found = highest_accepted(here, "north")
    assert found is not None
    assert found[0] == 1


def test_accepting_twice_changes_nothing(north: MadeSite, here: DirectoryStore, staging: Path) -> None:
    published = north.publish(north.release())
    take(here, north, published, staging)
    before = content(here)
    take(here, north, published, staging)
    assert content(here) == before


def test_rollback_to_an_older_snapshot_is_refused(north: MadeSite, here: DirectoryStore, staging: Path) -> None:
    old = north.publish(north.release(0))
    new = north.publish(north.release(1))
    take(here, north, new, staging)
    before = content(here)
    with pytest.raises(IntegrityError, match="older than snapshot 2, which was accepted here"):
        take(here, north, old, staging)
    assert content(here) == before


def test_two_snapshots_of_one_number_are_refused(north: MadeSite, here: DirectoryStore, staging: Path) -> None:
    published = north.publish(north.release())
    take(here, north, published, staging)
    lie = resigned(published, north.signer, expires="2999-01-01T00:00:00Z")
    with pytest.raises(IntegrityError, match="two different snapshots 1"):
        accept(here, open_snapshot(lie, [north.signer.public_key], "it"), lie, north.store, staging)


def test_frozen_snapshot_is_refused(north: MadeSite) -> None:
    now = datetime.now(UTC)
    published = north.publish(north.release(), valid_days=1, now=now - timedelta(days=2))
    with pytest.raises(IntegrityError, match="expired at"):
        require_fresh(published.snapshot, now)


class Mixed:
    """A store that gives an older file for one path of a snapshot: files of two snapshots combined."""

    def __init__(self, store: DirectoryStore, path: str, other: bytes) -> None:
        self._store, self._path, self._other = store, path, other

    def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
        return iter([self._other[start:]]) if key == self._path else self._store.stream(key, start)


@pytest.mark.parametrize("folder", ["blobs/", "manifests/", "ledger/", "attestations/", "steps/"])
def test_files_of_two_snapshots_are_not_combined(
    north: MadeSite, here: DirectoryStore, staging: Path, folder: str
) -> None:
    old = north.publish(north.release(0))
    new = north.publish(north.release(1))
    known = old.snapshot.by_path()
    ours = (
        next(file for file in new.snapshot.files if file.path.startswith(folder) and file.path not in known)
        if (folder != "ledger/")
        else new.snapshot.by_path()["ledger/assistant/00000006.json"]
    )
    theirs = next(path for path in known if path.startswith(folder))
    with pytest.raises(IntegrityError, match=r"is damaged where it comes from"):
        take(here, north, new, staging, Mixed(north.store, ours.path, north.store.get(theirs)))
    assert highest_accepted(here, "north") is None


def test_arbitrary_software_is_refused(north: MadeSite, tmp_path: Path) -> None:
    south = MadeSite(tmp_path / "south", "south")
    stranger = MadeSite(tmp_path / "stranger", "north")
    trusted = [TrustedSite("north", (north.signer.public_key,)), TrustedSite("south", (south.signer.public_key,))]
    with pytest.raises(IntegrityError, match="none of them trusted"):
        site_of(stranger.publish(stranger.release()).envelope, trusted, SNAPSHOT_FILE)
    # A site that is trusted may not speak in the name of another.
    published = south.publish(south.release())
    lie = resigned(published, south.signer, site="north")
    with pytest.raises(IntegrityError, match="none of them trusted"):
        site_of(lie, trusted, SNAPSHOT_FILE)
    with pytest.raises(IntegrityError, match="is from site 'west'"):
        site_of(resigned(published, south.signer, site="west"), trusted, SNAPSHOT_FILE)
    assert site_of(published.envelope, trusted, SNAPSHOT_FILE)[1].name == "south"


def test_rewritten_ledger_is_refused(north: MadeSite, here: DirectoryStore, staging: Path, tmp_path: Path) -> None:
    take(here, north, north.publish(north.release(0)), staging)
    before = content(here)
    # The same key over another history: the store was reset, and numbers were counted past ours.
    reborn = MadeSite(tmp_path / "reborn", "north")
    reborn.signer = Signer.load_or_create(tmp_path / "north" / "keys" / "signing.pem")
    reborn.publish(reborn.release(5))
    with pytest.raises(IntegrityError, match="cut or rewritten"):
        take(here, reborn, reborn.publish(reborn.release(6)), staging)
    assert content(here) == before


def test_a_ledger_under_another_name_is_refused(north: MadeSite, here: DirectoryStore, staging: Path) -> None:
    take(here, north, north.publish(north.release(0)), staging)
    before = content(here)
    published = north.publish(north.release(1))
    other = {**published.snapshot.ledger.model_dump(), "name": "another"}
    lie = resigned(published, north.signer, ledger=other)
    with pytest.raises(IntegrityError, match="its ledger is that of 'another', not of 'assistant'"):
        open_snapshot(lie, [north.signer.public_key], "it")
    ledger = published.snapshot.ledger.model_copy(update={"name": "another"})
    with pytest.raises(IntegrityError, match="it is another one"):
        accept(here, published.snapshot.model_copy(update={"ledger": ledger}), lie, north.store, staging)
    assert content(here) == before


def test_two_applications_of_a_site_have_a_ledger_each(
    north: MadeSite, here: DirectoryStore, staging: Path, tmp_path: Path
) -> None:
    """And the snapshot of one in between hides nothing of the other."""
    first = north.publish(north.release(0))
    take(here, north, first, staging)
    between = resigned(
        first,
        north.signer,
        number=2,
        application="translator",
        ledger={**first.snapshot.ledger.model_dump(), "name": "translator"},
        files=[],
    )
    accept(here, open_snapshot(between, [north.signer.public_key], "it"), between, north.store, staging)
    reborn = MadeSite(tmp_path / "reborn", "north")
    reborn.signer = north.signer
    published = reborn.publish(reborn.release(5))
    lie = resigned(published, north.signer, number=3)
    with pytest.raises(IntegrityError, match="cut or rewritten"):
        accept(here, open_snapshot(lie, [north.signer.public_key], "it"), lie, reborn.store, staging)


def test_a_number_that_has_no_place_is_refused(north: MadeSite) -> None:
    lie = resigned(north.publish(north.release()), north.signer, number=100_000_000)
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_snapshot(lie, [north.signer.public_key], "it")


def test_a_new_decision_there_brings_its_new_bill_of_materials(
    north: MadeSite, here: DirectoryStore, staging: Path
) -> None:
    release = north.release()
    for content_of in (b"first", b"second"):
        bom = north.artifacts.put_files({"bom.json": content_of}, "bom").digest
        north.objects.put(pointer_key("bom", release), canonical_json({"bom": bom}))
        take(here, north, north.publish(release), staging)
        assert find_companions(here, release) == {"bom": bom}


def test_what_the_collector_may_take_soon_is_written_again(
    north: MadeSite, here: DirectoryStore, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = north.release()
    published = north.publish(release)
    take(here, north, published, staging)
    old = time.time() - GRACE_S * 0.6
    collected = [info.key for info in here.list("") if info.key.startswith(("blobs/", "manifests/"))]
    for key in collected:
        os.utime(here.root / key, (old, old))
    asked: list[int] = []

    def collector(_: object, digests: list[str]) -> bool:
        """One that had begun before takes the adapter's manifest, once."""
        asked.append(len(digests))
        if len(asked) == 1:
            here.delete(f"manifests/sha256/{release[7:]}")
        return len(asked) == 1

    monkeypatch.setattr("sluice.registry.transfer.mirror.wait_for_collector", collector)
    take(here, north, published, staging)
    assert asked == [len(collected)] * 2
    assert all((found := here.head(key)) and found.modified > old + 1 for key in collected)


def test_cut_line_leaves_nothing_to_be_seen_and_goes_on(
    north: MadeSite, here: DirectoryStore, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.registry.transfer.mirror.time.sleep", lambda _: None)
    release = north.release(0, weights=3_000_000)
    published = north.publish(release)
    read: list[int] = []

    class Line:
        left = 2_500_000

        def stream(self, key: str, start: int = 0) -> Iterator[bytes]:
            data = north.store.get(key)[start:]
            for place in range(0, len(data), 100_000):
                piece = data[place : place + 100_000]
                self.left -= len(piece)
                if self.left < 0:
                    raise UnavailableError("the line is cut")
                read.append(len(piece))
                yield piece

    line = Line()
    with pytest.raises(UnavailableError, match="goes on where it was"):
        take(here, north, published, staging, line)
    assert highest_accepted(here, "north") is None
    assert not here.head(f"manifests/sha256/{release[7:]}")
    line.left = 10**9
    read.clear()
    take(here, north, published, staging, line)
    assert sum(read) < 1_000_000, "what had come before the cut is not read again"
    assert highest_accepted(here, "north") is not None
    assert list(staging.iterdir()) == []


def test_own_companions_are_kept_and_missing_ones_taken_over(
    north: MadeSite, here: DirectoryStore, staging: Path
) -> None:
    release = north.release()
    for kind in ("signature", "bom"):
        digest = north.artifacts.put_files({kind: b"theirs"}, kind).digest
        north.objects.put(pointer_key(kind, release), f'{{"{kind}": "{digest}"}}'.encode())
    ours = "sha256:" + "1" * 64
    here.put(pointer_key("signature", release), f'{{"signature": "{ours}"}}'.encode())
    published = north.publish(release)
    take(here, north, published, staging)
    found = find_companions(here, release)
    assert found == {"signature": ours, "bom": published.snapshot.releases[0].companions["bom"]}


def test_nothing_is_taken_before_the_chain_is_proven(
    north: MadeSite, here: DirectoryStore, staging: Path, tmp_path: Path
) -> None:
    receiver = Receiver(
        here,
        ArtifactStore(here, tmp_path / "cache"),
        MlflowRegistry("http://127.0.0.1:9"),
        None,
        "assistant",
        (),
        "ann",
    )
    published = north.publish(north.release(verdict="fail"))
    with pytest.raises(IntegrityError, match="the gate's decision says 'fail'"):
        receive(receiver, published.snapshot, published.envelope, north.store, [north.signer.public_key], staging)
    assert content(here) == {}
    other = Receiver(here, receiver.artifacts, receiver.registry, None, "translator", (), "ann")
    published = north.publish(north.release(1))
    with pytest.raises(InputError, match="application 'assistant'"):
        receive(other, published.snapshot, published.envelope, north.store, [north.signer.public_key], staging)
    assert content(here) == {}
