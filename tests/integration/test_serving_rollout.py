"""A rollout through the real Envoy with traffic, and one real vLLM with real adapters behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.health import probe
from sluice.serving.access_log import AccessLog, GatewaySamples
from sluice.serving.adapters import AdapterShelf, load_adapter, unload_adapter
from sluice.serving.analysis import AnalysisResult, Minimum, Verdict
from sluice.serving.parity import ReferenceAnswer
from sluice.serving.policy import RolloutPolicy, default_policy
from sluice.serving.probes import ProbeCheck, ProbeReport, Served, probe_gateway, run_probes
from sluice.serving.rollout import Rollout
from sluice.serving.rollout_state import FileRolloutStore
from sluice.serving.routes import RouteState, Target
from sluice.serving.slots import server_slots
from sluice.serving.vllm import VllmClient, VllmSettings, vllm_service
from sluice.training.parity_reference import make_reference
from tests.serving.gateway import Gateway, free_port, running_gateway
from tests.serving.samples import digest, target
from tests.serving.tiny_llama import HIDDEN, write_adapter, write_tiny_llama
from tests.serving.upstream import upstream
from tests.serving.vllm_server import digests_of

pytestmark = pytest.mark.integration

SERVE_PYTHON = Path(os.environ.get("SLUICE_SERVE_PYTHON", ".venv-serve/bin/python")).absolute()


@dataclass
class Recorded:
    """A ledger of lines."""

    lines: list[str] = field(default_factory=list)

    def step(self, release: str, step: int, weight: int, verdict: Verdict, analysis: AnalysisResult | None) -> None:
        self.lines.append(f"{weight} {verdict}")

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        self.lines.append(f"failure {reason}")


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
    return policy.model_copy(update={"steps": steps, "bake_s": 0.5, "check_interval_s": 0.2})


def rollout(gateway: Gateway, canary: Target, folder: Path, recorded: Recorded) -> Rollout:
    return Rollout(
        canary,
        policy=quick(default_policy()),
        router=gateway.router,
        store=FileRolloutStore(folder),
        source=GatewaySamples(AccessLog(gateway.settings.access_log), lambda *_: (0, 0)),
        recorder=recorded,
        authorize=lambda: None,
        probe=lambda: ProbeReport(canary.served_name, (ProbeCheck("answers", True, "It answers."),)),
    )


def test_a_good_release_is_promoted_and_a_bad_one_is_out_within_seconds(tmp_path: Path) -> None:
    with (
        upstream() as first,
        upstream() as second,
        running_gateway(tmp_path / "gateway", target("a", first.port)) as gateway,
    ):
        good, bad = target("c", second.port), target("d", first.port)
        recorded = Recorded()
        with traffic(gateway) as answers:
            run = rollout(gateway, good, tmp_path / "rollouts", recorded)
            assert run.run().verdict == "promote", recorded.lines
            run.finish()
            assert gateway.router.state() == RouteState(good)
            assert {status for _, status in answers} == {200}

            first.modes[bad.served_name] = "fail"
            begun, before = time.monotonic(), len(answers)
            result = rollout(gateway, bad, tmp_path / "rollouts", recorded).run()
            took = time.monotonic() - begun
            time.sleep(0.3)
            after = len(answers)
            time.sleep(0.5)
        assert result.verdict == "failed"
        assert "failed or broken answers" in result.sentence.lower()
        assert took < 15
        assert recorded.lines[-1].startswith("failure")
        # Stable's users never noticed, and nobody met the bad release after the rollback.
        during = answers[before:]
        assert {status for release, status in during if release == good.release} == {200}
        assert any(status != 200 for _, status in during)
        assert {status for _, status in answers[after:]} == {200}
        assert [line for line in recorded.lines if line.startswith("100")] == ["100 inconclusive", "100 pass"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, an adapter that acts and one that does nothing."""
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_llama(folder / "base")
    for name, scale in (("acts", 0.5), ("acts-too", 0.8), ("nothing", 0.0)):
        write_adapter(folder / name, scale=scale, seed=len(name))
    write_adapter(folder / "wide", scale=0.5, seed=1, hidden=2 * HIDDEN)
    return folder


@contextmanager
def running_vllm(settings: VllmSettings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    spec = vllm_service(settings)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            spec.command, env={**os.environ, **spec.environment}, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        until = time.monotonic() + 240
        while probe(spec.health) is not None:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        yield process
    finally:
        with_group = process.pid
        for name in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(with_group, name)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@pytest.mark.skipif(not SERVE_PYTHON.exists(), reason=f"no vLLM environment at {SERVE_PYTHON} (make setup)")
def test_real_adapters_behind_the_real_gateway(tmp_path: Path, weights: Path) -> None:
    policy = default_policy().probes.model_copy(update={"max_tokens": 8, "at_once": 2})
    base, acts, nothing, earlier, wide = ("app-" + letter * 12 for letter in "bacde")
    shelf = AdapterShelf(tmp_path / "shelf")
    settings = VllmSettings(
        SERVE_PYTHON, weights / "base", base, shelf, free_port(), dtype="float32", max_model_len=128, max_loras=3
    )
    upstream_address = f"127.0.0.1:{settings.port}"
    stable = Target(digest("b"), digest("b"), base, (upstream_address,))
    canary = Target(digest("a"), digest("a"), acts, (upstream_address,))
    # What the shelf remembers is there after a start, as it must be after a crash.
    shelf.place(earlier, weights / "acts-too", digests_of(weights / "acts-too"))
    shelf.remember(earlier)
    with (
        ThreadPoolExecutor(8) as pool,
        VllmClient(settings.url) as client,
        running_gateway(tmp_path / "gateway", stable) as gateway,
    ):
        assert not client.healthy()
        # The training library is asked while the server starts.
        asked = pool.submit(make_reference, weights / "base", weights / "acts", policy.prompts, policy.max_tokens)
        with running_vllm(settings, tmp_path / "vllm.log"):
            assert {model.name for model in client.models()} == {base, earlier}
            assert client.adapter_slots() is None
            before = Served(client, base).answers(policy)
            assert server_slots(client, {earlier: "stable"}, total=9).free == 2
            for name, source in ((acts, "acts"), (nothing, "nothing")):
                for _ in range(2):
                    load_adapter((client,), shelf, name, weights / source, digests_of(weights / source))
            reference = [ReferenceAnswer.from_json(one) for one in asked.result()]

            def probed(name: str, stable: str) -> ProbeReport:
                return run_probes(
                    [Served(client, name)] * 2,
                    stable=Served(client, stable),
                    bases=[Served(client, base)],
                    policy=policy,
                    reference=reference,
                    parity_within=policy.parity_within.float32,
                    before=[before],
                )

            report = probed(acts, earlier)
            assert report.passed, report.text
            parity = next(check for check in report.checks if check.name == "parity")
            assert parity.figures["tokens"] >= 3 * 8 - 2 * 8 * parity.figures["ties"]
            # The wrong adapter under a right name, and one that does nothing: both answer with 200.
            assert {check.name for check in probed(earlier, base).checks if not check.passed} == {"parity"}
            dead = {check.name for check in probed(nothing, earlier).checks if not check.passed}
            assert dead == {"parity", "effect"}
            with pytest.raises(ConflictError, match="already"):
                client.load_adapter(acts, shelf.path(nothing))
            # What vLLM itself says to an adapter of another base model: the answer is an error, and it holds no slot.
            with pytest.raises(UnavailableError, match="refused the adapter"):
                load_adapter((client,), shelf, wide, weights / "wide", digests_of(weights / "wide"))
            full = server_slots(client, {}, total=9)
            assert (full.total, full.free) == (3, 0)

            # Every slot is taken: questions to the base model in one batch with an adapter's keep their answers.
            mixed = list(pool.map(lambda n: Served(client, (base, acts)[n % 2]).answers(policy), range(8)))
            alone = Served(client, acts).answers(policy)
            assert all([a.text for a in found] == [b.text for b in before] for found in mixed[::2])
            assert all([a.text for a in found] == [b.text for b in alone] for found in mixed[1::2])

            gateway.router.apply(RouteState(stable, canary, 0))
            with VllmClient(gateway.settings.url) as users:
                headers = gateway.router.probe_headers("canary")
                parity = probe_gateway(
                    users, client, application="app", candidate=acts, release=canary.release,
                    headers=headers, policy=policy,
                )  # fmt: skip
                assert parity.passed, parity.sentence
                routed = {f"s{n}": users.ask("app", MESSAGES, max_tokens=4, headers={"x-session-id": f"s{n}"})[1]
                          for n in range(4)}  # fmt: skip
            assert {found["x-sluice-release"] for found in routed.values()} == {stable.release}
            unload_adapter((client,), shelf, nothing)
            assert {model.name for model in client.models()} == {base, earlier, acts}
            client.wait_idle(timeout_s=5)
        assert set(shelf.names()) == {earlier, acts}
        assert not shelf.path(nothing).exists()


MESSAGES = [{"role": "user", "content": "hi"}]
