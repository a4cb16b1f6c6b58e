"""One real vLLM with real adapters, brought up beside each other behind the real Envoy, and what the training library
says to the same prompts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from sluice.infra.errors import ConflictError, UnavailableError
from sluice.infra.health import probe
from sluice.serving.adapters import AdapterShelf, load_adapter, unload_adapter
from sluice.serving.parity import ReferenceAnswer
from sluice.serving.policy import default_policy
from sluice.serving.probes import ProbeReport, Served, probe_gateway, run_probes
from sluice.serving.routes import RouteState, Target
from sluice.serving.slots import server_slots
from sluice.serving.vllm import VllmClient, VllmSettings, vllm_service
from sluice.training.parity_reference import make_reference
from tests.serving.gateway import free_port, running_gateway
from tests.serving.samples import digest
from tests.serving.tiny_llama import HIDDEN, write_adapter, write_tiny_llama
from tests.serving.vllm_server import digests_of

pytestmark = pytest.mark.integration

SERVE_PYTHON = Path(os.environ.get("SLUICE_SERVE_PYTHON", ".venv-serve/bin/python")).absolute()
MESSAGES = [{"role": "user", "content": "hi"}]


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
        until = time.monotonic() + 300
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
                routed_there = probe_gateway(
                    users, client, application="app", candidate=acts, release=canary.release,
                    headers=headers, policy=policy,
                )  # fmt: skip
                assert routed_there.passed, routed_there.sentence
                routed = {f"s{n}": users.ask("app", MESSAGES, max_tokens=4, headers={"x-session-id": f"s{n}"})[1]
                          for n in range(4)}  # fmt: skip
            assert {found["x-sluice-release"] for found in routed.values()} == {stable.release}
            unload_adapter((client,), shelf, nothing)
            assert {model.name for model in client.models()} == {base, earlier, acts}
            client.wait_idle(timeout_s=5)
        assert set(shelf.names()) == {earlier, acts}
        assert not shelf.path(nothing).exists()
