"""Approval: a person's word about a candidate, given in MLflow or on the command line, kept in the ledger.

MLflow is where people look and click; the ledger is what counts. Both ways end in `record`, and a complete approval
starts the release. `take_over` may run anywhere, at the same time as others and killed at any moment: what people said
in MLflow stays on the page until the ledger holds it and its release has been started.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from sluice.components.aliases import follow_ledger
from sluice.components.workspace import Workspace
from sluice.infra.access import login, require
from sluice.infra.audit import AuditLine, append
from sluice.infra.errors import ConflictError, GateRefused, InputError, SluiceError, UnavailableError
from sluice.provenance.canonical import short
from sluice.provenance.release_state import ReleaseState
from sluice.provenance.releases import authorize, read_state, record_approval, record_decision, record_rejection
from sluice.registry.approvals import (
    APPROVED,
    HALF,
    OPEN,
    REJECTED,
    UNNAMED,
    ApprovalState,
    Standing,
    UiWord,
    is_shown,
    read_ui_word,
    show,
    standing_of,
)
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.versions import RELEASED, Version, get_version, list_versions

NOT_AUTHENTICATED = "given in MLflow, where nobody checks the name"
TAKE_OVER = "take over from MLflow"
SETTLE_S = 1.0
"""MLflow writes one tag after the other: a name that a program or a dialog sends too may follow its `approved`."""


@dataclass(frozen=True)
class Decided:
    """A version that somebody decided on. `half`: approved, and another person must approve it too.

    `approval` is the ledger entry that made an approval complete: a release is started once for each. `overridden`:
    the release may start under an override.
    """

    version: Version
    state: Literal["approved", "rejected", "half"]
    approver: str
    overridden: bool
    sentence: str
    approval: str = ""


Start = Callable[[Decided], object]


def registry_of(workspace: Workspace) -> MlflowRegistry:
    """MLflow, as the settings name it."""
    return MlflowRegistry(workspace.settings.mlflow.tracking_uri)


def waiting(workspace: Workspace) -> list[tuple[Version, Standing]]:
    """Versions that wait for a person, newest first, and how each stands; also those that nobody approved in time and
    that are newer than every champion."""
    versions = _released(workspace, None)
    state = read_state(workspace.ledger)
    newest = max((version.number for version in versions if "champion" in version.tags), default=0)
    found = []
    for version in versions:
        standing = _standing(workspace, state, version)
        late = version.number > newest and standing.word not in (APPROVED, REJECTED)
        if standing.word in OPEN or (late and state.decision_for(version.digest) is not None):
            found.append((version, standing))
    return found


def find_candidate(workspace: Workspace, text: str) -> Version:
    """The version that a number, or `candidate` for the newest that waits, names."""
    if text == "candidate":
        for version, standing in waiting(workspace):
            if standing.word in OPEN:
                return version
        raise InputError("VERSION = 'candidate': no version waits.", hint="`sluice approvals` lists what there is.")
    if not (text.isascii() and text.isdigit()):
        raise InputError(
            f"VERSION = {text!r} is not a number.", hint="Use the version's number in MLflow, or `candidate`."
        )
    version = get_version(registry_of(workspace), workspace.settings.application, int(text))
    if not version.digest or version.tags.get("kind") not in RELEASED:
        raise InputError(
            f"VERSION = {text}: that one is no release that waits for people.",
            hint="`sluice approvals` lists what there is.",
        )
    return version


def record(
    workspace: Workspace,
    version: Version,
    state: ApprovalState,
    approver: str,
    reason: str,
    start: Start = lambda _: None,
    *,
    account: str | None = None,
) -> Decided:
    """Write a decision on a version into the ledger, `start` the release when its approval is complete, then show it
    in MLflow.

    `account` is who acted (`record_approval`). MLflow comes last: killed before that, the version still waits, and
    doing it again does the rest. Raises `GateRefused`, `ConflictError` when the page shows another decision than the
    ledger's latest.
    """
    seen = _seen(workspace, version)
    name, ledger = version.digest, workspace.ledger
    allow = workspace.settings.release.allow_override
    if state == APPROVED:
        record_approval(
            ledger,
            adapter=name,
            approver=approver,
            reason=reason,
            account=account,
            decision=seen,
            allow_override=allow,
        )
    else:
        record_rejection(ledger, adapter=name, approver=approver, reason=reason, decision=seen)
    now = read_state(ledger)
    standing = _standing(workspace, now, version)
    if state == REJECTED:
        decided = Decided(version, REJECTED, approver, False, standing.sentence)
    elif standing.word == HALF:
        decided = Decided(version, "half", approver, False, standing.sentence)
    else:
        decided = _released_by(workspace, now, version, standing, start)
    show(registry_of(workspace), version, standing)
    follow_ledger(workspace)
    return decided


def override(workspace: Workspace, version: Version, person: str, reason: str) -> None:
    """Record a named person's decision to release what the gate refused. It is signed, and the canary still judges."""
    if not workspace.settings.release.allow_override:
        raise GateRefused(
            f"Version {version.number} may not be forced: setting release.allow_override is off.",
            hint="An administrator may set SLUICE_RELEASE__ALLOW_OVERRIDE=true.",
        )
    decision = read_state(workspace.ledger).decision_for(version.digest)
    if decision is None:
        raise GateRefused(f"Release {short(version.digest)} has no gate decision to override.")
    if decision.verdict in ("pass", "overridden"):
        return
    record_decision(
        workspace.ledger,
        adapter=version.digest,
        verdict="overridden",
        report=decision.report,
        expires=decision.expires,
        holdout=decision.holdout,
        champion=decision.champion,
        approvers=decision.approvers,
        actor=person,
        person=person,
        reason=reason,
        allow_override=True,
    )


def take_over(
    workspace: Workspace, start: Start = lambda _: None, *, only: int | None = None
) -> tuple[list[Decided], list[str]]:
    """What people said in the MLflow UI and the ledger did not know, now recorded, with what `start` makes follow; and
    a sentence for each word that cannot count (an expired decision, a typing mistake), which its page is answered
    with: one of those must not hold up the others. `only` looks at the version of that number alone.

    MLflow does not say who set a tag, so the name in it is anybody's claim; the ledger's reason says so, and the audit
    log has who took it over. `access.approve_in_mlflow` = false takes nothing over.
    """
    taken: list[Decided] = []
    problems: list[str] = []
    # The pages before the ledger: what we wrote there was in the ledger before.
    versions = _released(workspace, only)
    state = read_state(workspace.ledger)
    for version in versions:
        try:
            decided = _follow_page(workspace, state, version, start)
            if decided is not None:
                taken.append(decided)
        except UnavailableError:
            raise
        except SluiceError as error:
            problems.append(f"Version {version.number}: {error}")
    return taken, problems


def _follow_page(workspace: Workspace, state: ReleaseState, version: Version, start: Start) -> Decided | None:
    """Take one page's word over, or make the page say what the ledger holds. Raises what the page was answered with."""
    standing = _standing(workspace, state, version)
    word = read_ui_word(version)
    if word is None and is_shown(version, standing):
        return None
    if word is not None and word.approver == UNNAMED:
        time.sleep(SETTLE_S)
        version = get_version(registry_of(workspace), version.name, version.number)
        word = read_ui_word(version)
    # Others may have been at work since: nobody's older view is to be shown.
    state = read_state(workspace.ledger)
    standing = _standing(workspace, state, version)
    if word is None or word.state == standing.word:
        return _catch_up(workspace, state, version, standing, start)
    subject = f"version {version.number}: {word.text} by {word.approver}"
    try:
        return _take_word(workspace, version, word, subject, start)
    except (GateRefused, ConflictError, InputError) as error:
        append(workspace.settings.home, AuditLine(login(), TAKE_OVER, subject, "refused", str(error)))
        now = _standing(workspace, read_state(workspace.ledger), version)
        show(registry_of(workspace), version, now, answer=f"{_time()}: {error}")
        raise


def _take_word(workspace: Workspace, version: Version, word: UiWord, subject: str, start: Start) -> Decided:
    policy = workspace.settings.access.approve_in_mlflow
    if not (workspace.settings.profile == "local" if policy is None else policy):
        raise InputError(
            f"{word.text!r} in MLflow counts for nothing here (access.approve_in_mlflow is off).",
            hint="Use `sluice approve` or `sluice reject`.",
        )
    if word.state is None:
        raise InputError(f"approval = {word.text!r} is neither approved nor rejected.", hint="Set it again.")
    require(workspace.settings, TAKE_OVER, subject)
    reason = f"{word.reason} ({NOT_AUTHENTICATED})".strip()
    return record(workspace, version, word.state, word.approver, reason, start, account="")


def _catch_up(
    workspace: Workspace, state: ReleaseState, version: Version, standing: Standing, start: Start
) -> Decided | None:
    """Show what the ledger holds. An approval from MLflow that is not shown yet may not have started its release
    either: whoever took it over was killed in between. (One given by a command is that command's to finish.)"""
    decided, answer = None, ""
    approval = state.approval_for(version.digest)
    if standing.word == APPROVED and approval and not approval.account and not is_shown(version, standing):
        require(workspace.settings, TAKE_OVER, f"version {version.number}: its release")
        try:
            decided = _released_by(workspace, state, version, standing, start)
        except GateRefused as error:
            answer = f"{_time()}: {error}"
    show(registry_of(workspace), version, standing, answer)
    return decided


def _released_by(
    workspace: Workspace, state: ReleaseState, version: Version, standing: Standing, start: Start
) -> Decided:
    """Start the release of a complete approval, if the ledger lets it. Raises `GateRefused`."""
    allow = workspace.settings.release.allow_override
    authorize(workspace.ledger, version.digest, allow_override=allow)
    decision, approval = state.decision_for(version.digest), state.approval_for(version.digest)
    overridden = decision is not None and decision.verdict == "overridden"
    key = approval.entry.digest if approval else ""
    decided = Decided(version, APPROVED, standing.by, overridden, standing.sentence, key)
    start(decided)
    return decided


def _seen(workspace: Workspace, version: Version) -> str | None:
    """The ledger entry of the decision that the version's page shows; nobody approves what they could not read.

    Raises `ConflictError` when it is not the latest.
    """
    latest = read_state(workspace.ledger).decision_for(version.digest)
    if latest is None:
        return None
    shown = version.tags.get("decision")
    report = json.loads(workspace.file(shown, "decision.json")).get("report") if shown else None
    if report != latest.report:
        raise ConflictError(
            f"The page of version {version.number} does not show the gate's latest decision, {latest.verdict} at "
            f"{latest.entry.time}.",
            hint="Read that one on its page (its run registers it there), and decide again.",
        )
    return latest.entry.digest


def _released(workspace: Workspace, only: int | None) -> list[Version]:
    """The versions that people approve, newest first."""
    registry, application = registry_of(workspace), workspace.settings.application
    found = list_versions(registry, application) if only is None else [get_version(registry, application, only)]
    return [version for version in found if version.tags.get("kind") in RELEASED and version.digest]


def _standing(workspace: Workspace, state: ReleaseState, version: Version) -> Standing:
    allow = workspace.settings.release.allow_override
    return standing_of(state, version.digest, datetime.now(UTC), allow_override=allow)


def _time() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
