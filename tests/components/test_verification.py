"""What a server may load: each way in which an adapter is refused, and that what is loaded already is asked nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.components import served
from sluice.components.verification import sign_release, verify_release, verify_signature
from sluice.components.workspace import Workspace
from sluice.infra.errors import GateRefused, IntegrityError
from sluice.infra.settings import Settings
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.key_changes import revoke, rotate
from sluice.provenance.keys import Signer
from sluice.provenance.ledger import Draft
from sluice.provenance.steps import StepKey, StepOutput
from sluice.provenance.trust import KeyRevoked, SignerRefused
from sluice.registry.transfer.acceptance import accept
from sluice.registry.transfer.sites import trust_site
from sluice.training.safetensors_file import write_tensors
from tests.provenance.release_actions import BASE, decide, make_champion
from tests.registry.transfer.made_site import MadeSite
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore) -> Workspace:
    made = reopened(tmp_path / "home", object_store, artifacts)
    make_champion(made.ledger, BASE)
    return made


def reopened(home: Path, object_store: DirectoryStore, artifacts: ArtifactStore) -> Workspace:
    workspace = Workspace(Settings(home=home, serving={"vllm_url": "http://127.0.0.1:1"}))
    workspace.__dict__.update(objects=object_store, artifacts=artifacts)
    return workspace


def train(workspace: Workspace, step: str = "train", rows: int = 4) -> tuple[str, str]:
    """Digests of an adapter and of the statement about its step."""

    def work(folder: Path) -> StepOutput:
        write_tensors(folder / "adapter_model.safetensors", {"a": np.ones((rows, 65536), dtype=np.float32)})
        (folder / "adapter_config.json").write_text("{}")
        return StepOutput({"adapter": workspace.artifacts.put_directory(folder, "adapter", {"base": BASE}).digest})

    record, _ = workspace.steps.run(StepKey(step, CODE, {"rows": rows}), work)
    return record.output.artifacts["adapter"], record.statement


def test_a_signed_attested_decided_adapter_is_let_through_in_less_than_a_second(workspace: Workspace) -> None:
    adapter, statement = train(workspace)
    signed = sign_release(workspace, adapter, statement)
    assert sign_release(workspace, adapter, statement) == signed
    with pytest.raises(GateRefused, match="decision about it does not exist"):
        verify_release(workspace, adapter)
    assert verify_release(workspace, adapter, undecided=True) == workspace.folder(adapter)
    decide(workspace.ledger, adapter, verdict="fail")
    with pytest.raises(GateRefused, match="decision about it is 'fail'"):
        verify_release(workspace, adapter)
    decide(workspace.ledger, adapter)
    started = time.perf_counter()
    assert verify_release(workspace, adapter) == workspace.folder(adapter)
    assert time.perf_counter() - started < 1


def test_an_adapter_without_signature_or_training_is_refused(workspace: Workspace) -> None:
    adapter, statement = train(workspace)
    with pytest.raises(IntegrityError, match="has no signature") as raised:
        verify_signature(workspace, adapter)
    assert raised.value.hint
    for wrong, says in (
        ("", "No statement about the training"),
        (digest_bytes(b"nothing"), "is gone"),
        (train(workspace, rows=5)[1], "not about the training of adapter"),
    ):
        other, _ = train(workspace, rows=len(says))
        sign_release(workspace, other, wrong)
        with pytest.raises(IntegrityError, match=says):
            verify_signature(workspace, other)
    _, elsewhere = train(workspace, step="curate")
    sign_release(workspace, adapter, elsewhere)
    with pytest.raises(IntegrityError, match="is about step 'curate'"):
        verify_signature(workspace, adapter)
    place = f"attestations/sha256/{statement.removeprefix('sha256:')}.json"
    workspace.objects.put(place, workspace.objects.get(place) + b" ")
    other, _ = train(workspace, rows=6)
    sign_release(workspace, other, statement)
    with pytest.raises(IntegrityError, match="is damaged"):
        verify_signature(workspace, other)


def test_a_header_with_surprises_is_refused(workspace: Workspace) -> None:
    def work(folder: Path) -> StepOutput:
        from safetensors.numpy import save_file

        (folder / "adapter_config.json").write_text("{}")
        save_file({"a": np.ones(4)}, folder / "adapter_model.safetensors", metadata={"note": "n"})
        return StepOutput({"adapter": workspace.artifacts.put_directory(folder, "adapter", {}).digest})

    record, _ = workspace.steps.run(StepKey("train", CODE), work)
    adapter = record.output.artifacts["adapter"]
    sign_release(workspace, adapter, record.statement)
    with pytest.raises(IntegrityError, match="note = 'n'"):
        verify_release(workspace, adapter, undecided=True)


def test_a_signer_without_leave_is_refused_when_signing_and_when_verifying(
    workspace: Workspace, object_store: DirectoryStore, artifacts: ArtifactStore
) -> None:
    home = workspace.settings.home
    adapter, statement = train(workspace)
    cluster = Signer.load_or_create(home / "cluster.pem").public_key
    rule = "signers: {cluster: {key: cluster.pub}}\nrules: [{models: adapter, signers: [cluster]}]\n"
    (home / "cluster.pub").write_text(cluster.pem)
    (home / "trust.yaml").write_text(rule)
    strict = reopened(home, object_store, artifacts)
    with pytest.raises(SignerRefused, match="may not sign models 'adapter': only cluster may"):
        sign_release(strict, adapter, statement)
    sign_release(workspace, adapter, statement)
    with pytest.raises(SignerRefused, match="only cluster may"):
        verify_signature(strict, adapter)
    # And a rule about training: the signature counts, the training does not.
    (home / "trust.yaml").write_text(rule.replace("models: adapter", "steps: train"))
    with pytest.raises(SignerRefused, match="may not sign steps 'train'"):
        verify_signature(reopened(home, object_store, artifacts), adapter)


def test_after_a_revocation_the_decided_adapter_is_served_and_the_other_is_not(
    workspace: Workspace, object_store: DirectoryStore, artifacts: ArtifactStore
) -> None:
    lost = workspace.signer.public_key
    decided, loose = train(workspace), train(workspace, rows=5)
    for adapter, statement in (decided, loose):
        sign_release(workspace, adapter, statement)
    decide(workspace.ledger, decided[0])
    rotate(workspace.ledger, workspace.signer, workspace.trusted, "ann")
    now = reopened(workspace.settings.home, object_store, artifacts)
    revoke(now.ledger, artifacts, now.steps.records, lost, signer=now.signer, reason="stolen", actor="ann")
    now = reopened(workspace.settings.home, object_store, artifacts)
    verify_release(now, decided[0])
    with pytest.raises(KeyRevoked, match=r"ann revoked at .*: stolen"):
        verify_release(now, loose[0], undecided=True)
    # The way out: the step is computed again under the key that counts, and signed again beside the old signature.
    again = train(now, rows=5)
    assert again[0] == loose[0]
    sign_release(now, *again)
    verify_release(now, loose[0], undecided=True)


class Server:
    """The part of vLLM that loading needs."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def models(self) -> list[Any]:
        return [type("Model", (), {"name": name}) for name in self.names]

    def load_adapter(self, name: str, folder: Path) -> None:
        self.names.append(name)


def test_nothing_unverified_is_loaded_and_what_is_loaded_is_asked_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = train(workspace)
    name = served.release_name(workspace.settings, adapter)
    empty = Server()
    with pytest.raises(IntegrityError, match="has no signature"):
        served.ensure_loaded(workspace, adapter, BASE, (empty,), undecided=True)  # type: ignore[arg-type]
    assert empty.names == []
    # Invariant 5: a release that the server holds needs no keys, no store, no ledger.
    alone = Workspace(workspace.settings)
    alone.__dict__.update(objects=None, artifacts=None, ledger=None, signer=None)
    assert served.ensure_loaded(alone, adapter, BASE, (Server(name),)) == name  # type: ignore[arg-type]


def test_a_changed_signature_object_is_told(workspace: Workspace) -> None:
    adapter, statement = train(workspace)
    stored = sign_release(workspace, adapter, statement)
    bundle = json.loads(stored.data)
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = "AAAA"
    forged = workspace.artifacts.put_files(
        {"model.sig": json.dumps(bundle).encode()},
        "signature",
        {"subject": adapter, "signed": stored.signed, "statement": statement},
    )
    place = f"signatures/{adapter.removeprefix('sha256:')}.json"
    workspace.objects.put(place, json.dumps({"signature": forged.digest}).encode())
    with pytest.raises(IntegrityError, match="is not what was signed"):
        verify_signature(workspace, adapter)


def imported(workspace: Workspace, north: MadeSite, adapter: str, staging: Path) -> None:
    """Take a release over from `north` and note it, as an import does."""
    published = north.publish(adapter)
    accept(workspace.objects, published.snapshot, published.envelope, north.store, staging)
    workspace.ledger.transact("ann", lambda _: Draft("import", {"release": adapter, "site": "north"}))


def test_an_imported_adapter_is_loaded_by_the_keys_of_the_site_it_came_from(
    workspace: Workspace, object_store: DirectoryStore, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    home = workspace.settings.home
    north = MadeSite(tmp_path / "north", "north")
    adapter, other = north.release(1), north.release(2)
    for made in (adapter, other):
        north.sign(made)
    imported(workspace, north, adapter, tmp_path / "staging")
    with pytest.raises(IntegrityError, match="none of those that are trusted"):
        verify_signature(workspace, adapter)
    trust_site(home, "north", north.public_key_file)
    found, statement = verify_signature(workspace, adapter)
    assert (found.subject, statement["predicate"]["buildDefinition"]["externalParameters"]["step"]) == (
        adapter,
        "train",
    )
    # The keys of that site count for what came from it, and for nothing else.
    published = north.publish(other)
    accept(workspace.objects, published.snapshot, published.envelope, north.store, tmp_path / "staging")
    with pytest.raises(IntegrityError, match="none of those that are trusted"):
        verify_signature(workspace, other)
    assert all(entry.key_id == workspace.signer.public_key.key_id for entry in workspace.ledger.entries())


def test_what_the_other_site_revoked_is_not_loaded_here(workspace: Workspace, tmp_path: Path) -> None:
    north = MadeSite(tmp_path / "north", "north")
    lost = north.signer.public_key
    adapter = north.release(1)
    rotate(north.ledger, north.signer, tmp_path / "north" / "trusted", "bob")
    new = Signer.load_or_create(tmp_path / "north" / "keys" / "signing.pem")
    north.reopen(new, (lost,))
    revoke(north.ledger, north.artifacts, lambda: [], lost, signer=new, reason="stolen", actor="bob")
    trust_site(workspace.settings.home, "north", tmp_path / "north" / "keys" / "signing.pem.pub")
    (workspace.settings.home / "keys" / "sites" / "north" / "old.pub").write_text(lost.pem)
    # The ledger had referred to the adapter; to the statement about it (no records were given) it had not.
    north.sign(adapter)
    imported(workspace, north, adapter, tmp_path / "staging")
    with pytest.raises(KeyRevoked, match="bob revoked at"):
        verify_signature(workspace, adapter)
