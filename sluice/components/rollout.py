"""A rollout wired to this installation: the gateway, its log, the traces, the ledger, and who wants to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sluice.components.aliases import follow_ledger
from sluice.components.bring_up import kept_probes
from sluice.components.cluster_routes import cluster_lease
from sluice.components.live_answers import LiveAnswers, Prices
from sluice.components.rollback import tell_ledger
from sluice.components.rollout_facts import open_events, store_of
from sluice.components.served import gateway_settings, local_router, release_name, router, server_url, target
from sluice.components.workspace import Workspace
from sluice.curation.trace_store import open_trace_store
from sluice.infra.errors import ConflictError
from sluice.infra.progress import Report, no_report
from sluice.infra.settings import Settings
from sluice.provenance.canonical import canonical_json
from sluice.provenance.releases import authorize, record_rollback, record_rollout_step
from sluice.serving.access_log import AccessLog
from sluice.serving.analysis import AnalysisResult, Verdict
from sluice.serving.control import Order
from sluice.serving.controller_lease import ControllerLease, FileLease
from sluice.serving.errand import Errand
from sluice.serving.gateway_samples import GatewaySamples, ShadowSamples
from sluice.serving.policy import RolloutPolicy, default_policy, load_policy
from sluice.serving.probes import ProbeReport, probe_gateway
from sluice.serving.retreat import CONFIRM_S
from sluice.serving.rollout import Rollout
from sluice.serving.rollout_store import FileRolloutStore
from sluice.serving.sources import BothSources
from sluice.serving.vllm import VllmClient

ACTOR = "release"


class LedgerRecorder:
    """`Recorder` over the ledger; an analysis is an artifact, so that anybody can look at it again.

    Called from threads that nobody waits for: what it writes once is written already when it is called again.
    """

    def __init__(self, workspace: Workspace, *, allow_override: bool) -> None:
        self._workspace = workspace
        self._allow_override = allow_override
        self._shown: Errand[list[str]] | None = None

    def step(
        self,
        release: str,
        step: int,
        weight: int,
        verdict: Verdict,
        analysis: AnalysisResult | None,
        ordered: Order | None = None,
    ) -> None:
        record_rollout_step(
            self._workspace.ledger,
            release=release,
            step=step,
            weight=weight,
            verdict=verdict if analysis is not None else "pending",
            analysis=self._keep(analysis),
            actor=ACTOR,
            ordered_by=ordered.actor if ordered else "",
            reason=ordered.reason if ordered else "",
            allow_override=self._allow_override,
        )
        if self._shown is None:
            # Its first users: MLflow shows it as the challenger, when it answers; no step waits for that.
            self._shown = Errand(lambda: follow_ledger(self._workspace))

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        tell_ledger(
            self._workspace, gone=release, now=stable, reason=reason, actor=ACTOR, analysis=self._keep(analysis)
        )

    def withdrawal(self, release: str, stable: str, reason: str) -> None:
        # Where the ledger's champion is another one by now, the release has lost its leave by that alone.
        with suppress(ConflictError):
            record_rollback(self._workspace.ledger, release=release, to=stable, reason=reason, actor=ACTOR)

    def _keep(self, analysis: AnalysisResult | None) -> str | None:
        if analysis is None:
            return None
        files = {"analysis.json": canonical_json(analysis.to_json())}
        return self._workspace.artifacts.put_files(files, "analysis").digest


def find_policy(name: str) -> RolloutPolicy:
    """`default`, or the policy in a file."""
    return default_policy() if name == "default" else load_policy(Path(name))


def rollout_store(workspace: Workspace) -> FileRolloutStore:
    """Where this installation keeps the state of its rollouts."""
    return store_of(workspace.settings)


@contextmanager
def open_rollout(
    workspace: Workspace, release: str, *, policy: str, allow_override: bool, report: Report = no_report
) -> Iterator[Rollout]:
    """The rollout of `release`; `run` starts it or goes on with it. What it reads and tells is closed afterwards."""
    settings = workspace.settings
    chosen = find_policy(policy)
    override = allow_override and settings.release.allow_override
    envoy = local_router(settings)
    log = AccessLog(gateway_settings(settings).access_log)
    prices = Prices(settings.serving.input_price, settings.serving.output_price)
    answers = LiveAnswers(open_trace_store(settings), judge=settings.traces.judge_score, prices=prices)
    events = open_events(settings)
    rollout = Rollout(
        target(settings, release),
        policy=chosen,
        router=router(settings),
        store=rollout_store(workspace),
        lease=_lease(settings, f"the rollout of {release_name(settings, release)}"),
        source=BothSources(GatewaySamples(log, envoy), answers),
        shadow=ShadowSamples(log, envoy),
        recorder=LedgerRecorder(workspace, allow_override=override),
        authorize=lambda: _authorize(workspace, release, override),
        probe=_gateway_probe(workspace, release, chosen),
        confirm=lambda routes: envoy.confirm_traffic(routes, within_s=CONFIRM_S),
        sinks=(events,) if events else (),
        report=report,
    )
    try:
        yield rollout
    finally:
        answers.close()
        if events:
            events.close()


def _lease(settings: Settings, holder: str) -> ControllerLease:
    if settings.profile == "local":
        return FileLease(settings.home / "rollouts", holder)
    return cluster_lease(settings, holder)


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
