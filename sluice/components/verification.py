"""An adapter is signed when it is trained, and verified before it is registered and before a server loads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sluice.components.workspace import Workspace
from sluice.infra.errors import GateRefused, IntegrityError
from sluice.infra.object_store import ObjectMissing
from sluice.provenance.attestation import attestation_key, check_statement
from sluice.provenance.canonical import Json, digest_bytes, hex_of, short
from sluice.provenance.releases import read_state
from sluice.provenance.trust import Trust
from sluice.registry.model_signature import (
    ModelSignature,
    find_signatures,
    sign_model,
    signer_of,
    store_signature,
    verify_model,
)

TRAINING = "train"
"""The step whose statement an adapter needs, and so the name that a rule about training speaks of."""
KIND = "adapter"
"""The kind of a model as rules name it."""


def sign_release(workspace: Workspace, adapter: str, statement: str) -> ModelSignature:
    """The adapter's signature by a key that counts now: the stored one, or else a new one, stored.

    `statement` is the digest of the envelope about its training. Raises `SignerRefused` when this installation's key
    may not sign models.
    """
    folder = workspace.folder(adapter)
    for stored in find_signatures(workspace.objects, workspace.artifacts, adapter):
        try:
            _require_signed(workspace, folder, stored, workspace.trust)
            return stored
        except IntegrityError:
            # By a key that was revoked since: a later signature lies beside it.
            continue
    settings = workspace.settings.signing
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    own = workspace.signer.public_key.key_id
    if not settings.sigstore:
        workspace.trust.require("models", KIND, [own], time=now, what=f"A signature of adapter {short(adapter)}")
    data = sign_model(folder, workspace.signer, settings)
    return store_signature(
        workspace.objects, workspace.artifacts, subject=adapter, data=data, signed=now, statement=statement
    )


def verify_signature(workspace: Workspace, adapter: str) -> tuple[ModelSignature, Json]:
    """The signature of an adapter that holds and counts, and the statement of its training; its bytes are verified.

    Both are by a key that counts here or, for an adapter that the ledger says was imported, both by one of the site it
    came from. Raises `IntegrityError` with the reason of the last signature there is.
    """
    return _verify(workspace, adapter, workspace.folder(adapter))


def _verify(workspace: Workspace, adapter: str, folder: Path) -> tuple[ModelSignature, Json]:
    refusal = IntegrityError(
        f"The adapter {short(adapter)} has no signature.",
        hint="Train it here again, or import it with its signature: it is signed by whoever trained it.",
    )
    for stored in find_signatures(workspace.objects, workspace.artifacts, adapter):
        try:
            return stored, _require_made(workspace, folder, stored, workspace.trust)
        except IntegrityError as error:
            refusal = error
    for trust in _origins(workspace, adapter):
        for stored in find_signatures(workspace.objects, workspace.artifacts, adapter):
            try:
                return stored, _require_made(workspace, folder, stored, trust)
            except IntegrityError as error:
                refusal = error
    raise refusal


def verify_release(workspace: Workspace, release: str, *, undecided: bool = False) -> Path:
    """The folder of an adapter that a server may load: signed, attested, decided, with a header that holds nothing odd.

    `undecided` leaves the decision out, for an adapter that is loaded to be evaluated. Raises `IntegrityError` or
    `GateRefused` with the reason.
    """
    from sluice.training.adapter import WEIGHTS, require_files
    from sluice.training.safetensors_file import read_header

    if not undecided:
        _require_decided(workspace, release)
    folder = workspace.folder(release)
    _verify(workspace, release, folder)
    require_files(folder)
    read_header(folder / WEIGHTS)
    return folder


def require_base(workspace: Workspace, release: str, base: str) -> None:
    """The adapter was trained for the base model that is served, and its weights have that one's sizes.

    Raises `IntegrityError`: a server would load another base's adapter of the same sizes, and answer nonsense with 200.
    """
    from sluice.training.adapter import require_fit

    trained_on = workspace.artifacts.manifest(release).metadata.get("base")
    if trained_on != base:
        raise IntegrityError(
            f"The adapter {short(release)} was trained for the base model {trained_on or '(its manifest names none)'}; "
            f"the servers here hold {base}.",
            hint="Train it on this base model, or set SLUICE_BASE_MODEL to the one it was trained for.",
        )
    require_fit(workspace.folder(release), workspace.folder(base))


def _origins(workspace: Workspace, adapter: str) -> Iterator[Trust]:
    """The trust in each site that this adapter was imported from, as far as its keys are trusted still."""
    entries = [entry for entry in workspace.ledger.entries() if entry.kind == "import"]
    names = {entry.body["site"] for entry in entries if entry.body["release"] == adapter}
    if not names:
        return
    from sluice.registry.transfer.site_trust import trust_of_site
    from sluice.registry.transfer.sites import trusted_sites

    for site in trusted_sites(workspace.settings.home):
        if site.name in names:
            yield trust_of_site(workspace.objects, workspace.artifacts, site, workspace.settings.application)


def _require_made(workspace: Workspace, folder: Path, stored: ModelSignature, trust: Trust) -> Json:
    """The statement of the training; it and the signature are by keys that count for `trust`."""
    _require_signed(workspace, folder, stored, trust)
    return _require_trained(workspace, stored.subject, stored.statement, trust)


def _require_signed(workspace: Workspace, folder: Path, stored: ModelSignature, trust: Trust) -> None:
    settings = workspace.settings.signing
    # Other sites sign by key: who may sign through Sigstore is said for this site alone.
    by_identity = settings.sigstore and trust is workspace.trust
    verify_model(folder, stored.data, trust.keys, settings if by_identity else None)
    if not by_identity:
        key = signer_of(stored.data, trust.keys)
        what = f"The signature of adapter {short(stored.subject)}"
        trust.require("models", KIND, [key.key_id], time=stored.signed, what=what, identity=stored.subject)


def _require_trained(workspace: Workspace, adapter: str, statement: str, trust: Trust) -> Json:
    """The statement of step `train`, by a key that counts for it, which says that this adapter came of it."""
    name = f"the training of adapter {short(adapter)}"
    if not statement:
        raise IntegrityError(f"No statement about {name} is named by its signature.")
    try:
        data = workspace.objects.get(attestation_key(statement))
    except ObjectMissing as error:
        raise IntegrityError(f"The statement {statement} about {name} is gone.") from error
    if digest_bytes(data) != statement:
        raise IntegrityError(f"The statement {statement} about {name} is damaged: its digest is {digest_bytes(data)}.")
    payload, key_ids = trust.open(json.loads(data))
    attested = check_statement(payload)
    found = attested["predicate"]
    step = found["buildDefinition"]["externalParameters"].get("step")
    subjects = {one["digest"].get("sha256") for one in payload["subject"]}
    if step != TRAINING or hex_of(adapter) not in subjects:
        raise IntegrityError(f"The statement {statement} is about step {step!r}, and not about {name}.")
    time = str(found["runDetails"]["metadata"]["finishedOn"])
    what = f"The statement about {name}"
    trust.require("steps", TRAINING, key_ids, time=time, what=what, identity=statement)
    return attested


def _require_decided(workspace: Workspace, release: str) -> None:
    """The ledger lets, or once let, this release before users. Whether it may get weight now is asked elsewhere."""
    state = read_state(workspace.ledger)
    if any(change.release == release for change in state.history()):
        return
    decision = state.decision_for(release)
    if decision is None or decision.verdict not in ("pass", "overridden"):
        verdict = f"is {decision.verdict!r}" if decision else "does not exist"
        raise GateRefused(
            f"Release {short(release)} is not loaded: the gate's decision about it {verdict}.",
            hint="`sluice run retrain` evaluates a candidate; `sluice ledger` shows what was decided.",
        )
