"""A real gateway with users in front of two small model servers, and a rollout whose controller can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from sluice.serving.access_log import AccessLog
from sluice.serving.rollout_state import RolloutState
from sluice.serving.rollout_store import FileRolloutStore
from sluice.serving.routes import RouteState, Target
from tests.chaos.rollout_controller import Machine, told
from tests.serving.gateway import Gateway, running_gateway
from tests.serving.samples import digest
from tests.serving.upstream import Upstream, upstream

USERS = 6
_GIVES_UP_S = 2.5
"""A user leaves when nothing comes for so long."""
_PATIENCE_S = 25.0

_Found = TypeVar("_Found")

POLICY = """
shadow: {percent: 100, requests: 4, maximum_time_s: 10}
steps:
  - {weight: 20, minimum: {requests: 5}, minimum_time_s: 0.5, maximum_time_s: 6}
  - {weight: 50, minimum: {requests: 10}, minimum_time_s: 0.5, maximum_time_s: 6}
bake_s: 1.5
check_interval_s: 0.25
trip: {failed: 5, within_s: 10, share: 0.5, silent_s: 1}
analysis:
  false_pass: 0.2
  metrics:
    error_rate: {fail_above: 0.05, margin: 0.4}
    empty_answers: {fail_above: 0.05, margin: 0.4}
probes: {prompts: ["hi"]}
"""
WITH_FEEDBACK = POLICY.replace("  metrics:\n", "  metrics:\n    thumbs_down: {fail_above: 0.1, margin: 0.5}\n")


@dataclass(frozen=True)
class Answer:
    """What one user got. `whole`: 200, and its stream came to its end. `release` is empty when nothing came."""

    session: str
    begun: float
    release: str
    whole: bool


@dataclass
class Scene:
    """One gateway, two servers, users, and the folder of a rollout."""

    folder: Path
    gateway: Gateway
    stable: Target
    canary: Target
    stable_server: Upstream
    canary_server: Upstream
    store: FileRolloutStore
    answers: list[Answer] = field(default_factory=list)
    controllers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # What happens

    def start(self) -> subprocess.Popen[bytes]:
        """A controller more."""
        command = [sys.executable, "-m", "tests.chaos.rollout_controller", str(self.folder)]
        with (self.folder / "controller.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
        self.controllers.append(process)
        return process

    def ledger(self, mode: str) -> None:
        self._say("ledger.mode", mode)

    def rollback_by_hand(self) -> None:
        """What a person does at the gateway."""
        self.gateway.router.rollback("by hand")
        Machine(self.folder).note("routes.log", weight=0, stable="", token=0)

    def clock(self, jumped: float) -> None:
        self._say("clock", str(jumped))

    def canary_turns(self, mode: str) -> None:
        """From now on the canary answers as `Upstream` says of this mode."""
        self.canary_server.modes[self.canary.served_name] = mode

    # What is waited for

    def reaches(self, phase: str, *, weight: int | None = None) -> RolloutState:
        """Wait until the rollout is in this phase, at this weight."""

        def there() -> RolloutState | None:
            state = self.store.load(self.canary.release)
            right = state is not None and state.phase == phase and weight in (None, state.weight)
            return state if right else None

        return self.wait(there, f"phase {phase}")

    def ends(self, *, within_s: float = _PATIENCE_S) -> str:
        """Wait for the last controller. Its last word."""
        try:
            self.controllers[-1].wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the rollout goes on: {self.story()}") from None
        said = [one for one in told(self.folder) if one["pid"] == self.controllers[-1].pid]
        assert said, self.story()
        return str(said[-1]["said"])

    def wait(self, ready: Callable[[], _Found | None], what: str, within_s: float = _PATIENCE_S) -> _Found:
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if found := ready():
                return found
            time.sleep(0.01)
        raise AssertionError(f"{what} did not come: {self.story()}")

    # What must hold

    def weights(self) -> list[int]:
        """Every weight that was asked for, in order; a promotion is 100."""
        return [
            100 if one["stable"] == self.canary.release else one["weight"]
            for one in Machine(self.folder).facts("routes.log")
        ]

    def facts(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in Machine(self.folder).facts("ledger.jsonl") if one["kind"] == kind]

    def lost(self) -> list[Answer]:
        """Answers that did not come whole, and not from the canary. Of one that never began the gateway's log tells
        where it was."""
        log = AccessLog(self.gateway.settings.access_log).read(0, float("inf"))
        waited = {one.session for one in log if one.release == self.canary.release and not one.shadow}
        return [
            one
            for one in self.answers
            if not one.whole and one.release != self.canary.release and (one.release or one.session not in waited)
        ]

    def require_promoted(self) -> None:
        """It is stable now; weights only rose; it was promoted once."""
        weights = self.weights()
        assert weights == sorted(weights), weights
        assert len(self.facts("promotion")) == 1
        assert self.gateway.router.state() == RouteState(self.canary)
        assert [one for one in self.answers if not one.whole] == []

    def require_back(self, *, failed: bool = True) -> None:
        """Everybody is on stable, nothing rose after the way back, and nobody meets the canary any more."""
        weights = self.weights()
        assert 0 in weights[1:], weights
        assert not any(weights[max(place for place, weight in enumerate(weights) if weight == 0) :]), weights
        assert self.gateway.router.state() == RouteState(self.stable)
        assert (self.gateway.router.refusal(self.canary.release) is not None) == failed
        assert self.facts("promotion") == []
        now = time.monotonic()
        # Those who still wait for the canary leave it first.
        later = self.wait(lambda: [one for one in self.answers if one.begun > now][USERS:], "answers of stable")
        assert all(one.whole and one.release == self.stable.release for one in later)
        # The gateway writes its log a moment later.
        self.wait(lambda: not self.lost(), f"an end of lost answers {self.lost()}", within_s=2)

    def story(self) -> str:
        """For a failed test."""
        state = self.store.load(self.canary.release)
        events = "\n".join(f"  {e.kind} {e.weight}% {e.sentence}" for e in (state.events if state else ())[-12:])
        log = (self.folder / "controller.log").read_text()[-1500:]
        return f"{state.phase if state else 'nothing saved'}, weights {self.weights()}\n{events}\n{log}"

    def _say(self, name: str, text: str) -> None:
        staging = self.folder / f".{name}"
        staging.write_text(text)
        staging.replace(self.folder / name)


@contextmanager
def scene(
    folder: Path, *, policy: str = POLICY, traces_down: bool = False, disk: Path | None = None
) -> Iterator[Scene]:
    """`disk`: where the gateway and the rollout keep their files, if it is another one."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = disk or folder
    with upstream() as first, upstream() as second:
        stable, canary = _target("a", first.port), _target("c", second.port)
        with running_gateway(kept / "gateway", stable) as gateway:
            found = Scene(folder, gateway, stable, canary, first, second, FileRolloutStore(kept / "rollouts"))
            found.ledger("fine")
            found.clock(0)
            content = {
                "canary": asdict(canary), "policy": policy, "traces_down": traces_down, "store": str(kept / "rollouts"),
                "gateway": str(gateway.settings.folder), "port": gateway.settings.port,
                "admin_port": gateway.settings.admin_port,
            }  # fmt: skip
            (folder / "settings.json").write_text(json.dumps(content))
            with _users(found):
                try:
                    yield found
                finally:
                    for process in found.controllers:
                        with suppress(ProcessLookupError):
                            os.kill(process.pid, signal.SIGKILL)
                        process.wait(10)


@contextmanager
def _users(found: Scene) -> Iterator[None]:
    stop = threading.Event()

    def ask(user: int) -> None:
        with httpx.Client(base_url=found.gateway.settings.url, timeout=_GIVES_UP_S, trust_env=False) as client:
            number = 0
            while not stop.is_set():
                number += 1
                found.answers.append(_asked(client, f"{user}-{number}"))

    threads = [threading.Thread(target=ask, args=(user,)) for user in range(USERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _asked(client: httpx.Client, session: str) -> Answer:
    begun, release, whole = time.monotonic(), "", False
    body = {"model": "app", "messages": [], "stream": True}
    with (
        suppress(httpx.HTTPError),
        client.stream("POST", "/v1/chat/completions", json=body, headers={"x-session-id": session}) as got,
    ):
        release = got.headers.get("x-sluice-release", "")
        whole = got.status_code == 200 and got.read().rstrip().endswith(b"data: [DONE]")
    return Answer(session, begun, release, whole)


def _target(letter: str, port: int) -> Target:
    return Target(digest(letter), digest(letter), f"app-{letter * 12}", (f"127.0.0.1:{port}",), dedicated=True)
