"""A rollout wired to this installation: the gateway, its log, the users' feedback, the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sluice.components.aliases import follow_ledger
from sluice.components.bring_up import kept_probes
from sluice.components.served import gateway_settings, release_name, router, server_url, target
from sluice.components.workspace import Workspace
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import canonical_json
from sluice.provenance.releases import authorize, record_failure, record_rollback, record_rollout_step
from sluice.serving.access_log import AccessLog
from sluice.serving.analysis import AnalysisResult, Verdict
from sluice.serving.gateway_samples import GatewaySamples
from sluice.serving.policy import RolloutPolicy, default_policy, load_policy
from sluice.serving.probes import ProbeReport, probe_gateway
from sluice.serving.rollout import Rollout
from sluice.serving.rollout_state import FileRolloutStore
from sluice.serving.vllm import VllmClient

ACTOR = "release"


class LedgerRecorder:
    """Writes a rollout's facts into the ledger; an analysis is an artifact, so that anybody can look at it again."""

    def __init__(self, workspace: Workspace, *, allow_override: bool) -> None:
        self._workspace = workspace
        self._allow_override = allow_override
        self._shown = False

    def step(self, release: str, step: int, weight: int, verdict: Verdict, analysis: AnalysisResult | None) -> None:
        """A step began (`pending` in the ledger) or ended."""
        record_rollout_step(
            self._workspace.ledger,
            release=release,
            step=step,
            weight=weight,
            verdict=verdict if analysis is not None else "pending",
            analysis=self._keep(analysis),
            actor=ACTOR,
            allow_override=self._allow_override,
        )
        if not self._shown:
            # Its first users: MLflow shows it as the challenger. Once a process, not at every step.
            self._shown = True
            follow_ledger(self._workspace)

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        """The release failed and everybody is back on stable."""
        record_failure(self._workspace.ledger, release=release, reason=reason, actor=ACTOR)
        record_rollback(self._workspace.ledger, release=release, to=stable, reason=reason, actor=ACTOR)

    def _keep(self, analysis: AnalysisResult | None) -> str | None:
        if analysis is None:
            return None
        files = {"analysis.json": canonical_json(analysis.to_json())}
        return self._workspace.artifacts.put_files(files, "analysis").digest


class TraceFeedback:
    """Thumbs on a release's answers, from the trace store."""

    def __init__(self, workspace: Workspace) -> None:
        from sluice.curation.trace_store import open_trace_store

        self._store = open_trace_store(workspace.settings)

    def counts(self, release: str, since: float, until: float) -> tuple[int, int]:
        """(up, down) on answers given in [since, until), epoch seconds."""
        found = self._store.feedback_counts(release, int(since * 1000), int(until * 1000))
        return found.up, found.down


def find_policy(name: str) -> RolloutPolicy:
    """`default`, or the policy in a file."""
    return default_policy() if name == "default" else load_policy(Path(name))


def rollout_store(workspace: Workspace) -> FileRolloutStore:
    """Where this installation keeps the state of its rollouts."""
    return FileRolloutStore(workspace.settings.home / "rollouts")


def open_rollout(
    workspace: Workspace, release: str, *, policy: str, allow_override: bool, report: Report = no_report
) -> Rollout:
    """The rollout of `release`; `run` starts it or goes on with it."""
    settings = workspace.settings
    chosen = find_policy(policy)
    override = allow_override and settings.release.allow_override
    return Rollout(
        target(settings, release),
        policy=chosen,
        router=router(settings),
        store=rollout_store(workspace),
        source=GatewaySamples(AccessLog(gateway_settings(settings).access_log), router(settings)),
        recorder=LedgerRecorder(workspace, allow_override=override),
        authorize=lambda: _authorize(workspace, release, override),
        probe=_gateway_probe(workspace, release, chosen),
        report=report,
    )


def _authorize(workspace: Workspace, release: str, allow_override: bool) -> None:
    authorize(workspace.ledger, release, allow_override=allow_override)


def _gateway_probe(workspace: Workspace, release: str, policy: RolloutPolicy) -> Callable[[], ProbeReport]:
    def probe() -> ProbeReport:
        settings = workspace.settings
        assert settings.serving.gateway_url is not None
        gateway = probe_gateway(
            VllmClient(settings.serving.gateway_url),
            VllmClient(server_url(settings, release)),
            application=settings.application,
            candidate=release_name(settings, release),
            release=release,
            headers=router(settings).probe_headers("canary"),
            policy=policy.probes,
        )
        earlier = kept_probes(workspace, release)
        return ProbeReport(gateway.served_name, (*(earlier.checks if earlier else ()), *gateway.checks))

    return probe
