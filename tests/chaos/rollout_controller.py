"""A rollout's controller in a process of its own, so that it can be killed: everything is real but the ledger, a file.

    python -m tests.chaos.rollout_controller FOLDER

The folder's files say what is to happen: `settings.json` what is rolled out where, `ledger.mode` how the ledger is
(`fine`, `slow`, `down`, `hung`), `clock` by how many seconds the machine's clock has jumped. `ledger.jsonl` holds the
ledger's facts, `routes.log` every weight that the gateway was given.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sluice.infra.errors import ConflictError, GateRefused, SluiceError, UnavailableError
from sluice.serving.access_log import AccessLog
from sluice.serving.analysis import AnalysisResult, Verdict
from sluice.serving.control import Order
from sluice.serving.controller_lease import FileLease
from sluice.serving.envoy import GatewaySettings
from sluice.serving.gateway_samples import GatewaySamples, ShadowSamples
from sluice.serving.observations import Observed, SampleSource
from sluice.serving.policy import parse_policy
from sluice.serving.probes import ProbeCheck, ProbeReport
from sluice.serving.rollout import Rollout
from sluice.serving.rollout_store import FileRolloutStore
from sluice.serving.router import EnvoyRouter
from sluice.serving.routes import RouteState, Target

SLOW_S = 0.3


@dataclass(frozen=True)
class Machine:
    """The folder, and what it says."""

    folder: Path

    def mode(self) -> str:
        return (self.folder / "ledger.mode").read_text().strip()

    def slow(self) -> None:
        """Time in which a test can kill us."""
        if self.mode() == "slow":
            time.sleep(SLOW_S)

    def jumped(self) -> float:
        return float((self.folder / "clock").read_text())

    def note(self, name: str, **facts: Any) -> None:
        """Append one line whole, and to disk."""
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, json.dumps({"time": time.time(), "pid": os.getpid(), **facts}).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def facts(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(frozen=True)
class LedgerFile:
    """`Recorder` whose facts are lines."""

    machine: Machine

    def step(
        self, release: str, step: int, weight: int, verdict: Verdict, analysis: AnalysisResult | None,
        ordered: Order | None = None,
    ) -> None:  # fmt: skip
        self._tell("step", release=release, step=step, weight=weight, verdict=verdict)

    def failure(self, release: str, stable: str, reason: str, analysis: AnalysisResult | None) -> None:
        self._tell("failure", release=release, reason=reason)

    def withdrawal(self, release: str, stable: str, reason: str) -> None:
        self._tell("withdrawal", release=release, reason=reason)

    def promote(self, release: str) -> None:
        """Compare-and-swap: one promotion only."""
        self.answers()
        try:
            os.close(os.open(self.machine.folder / "promoted", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        self._tell("promotion", release=release)

    def answers(self) -> None:
        mode = self.machine.mode()
        if mode == "down":
            raise UnavailableError("the ledger does not answer")
        while self.machine.mode() == "hung":
            time.sleep(0.1)
        self.machine.slow()

    def _tell(self, kind: str, **facts: Any) -> None:
        self.answers()
        self.machine.note("ledger.jsonl", kind=kind, **facts)


class NotedRouter(EnvoyRouter):
    """Notes each weight before it asks for it, and each way back once it is decided. A file `die` in the
    folder: it is killed between its decision and Envoy's files."""

    def __init__(self, settings: GatewaySettings, machine: Machine) -> None:
        super().__init__(settings)
        self._machine = machine

    def apply(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteState:
        self._machine.note("routes.log", weight=state.weight, stable=state.stable.release, token=token)
        return super().apply(state, expected=expected, token=token)

    def _publish_clusters(self, *given: Any, **more: Any) -> None:
        if (self._machine.folder / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        super()._publish_clusters(*given, **more)

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        try:
            return super().rollback(reason, absorb=absorb)
        finally:
            self._machine.note("routes.log", weight=0, stable="", token=0)


@dataclass(frozen=True)
class JumpingClock:
    """The machine's clock, with the jumps that the folder says."""

    machine: Machine

    def now(self) -> float:
        return time.time() + self.machine.jumped()

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Stamped:
    """Samples as the jumping clock stamped them: the gateway is on the same machine. What was written before a jump
    keeps its time."""

    def __init__(self, source: SampleSource, machine: Machine) -> None:
        self._source = source
        self._machine = machine
        self._jumps = [(0.0, machine.jumped())]

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        if self._machine.jumped() != self._jumps[-1][1]:
            self._jumps.append((time.time(), self._machine.jumped()))
        if len(self._jumps) == 1 and not self._jumps[0][1]:
            return self._source.observe(canary, stable, since, until)
        found = self._source.observe(canary, stable, 0.0, time.time())
        moved = (replace(one, known=self._shown(one.known)) for one in found.samples)
        samples = sorted((one for one in moved if since <= one.known < until), key=lambda one: one.known)
        finished = {release: self._shown(known) for release, known in found.finished.items()}
        return replace(found, samples=tuple(samples), finished=finished)

    def _shown(self, real: float) -> float:
        return real + next(jump for since, jump in reversed(self._jumps) if since <= real)


class TracesDown:
    """The trace store while its server is down."""

    def observe(self, canary: str, stable: str, since: float, until: float) -> Observed:
        return Observed((), missing={"thumbs_down": "MLflow does not answer."})


def main(folder: Path) -> str:
    """Roll out, promote, finish. The last word."""
    machine = Machine(folder)
    settings = json.loads((folder / "settings.json").read_text())
    canary = Target.from_json(settings["canary"])
    gateway = GatewaySettings("app", Path(settings["gateway"]), settings["port"], settings["admin_port"])
    router = NotedRouter(gateway, machine)
    ledger = LedgerFile(machine)
    log = AccessLog(gateway.access_log)
    samples = GatewaySamples(log, router)
    source: SampleSource = Stamped(samples, machine)
    if settings["traces_down"]:
        from sluice.serving.sources import BothSources

        source = BothSources(source, TracesDown())

    def authorize() -> None:
        ledger.answers()
        if any(one["kind"] == "failure" and one["release"] == canary.release for one in machine.facts("ledger.jsonl")):
            raise GateRefused("The ledger says that this release has failed.")

    def probe() -> ProbeReport:
        machine.slow()
        return ProbeReport(canary.served_name, (ProbeCheck("answers", True, "It answers."),))

    rollout = Rollout(
        canary,
        policy=parse_policy(settings["policy"], "policy"),
        router=router,
        store=FileRolloutStore(Path(settings["store"])),
        lease=FileLease(folder / "lease", f"process {os.getpid()}"),
        source=source,
        shadow=ShadowSamples(log, router),
        recorder=ledger,
        authorize=authorize,
        probe=probe,
        clock=JumpingClock(machine),
    )
    try:
        result = rollout.run()
        if result.verdict == "promote":
            machine.slow()
            ledger.promote(canary.release)
            rollout.finish()
        return result.verdict
    except ConflictError as error:
        return f"conflict: {error.message}"
    except SluiceError as error:
        return f"error: {error.message}"


def told(folder: Path) -> list[Mapping[str, Any]]:
    """The last words of all controllers that came to their end."""
    return list(Machine(folder).facts("ends.jsonl"))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    Machine(place).note("ends.jsonl", said=main(place))
