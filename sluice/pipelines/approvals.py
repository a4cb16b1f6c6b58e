"""Approval: a person's word about a candidate, given in MLflow or on the command line, kept in the ledger.

MLflow is where people look and click; the ledger is what counts. Both ways end in `record`, and an approval starts the
release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sluice.components.aliases import follow_ledger
from sluice.components.workspace import Workspace
from sluice.infra.access import require
from sluice.infra.errors import AccessRefused, ConflictError, GateRefused, InputError
from sluice.provenance.canonical import short
from sluice.provenance.releases import read_state, record_approval, record_decision, record_rejection
from sluice.registry.approvals import mark, pending_approvals, read_ui_approval
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.versions import Version, get_version

State = Literal["approved", "rejected"]
NOT_AUTHENTICATED = "given in MLflow, where nobody checks the name"


@dataclass(frozen=True)
class Decided:
    """A version that somebody decided on, and whether its release may start under an override."""

    version: Version
    state: State
    approver: str
    overridden: bool


def registry_of(workspace: Workspace) -> MlflowRegistry:
    """MLflow, as the settings name it."""
    return MlflowRegistry(workspace.settings.mlflow.tracking_uri)


def find_candidate(workspace: Workspace, text: str) -> Version:
    """The version that a number, or `candidate` for the newest that waits, names."""
    registry = registry_of(workspace)
    if text == "candidate":
        waiting = pending_approvals(registry, workspace.settings.application)
        if not waiting:
            raise InputError("VERSION = 'candidate': no version waits.", hint="`sluice approvals` lists what there is.")
        return waiting[0]
    if not text.isdigit():
        raise InputError(
            f"VERSION = {text!r} is not a number.", hint="Use the version's number in MLflow, or `candidate`."
        )
    return get_version(registry, workspace.settings.application, int(text))


def record(
    workspace: Workspace,
    version: Version,
    state: State,
    approver: str,
    comment: str,
    start: Callable[[Decided], object] = lambda _: None,
) -> Decided:
    """Write a decision on a version into the ledger, `start` what follows from it, then show it in MLflow.

    MLflow comes last: killed before that, the version still waits, and doing it again does the rest. Raises
    `GateRefused`.
    """
    if state == "approved":
        override = workspace.settings.release.allow_override
        record_approval(
            workspace.ledger, adapter=version.digest, approver=approver, comment=comment, allow_override=override
        )
    else:
        record_rejection(workspace.ledger, adapter=version.digest, approver=approver, comment=comment)
    decision = read_state(workspace.ledger).decision_for(version.digest)
    decided = Decided(version, state, approver, decision is not None and decision.verdict == "overridden")
    start(decided)
    mark(registry_of(workspace), version, state, approver, comment)
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
        actor=person,
        person=person,
        reason=reason,
        allow_override=True,
    )


def take_over(
    workspace: Workspace, start: Callable[[Decided], object] = lambda _: None
) -> tuple[list[Decided], list[str]]:
    """Decisions that people made in the MLflow UI and that the ledger did not know, now recorded, with what `start`
    makes follow; and a sentence for each that cannot be recorded (an expired decision, a mistyped tag): one of those
    must not hold up the others.

    MLflow does not say who set a tag, so the name in it is anybody's claim; the ledger's comment says so, and the audit
    log has who took it over. `access.approve_in_mlflow` = false takes nothing over.
    """
    registry = registry_of(workspace)
    policy = workspace.settings.access.approve_in_mlflow
    open_ = workspace.settings.profile == "local" if policy is None else policy
    taken, problems = [], []
    for version in pending_approvals(registry, workspace.settings.application):
        try:
            found = read_ui_approval(registry, version)
            if found is not None and not found.recorded and not open_:
                problems.append(
                    f"Version {version.number} is {found.state} in MLflow, which counts for nothing here "
                    "(access.approve_in_mlflow is off): use `sluice approve` or `sluice reject`."
                )
            elif found is not None and not found.recorded:
                require(workspace.settings, "take over from MLflow", f"version {version.number} {found.state}")
                comment = f"{found.comment} ({NOT_AUTHENTICATED})".strip()
                taken.append(record(workspace, version, found.state, found.approver, comment, start))
        except (AccessRefused, GateRefused, ConflictError, InputError) as error:
            problems.append(f"Version {version.number}: {error}")
    return taken, problems
