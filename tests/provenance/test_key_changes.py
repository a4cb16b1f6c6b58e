"""Rotation and revocation on a ledger: what came before goes on counting, what comes after does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sluice.infra.errors import ConflictError, InputError, IntegrityError
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.key_changes import revoke, rotate, trust_of
from sluice.provenance.keys import PublicKey, Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import record_failure
from sluice.provenance.steps import StepKey, StepOutput, StepRunner
from sluice.provenance.trust import KeyRevoked, SignerRefused, TrustPolicy, load_policy
from tests.provenance.release_actions import BASE
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")


class Site:
    """One installation: its key, its trusted folder, and the stores that it shares with others."""

    def __init__(self, home: Path, objects: DirectoryStore) -> None:
        self.home, self.objects = home, objects
        self.artifacts = ArtifactStore(objects, home / "cache")
        self.open()

    def open(self) -> Site:
        self.signer = Signer.load_or_create(self.home / "keys" / "signing.pem")
        self.policy = load_policy(self.home / "trust.yaml", self.signer.public_key, self.trusted)
        self.ledger = Ledger(self.objects, "faq", self.signer, policy=self.policy)
        self.steps = StepRunner(
            self.objects,
            self.artifacts,
            self.signer,
            self.home / "work",
            trust=lambda: trust_of(self.policy, self.ledger, self.artifacts),
        )
        return self

    @property
    def trusted(self) -> Path:
        return self.home / "keys" / "trusted"

    def trust_key(self, name: str, key: PublicKey) -> Site:
        self.trusted.mkdir(parents=True, exist_ok=True)
        (self.trusted / f"{name}.pub").write_text(key.pem)
        return self.open()

    def run(self, name: str, content: str, inputs: dict[str, str] | None = None) -> tuple[str, bool]:
        key = StepKey(name, CODE, {"content": content}, inputs or {})

        def work(folder: Path) -> StepOutput:
            return StepOutput({"made": self.artifacts.put_files({"f": content.encode()}, "thing").digest})

        record, hit = self.steps.run(key, work)
        return record.output.artifacts["made"], hit


@pytest.fixture
def site(tmp_path: Path, object_store: DirectoryStore) -> Callable[[str], Site]:
    return lambda name: Site(tmp_path / name, object_store)


def test_after_a_rotation_both_keys_count_and_the_old_private_one_is_gone(site: Callable[[str], Site]) -> None:
    here = site("here")
    old = here.signer.public_key
    made, _ = here.run("train", "before")
    record_failure(here.ledger, release=BASE, reason="x", actor="ann")
    new = rotate(here.ledger, here.signer, here.trusted, "ann")
    here.open()
    assert here.signer.public_key == new != old
    assert (here.home / "keys" / "signing.pem.pub").read_text() == new.pem
    assert sorted(path.name for path in (here.home / "keys").iterdir()) == ["signing.pem", "signing.pem.pub", "trusted"]
    assert here.run("train", "before") == (made, True)
    record_failure(here.ledger, release=made, reason="x", actor="ann")
    assert [entry.key_id for entry in here.ledger.entries()] == [old.key_id, old.key_id, new.key_id]


def test_a_rotation_that_was_killed_goes_on_with_the_same_key(
    site: Callable[[str], Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = site("here")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rotate(here.ledger, here.signer, here.trusted, "ann")
    staged = Signer.load_or_create(here.home / "keys" / "next.pem").public_key
    assert rotate(here.open().ledger, here.signer, here.trusted, "ann") == staged
    assert [entry.kind for entry in here.open().ledger.entries()] == ["rotation"]


def test_another_site_follows_a_rotation_by_the_ledger_alone(site: Callable[[str], Site]) -> None:
    here, there = site("here"), site("there")
    there.trust_key("partner", here.signer.public_key)
    (there.home / "trust.yaml").write_text("rules:\n- {steps: train, signers: [partner]}\n")
    rotate(here.ledger, here.signer, here.trusted, "ann")
    made, _ = here.open().run("train", "after")
    assert there.open().run("train", "after") == (made, True)
    # And the rule that names the partner does not let the site's own key sign, before any work is done.
    with pytest.raises(SignerRefused, match="may not sign steps 'train': only partner may"):
        there.run("train", "own work")


def test_nobody_hands_on_the_key_of_another(site: Callable[[str], Site]) -> None:
    here, training = site("here"), site("training")
    here.trust_key("training", training.signer.public_key)
    training.trust_key("here", here.signer.public_key)
    evil = site("evil").signer.public_key
    body = {"key": evil.key_id, "pem": evil.pem, "previous": here.signer.public_key.key_id}
    training.ledger.append("rotation", body, "mallory", expected_head=None)
    with pytest.raises(IntegrityError, match=f"hands on key {here.signer.public_key.short}"):
        here.ledger.entries()


def test_what_the_ledger_referred_to_before_a_revocation_goes_on_counting(site: Callable[[str], Site]) -> None:
    here = site("here")
    lost = here.signer
    dataset, _ = here.run("curate", "data")
    adapter, _ = here.run("train", "adapter", {"dataset": dataset})
    loose, _ = here.run("train", "nobody asked for this")
    record_failure(here.ledger, release=adapter, reason="it is named here", actor="ann")
    rotate(here.ledger, here.signer, here.trusted, "ann")
    here.open()
    entry = revoke(
        here.ledger,
        here.artifacts,
        here.steps.records,
        lost.public_key,
        signer=here.signer,
        reason="laptop stolen",
        actor="ann",
    )
    # Named, and behind what is named: hits. Not named: computed again, under the new key.
    assert here.run("train", "adapter", {"dataset": dataset}) == (adapter, True)
    assert here.run("curate", "data") == (dataset, True)
    assert here.run("train", "nobody asked for this") == (loose, False)
    assert here.run("train", "nobody asked for this") == (loose, True)
    # A second revocation is the first.
    again = revoke(
        here.ledger,
        here.artifacts,
        here.steps.records,
        lost.public_key,
        signer=here.signer,
        reason="again",
        actor="bob",
    )
    assert again.digest == entry.digest


def test_what_the_thief_signs_after_the_revocation_is_refused(site: Callable[[str], Site]) -> None:
    here, thief = site("here"), site("thief")
    here.trust_key("laptop", thief.signer.public_key)
    thief.trust_key("here", here.signer.public_key)
    adapter, _ = here.run("train", "adapter")
    record_failure(here.ledger, release=adapter, reason="x", actor="ann")
    revoke(
        here.ledger,
        here.artifacts,
        here.steps.records,
        thief.signer.public_key,
        signer=here.signer,
        reason="laptop stolen",
        actor="ann",
    )
    # A record for another key that claims to have made the very adapter that the ledger names.
    blind = StepRunner(thief.objects, thief.artifacts, thief.signer, thief.home / "work")
    key = StepKey("train", CODE, {"content": "forged"})
    record, _ = blind.run(key, lambda _: StepOutput({"made": adapter}))
    with pytest.raises(KeyRevoked, match="laptop stolen"):
        here.steps.verify(record)
    assert here.steps.find(key) is None
    # And an entry: its own ledger will not write it; written past it, the ledger says so.
    with pytest.raises(KeyRevoked, match="A failure for ledger 'faq' is signed by key"):
        record_failure(thief.open().ledger, release=BASE, reason="sabotage", actor="mallory")
    head = here.ledger.entries()[-1]
    forged = {
        "ledger": "faq",
        "sequence": head.sequence + 1,
        "previous": head.digest,
        "kind": "failure",
        "body": {"release": BASE, "reason": "sabotage"},
        "time": "2020-01-01T00:00:00Z",
        "actor": "mallory",
        "nonce": "0",
    }
    envelope = thief.signer.sign(forged, "application/vnd.sluice.ledger-entry+json")
    here.objects.put(f"ledger/faq/{head.sequence + 1:08d}.json", json.dumps(envelope).encode())
    with pytest.raises(IntegrityError, match=rf"Entry {head.sequence + 1} .*ann revoked at {head.time}: laptop stolen"):
        here.ledger.entries()


def test_the_key_that_signs_here_and_a_revocation_without_a_reason_are_refused(site: Callable[[str], Site]) -> None:
    here = site("here")
    for key, reason, error, says in (
        (here.signer.public_key, "x", ConflictError, "signs here now"),
        (Signer.load_or_create(here.home / "other.pem").public_key, " ", InputError, "reason is empty"),
    ):
        with pytest.raises(error, match=says):
            revoke(here.ledger, here.artifacts, here.steps.records, key, signer=here.signer, reason=reason, actor="ann")
    assert here.ledger.entries() == []


def test_a_ledger_entry_by_a_signer_without_leave_is_refused_before_it_is_written(site: Callable[[str], Site]) -> None:
    here = site("here")
    (here.home / "trust.yaml").write_text(
        "signers: {release: {key: release.pub}}\nrules: [{ledger: failure, signers: [release]}]\n"
    )
    (here.home / "release.pub").write_text(Signer.load_or_create(here.home / "release.pem").public_key.pem)
    with pytest.raises(SignerRefused, match="may not sign ledger 'failure': only release may"):
        record_failure(here.open().ledger, release=BASE, reason="x", actor="ann")
    assert here.ledger.entries() == []


def test_a_policy_of_keys_alone_names_the_first_own() -> None:
    keys = [PublicKey("a" * 64, ""), PublicKey("b" * 64, "")]
    assert [one.name for one in TrustPolicy.of(keys).signers] == ["own", "b" * 12]
