"""A rollout through the real Envoy with traffic, and small stand-in servers behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from sluice.serving.access_log import AccessLog
from sluice.serving.analysis import AnalysisResult, Verdict
from sluice.serving.control import Order
from sluice.serving.controller_lease import FileLease
from sluice.serving.gateway_samples import GatewaySamples, ShadowSamples
from sluice.serving.policy import Minimum, RolloutPolicy, ShadowPolicy, default_policy
from sluice.serving.probes import ProbeCheck, ProbeReport
from sluice.serving.rollout import Rollout
from sluice.serving.rollout_store import FileRolloutStore
from sluice.serving.routes import RouteState, Target
from tests.serving.gateway import Gateway, running_gateway
from tests.serving.samples import target
from tests.serving.upstream import upstream

pytestmark = pytest.mark.integration


@dataclass
class Recorded:
    """A ledger of lines."""

    lines: list[str] = field(default_factory=list)

    def step(
        self,
        release: str,
        step: int,
        weight: int,
        verdict: Verdict,
        analysis: AnalysisResult | None,
        ordered: Order | None = None,
    ) -> None:
        self.lines.append(f"{weight} {verdict}")

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        self.lines.append(f"failure {reason}")

    def withdrawal(self, release: str, stable: str, reason: str) -> None:
        self.lines.append(f"withdrawal {reason}")


@contextmanager
def traffic(gateway: Gateway, workers: int = 6) -> Iterator[list[tuple[str, int]]]:
    """Users that ask all the time, each question in a session of its own; (release, status) of every answer."""
    answers: list[tuple[str, int]] = []
    stop = threading.Event()

    def ask(worker: int) -> None:
        with httpx.Client(base_url=gateway.settings.url, timeout=10, trust_env=False) as client:
            number = 0
            while not stop.is_set():
                number += 1
                body = {"model": "app", "messages": [], "stream": True}
                headers = {"x-session-id": f"{worker}-{number}"}
                got = client.post("/v1/chat/completions", json=body, headers=headers)
                answers.append((got.headers.get("x-sluice-release", ""), got.status_code))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


SHADOW = ShadowPolicy(percent=100, requests=6, maximum_time_s=20)


def quick(policy: RolloutPolicy) -> RolloutPolicy:
    steps = tuple(
        step.model_copy(
            update={
                "minimum": Minimum(requests=step.minimum.requests, feedback=0),
                "minimum_time_s": 0.2,
                "maximum_time_s": 20,
            }
        )
        for step in policy.steps
    )
    # What comes through the traces is not there: this is about the gateway's own figures.
    metrics = {name: policy.analysis.metrics[name] for name in ("error_rate", "time_to_first_token")}
    changed = {"steps": steps, "shadow": SHADOW, "bake_s": 0.5, "check_interval_s": 0.2}
    return policy.model_copy(update={**changed, "analysis": policy.analysis.model_copy(update={"metrics": metrics})})


def rollout(
    gateway: Gateway, canary: Target, folder: Path, recorded: Recorded, *, probed: Callable[[], None] = lambda: None
) -> Rollout:
    log = AccessLog(gateway.settings.access_log)

    def probe() -> ProbeReport:
        probed()
        return ProbeReport(canary.served_name, (ProbeCheck("answers", True, "It answers."),))

    return Rollout(
        canary,
        policy=quick(default_policy()),
        router=gateway.router,
        store=FileRolloutStore(folder),
        lease=FileLease(folder, canary.served_name),
        source=GatewaySamples(log, gateway.router),
        shadow=ShadowSamples(log, gateway.router),
        recorder=recorded,
        authorize=lambda: None,
        probe=probe,
        confirm=lambda routes: gateway.router.confirm_traffic(routes, within_s=2),
    )


def test_a_good_release_is_promoted_and_bad_ones_are_out_within_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "rollouts"
    with (
        upstream() as first,
        upstream() as second,
        running_gateway(tmp_path / "gateway", target("a", first.port)) as gateway,
    ):
        good, bad, late = target("c", second.port), target("d", first.port), target("e", first.port)
        recorded = Recorded()
        with traffic(gateway) as answers:
            run = rollout(gateway, good, folder, recorded)
            assert run.run().verdict == "promote", recorded.lines
            run.finish()
            assert gateway.router.state() == RouteState(good)
            assert {status for _, status in answers} == {200}

            # Broken from the beginning: seen in the shadow, by nobody else.
            first.modes[bad.served_name] = "fail"
            result = rollout(gateway, bad, folder, recorded).run()
            assert result.verdict == "failed"
            assert {event.weight for event in result.events} == {0}
            assert {status for _, status in answers} == {200}

            # Broken once it has users: out within two seconds of the evidence.
            def breaks() -> None:
                while gateway.router.state().weight == 0:
                    time.sleep(0.01)
                first.modes[late.served_name] = "fail"

            breaker = threading.Thread(target=breaks)
            result = rollout(gateway, late, folder, recorded, probed=breaker.start).run()
            breaker.join()
            after = len(answers)
            time.sleep(0.5)
        assert result.verdict == "failed"
        back = next(event for event in result.events if event.kind == "rollback")
        assert back.analysis is not None
        assert len(back.analysis.convicting) >= 5
        assert back.time - sorted(one.known for one in back.analysis.convicting)[4] < 2
        seen = next(event.sentence for event in result.events if event.kind == "note" and event.time > back.time)
        assert "none elsewhere" in seen
        assert recorded.lines[-1].startswith("failure")
        # Stable's users never noticed, and nobody met the bad release after the rollback.
        assert {status for release, status in answers if release == good.release} == {200}
        assert any(status != 200 for _, status in answers)
        assert {status for _, status in answers[after:]} == {200}
        assert [line for line in recorded.lines if line.startswith("50")] == ["50 inconclusive", "50 pass"]
