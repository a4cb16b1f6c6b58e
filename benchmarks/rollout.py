"""Fifty streaming clients through the real gateway and a real vLLM while the weights change two hundred times.

    .venv/bin/python benchmarks/rollout.py [--clients 50] [--changes 200] [--out FILE.json]

One vLLM (float32, a random Llama of two layers) holds two adapters; Envoy splits the sessions between them. Every
answer is compared with the greedy answer that its release, named in the response header, gives when it is asked alone:
an answer that is the other release's is a wrong adapter, one that is neither's is mixed. A stream fails when its status
is not 200 or it does not end with [DONE].

Then the gateway's own cost: the same requests one by one, in turn directly and through the gateway, to a stand-in that
answers at once, and to vLLM. What counts are differences: both were measured in the same run on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import numpy as np

from sluice.infra.health import probe
from sluice.infra.settings import load_settings
from sluice.serving.adapters import AdapterShelf, load_adapter
from sluice.serving.envoy_routes import RELEASE_HEADER, SESSION_HEADER
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import RouteState, Target
from sluice.serving.vllm import VllmClient, VllmSettings, vllm_service
from sluice.statistics.bounded import rate_interval
from tests.serving.gateway import free_port, running_gateway
from tests.serving.samples import digest
from tests.serving.tiny_llama import write_adapter, write_tiny_llama
from tests.serving.vllm_server import digests_of

WEIGHTS = (0, 1, 5, 10, 25, 50, 75, 90, 99, 100)
QUESTIONS = tuple(f"Question {number}: what is a building permit of kind {number}?" for number in range(12))
REQUESTS_A_SESSION = 4
SETTLE_S = 0.25
"""A new weight is applied at most this often."""


@dataclass(frozen=True)
class Asked:
    """One answer. `begun` and `headers_at` (monotonic seconds) bound the moment at which a release was chosen."""

    session: str
    first: bool
    question: int
    release: str
    text: str
    fine: bool
    begun: float
    headers_at: float
    problem: str = ""


@dataclass
class Weights:
    """Every weight, when it was about to be asked for (`asked`), and when the gateway had confirmed it (`there`)."""

    asked: list[float] = field(default_factory=list)
    there: list[float] = field(default_factory=list)
    weight: list[int] = field(default_factory=list)

    def possible(self, since: float, until: float) -> tuple[int, int]:
        """Smallest and largest weight that a request may have met between the two moments."""
        # A weight is possible from when it was asked for until the next one was confirmed.
        ends = [*self.there[1:], float("inf")]
        met = [
            w for w, begin, end in zip(self.weight, self.asked, ends, strict=True) if begin <= until and end >= since
        ]
        return min(met), max(met)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--requests", type=int, default=1000, help="of each side, for the gateway's own cost")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rollout.json"))
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), given)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before",
        **result,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Everything, with the servers started below `work`."""
    write_tiny_llama(work / "base")
    shelf = AdapterShelf(work / "shelf")
    names = {digest(letter): f"app-{letter * 12}" for letter in "ac"}
    settings = VllmSettings(
        load_settings().serve_python, work / "base", "app-base", shelf, free_port(), dtype="float32",
        max_model_len=256, max_loras=2,
    )  # fmt: skip
    address = (f"127.0.0.1:{settings.port}",)
    stable, canary = (Target(release, release, name, address) for release, name in names.items())
    with running_vllm(settings, work / "vllm.log"), VllmClient(settings.url) as client:
        for seed, name in enumerate(names.values(), start=1):
            write_adapter(work / name, scale=0.5, seed=seed)
            load_adapter((client,), shelf, name, work / name, digests_of(work / name))
        known = {
            (release, number): _text(_ask(settings.url, name, question, given.tokens))
            for release, name in names.items()
            for number, question in enumerate(QUESTIONS)
        }
        clashes = [n for n in range(len(QUESTIONS)) if known[stable.release, n] == known[canary.release, n]]
        assert not clashes, f"both releases answer questions {clashes} alike: nothing could be told apart"
        with running_gateway(work / "gateway", stable, requests_per_s=0) as gateway:
            streams = asyncio.run(streamed(gateway.settings.url, gateway.router, stable, canary, known, given))
            gateway.router.apply(RouteState(stable))
            ask = (
                lambda http: _stream(http, stable.served_name, given.tokens),
                lambda http: _stream(http, "app", given.tokens),
            )
            vllm = cost(settings.url, gateway.settings.url, ask, max(1, given.requests // 5))
    with at_once() as port, running_gateway(work / "second", _target("e", port), requests_per_s=0) as gateway:
        stand_in = cost(f"http://127.0.0.1:{port}", gateway.settings.url, (_plain, _plain), given.requests)
        many = many_sessions(
            gateway.settings.url, gateway.router, (_target("e", port), _target("f", port)), given.requests
        )
    return {"streams": streams, "split_of_many_sessions": many, "gateway_cost_ms": {"stand_in": stand_in, "vllm": vllm}}


def many_sessions(url: str, router: EnvoyRouter, targets: tuple[Target, Target], sessions: int) -> list[dict[str, Any]]:
    """The canary's share of new sessions at the weights of a rollout, one short request each."""
    counts: dict[int, list[bool]] = {}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for weight in (1, 5, 25, 50):
            router.apply(RouteState(*targets, weight))
            counts[weight] = [_released(http, f"{weight}-{number}") == targets[1].release for number in range(sessions)]
    return shares(counts)


async def streamed(
    url: str, router: EnvoyRouter, stable: Target, canary: Target, known: dict[tuple[str, int], str],
    given: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """The clients, and beside them the changes of the weight."""
    weights, done = Weights(), threading.Event()
    chooser = random.Random(0)

    def change() -> None:
        try:
            for number in range(given.changes + 1):
                weight = chooser.choice([w for w in WEIGHTS if not weights.weight or w != weights.weight[-1]])
                weights.asked.append(time.monotonic())
                weights.weight.append(weight if number else 0)
                router.apply(RouteState(stable, canary, weights.weight[-1]))
                weights.there.append(time.monotonic())
                time.sleep(SETTLE_S)
        finally:
            done.set()

    changing = threading.Thread(target=change)
    changing.start()
    while not weights.there and not done.is_set():
        await asyncio.sleep(0.05)
    begun = time.monotonic()
    limits = httpx.Limits(max_connections=given.clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as http:
        found = await asyncio.gather(*(_user(http, number, given.tokens, done) for number in range(given.clients)))
    changing.join()
    seconds = time.monotonic() - begun
    answers = list(itertools.chain(*found))
    confirmed = [1000 * (there - asked) for asked, there in zip(weights.asked, weights.there, strict=True)][1:]
    return {
        "clients": given.clients,
        "changes": len(weights.weight) - 1,
        "seconds": round(seconds, 1),
        "change_confirmed_ms": _quantiles(confirmed),
        "streams": len(answers),
        **verdicts(answers, known, (stable.release, canary.release)),
        "problems": [one.problem for one in answers if not one.fine][:20],
        "sessions": len({one.session for one in answers}),
        "sessions_not_sticky_and_monotone": unsticky(answers, weights, canary.release),
        "split": split(answers, weights, canary.release),
    }


def verdicts(answers: Sequence[Asked], known: dict[tuple[str, int], str], releases: tuple[str, str]) -> dict[str, int]:
    """How many streams failed, gave the other release's answer, or neither's."""
    whole = [one for one in answers if one.fine]
    wrong = [one for one in whole if one.text != known[one.release, one.question]]
    others = {releases[0]: releases[1], releases[1]: releases[0]}
    swapped = sum(one.text == known[others[one.release], one.question] for one in wrong)
    return {
        "failed": len(answers) - len(whole),
        "mixed_answers": len(wrong) - swapped,
        "wrong_adapter": swapped,
        "answered_by_canary": sum(one.release == releases[1] for one in whole),
    }


def unsticky(answers: Sequence[Asked], weights: Weights, canary: str) -> int:
    """Sessions whose releases do not follow from one place in 0 to 100: on the canary exactly when that is below the
    weight. A request that met a change may have met either weight."""
    met: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 100.0))
    for one in answers:
        least, most = weights.possible(one.begun, one.headers_at)
        above, below = met[one.session]
        met[one.session] = (above, min(below, most)) if one.release == canary else (max(above, least), below)
    return sum(above >= below and (above, below) != (100.0, 100.0) for above, below in met.values())


def split(answers: Sequence[Asked], weights: Weights, canary: str) -> list[dict[str, Any]]:
    """For each weight: sessions whose first request met that weight alone, and the canary's share of them. The interval
    holds for all weights together with 95% (Bonferroni)."""
    counts: dict[int, list[bool]] = defaultdict(list)
    for one in answers:
        least, most = weights.possible(one.begun, one.headers_at)
        if one.first and least == most:
            counts[least].append(one.release == canary)
    return shares(counts)


def shares(counts: Mapping[int, Sequence[bool]]) -> list[dict[str, Any]]:
    """By weight: how many sessions were on the canary, and whether the interval of that share holds the weight."""
    rows = []
    for weight, on in sorted(counts.items()):
        interval = rate_interval(sum(on), len(on), confidence=1 - 0.05 / len(counts))
        rows.append(
            {
                "weight": weight,
                "sessions": len(on),
                "on_canary": sum(on),
                "interval": [round(100 * interval.low, 2), round(100 * interval.high, 2)],
                "holds": interval.low <= weight / 100 <= interval.high,
            }
        )
    return rows


async def _user(http: httpx.AsyncClient, number: int, tokens: int, done: threading.Event) -> list[Asked]:
    chooser = random.Random(number)
    found: list[Asked] = []
    for place in itertools.count():
        if done.is_set():
            return found
        session = f"user-{number}-{place // REQUESTS_A_SESSION}"
        question = chooser.randrange(len(QUESTIONS))
        body = _body("app", QUESTIONS[question], tokens)
        begun = headers_at = time.monotonic()
        release, data, status, problem = "", b"", 0, ""
        try:
            async with http.stream("POST", "/v1/chat/completions", json=body, headers={SESSION_HEADER: session}) as got:
                headers_at = time.monotonic()
                release, status = got.headers.get(RELEASE_HEADER, ""), got.status_code
                data = await got.aread()
        except httpx.HTTPError as error:
            problem = repr(error)
        text = _text(data) if status == 200 else ""
        fine = status == 200 and data.rstrip().endswith(b"data: [DONE]")
        if not fine:
            problem = f"{problem} status {status}, {time.monotonic() - begun:.2f} s, ends with {data[-200:]!r}".strip()
        found.append(
            Asked(session, place % REQUESTS_A_SESSION == 0, question, release, text, fine, begun, headers_at, problem)
        )
    raise AssertionError("unreachable")


def cost(
    direct: str, gateway: str, ask: tuple[Callable[[httpx.Client], float], Callable[[httpx.Client], float]], count: int
) -> dict[str, Any]:
    """Milliseconds of `count` requests each, in turn directly and through the gateway."""
    times: tuple[list[float], list[float]] = ([], [])
    with (
        httpx.Client(base_url=direct, timeout=60, trust_env=False) as one,
        httpx.Client(base_url=gateway, timeout=60, trust_env=False) as other,
    ):
        for number in range(count + 20):
            for place, http in enumerate((one, other)):
                took = ask[place](http)
                if number >= 20:  # connections and caches are warm
                    times[place].append(1000 * took)
    found = {name: _quantiles(values) for name, values in zip(("direct", "gateway"), times, strict=True)}
    added = {q: round(found["gateway"][q] - found["direct"][q], 3) for q in found["direct"]}
    return {"requests": count, **found, "added": added}


def _plain(http: httpx.Client) -> float:
    begun = time.perf_counter()
    _released(http, "s")
    return time.perf_counter() - begun


def _released(http: httpx.Client, session: str) -> str:
    """One short question. The release that answered, as the gateway says."""
    got = http.post("/v1/chat/completions", json={"model": "app", "messages": []}, headers={SESSION_HEADER: session})
    assert got.status_code == 200, got.text
    return str(got.headers.get(RELEASE_HEADER, ""))


def _stream(http: httpx.Client, model: str, tokens: int) -> float:
    """Seconds to the first piece of text."""
    begun = time.perf_counter()
    body = _body(model, QUESTIONS[0], tokens)
    with http.stream("POST", "/v1/chat/completions", json=body, headers={SESSION_HEADER: "s"}) as got:
        assert got.status_code == 200, got.read()
        texts = [
            time.perf_counter() for line in got.iter_lines() if '"content":"' in line and '"content":""' not in line
        ]
    return texts[0] - begun


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 99)}


def _body(model: str, question: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "stream": True, "temperature": 0, "max_tokens": tokens}


def _ask(url: str, model: str, question: str, tokens: int) -> bytes:
    return httpx.post(
        f"{url}/v1/chat/completions", json=_body(model, question, tokens), timeout=120, trust_env=False
    ).content


def _text(data: bytes) -> str:
    """The answer in a stream of server-sent events."""
    pieces = []
    for line in data.splitlines():
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or [{}]
            pieces.append(choices[0].get("delta", {}).get("content") or "")
    return "".join(pieces)


def _target(letter: str, port: int) -> Target:
    return Target(digest(letter), digest(letter), f"app-{letter * 12}", (f"127.0.0.1:{port}",))


class _AtOnce(socketserver.StreamRequestHandler):
    """A server that costs next to nothing: reads a request, answers the same bytes."""

    disable_nagle_algorithm = True
    ANSWER = b'{"choices":[{"message":{"content":"yes"},"finish_reason":"stop"}]}'

    def handle(self) -> None:
        while line := self.rfile.readline():
            length, chunked = 0, False
            while (line := self.rfile.readline().strip().lower()) != b"":
                if line.startswith(b"content-length:"):
                    length = int(line[15:])
                chunked = chunked or line == b"transfer-encoding: chunked"
            self.rfile.read(length)
            while chunked and (size := int(self.rfile.readline(), 16)) >= 0:
                self.rfile.read(size + 2)
                chunked = size > 0
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            self.wfile.write(head % len(self.ANSWER) + self.ANSWER)


@contextmanager
def at_once() -> Iterator[int]:
    """The port of a running `_AtOnce`."""
    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _AtOnce) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@contextmanager
def running_vllm(settings: VllmSettings, log: Path) -> Iterator[None]:
    """One server, until the end of the block."""
    spec = vllm_service(settings)
    with log.open("ab") as stream:
        server = subprocess.Popen(
            spec.command, env={**os.environ, **spec.environment}, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        until = time.monotonic() + 300
        while probe(spec.health) is not None:
            if server.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"vLLM did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


if __name__ == "__main__":
    main()
