"""Start parts side by side and wait until each serves: one thread a part, each after what it depends on."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sluice.infra.errors import UnavailableError
from sluice.infra.health import probe
from sluice.infra.progress import Report
from sluice.infra.services import ServiceSpec
from sluice.infra.supervisord import Fault, SupervisordClient, Unreachable

_POLL_S = 0.2
_LOG_LINES = 10
# A part that dies after its first second is restarted without end by supervisord; nobody should wait for it so long.
_MOST_STARTS = 4


class _Abandoned(Exception):
    """Another part failed, or the user gave up: stop waiting, leave the part as it is."""


class Startup:
    """One `up`: `specs` are known to supervisord already, some of them run."""

    def __init__(self, client: SupervisordClient, specs: Sequence[ServiceSpec], report: Report) -> None:
        self.client = client
        self.specs = specs
        self._report = report
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._serving = {spec.name: threading.Event() for spec in specs}

    def run(self) -> None:
        """Return when every part serves. Raises `UnavailableError` for the first that does not."""
        if not self.specs:
            return
        self._say("")
        with ThreadPoolExecutor(max_workers=len(self.specs)) as pool:
            futures = [pool.submit(self._bring_up, spec) for spec in self.specs]
            try:
                failures = [future.exception() for future in futures]
            finally:
                # On Ctrl-C the threads end too, instead of holding the program until their parts serve.
                self._given_up.set()
        causes = [failure for failure in failures if failure is not None]
        for failure in causes:
            if not isinstance(failure, _Abandoned):
                raise failure
        self._say("all parts serve")

    def _bring_up(self, spec: ServiceSpec) -> None:
        try:
            for name in spec.depends_on:
                # What was kept from an earlier `up` is not waited for: it has been up once.
                while name in self._serving and not self._serving[name].wait(_POLL_S):
                    self._check_given_up()
            self._mend(spec)
            self._serving[spec.name].set()
            self._say(f"{spec.name} serves")
        except (Unreachable, Fault) as error:
            self._given_up.set()
            raise UnavailableError(
                f"supervisord failed on the part {spec.name!r}: {error}.", hint="Run `sluice up` again."
            ) from error
        except BaseException:
            self._given_up.set()
            raise

    def _mend(self, spec: ServiceSpec) -> None:
        info = self.client.call("getProcessInfo", spec.name)
        if info["statename"] in ("RUNNING", "STARTING"):
            # A young part may still be starting; an old one that does not answer hangs and is restarted, once.
            young_s = spec.ready_timeout_s - (info["now"] - info["start"])
            if self._wait_serving(spec, max(spec.health.hang_s, young_s)) is None:
                return
            self._say(f"{spec.name} does not answer: restarting it")
        if info["statename"] not in ("STOPPED", "EXITED", "FATAL"):
            self._stop(spec)
        try:
            self.client.call("startProcess", spec.name, False)
        except Fault as error:
            if error.name != "ALREADY_STARTED":
                raise
        sick = self._wait_serving(spec, spec.ready_timeout_s)
        if sick is not None:
            raise self._failure(spec, sick)

    def _stop(self, spec: ServiceSpec) -> None:
        try:
            self.client.call("stopProcess", spec.name, timeout_s=spec.stop_wait_s + 30.0)
        except Fault as error:
            if error.name != "NOT_RUNNING":
                raise
        deadline = time.monotonic() + spec.stop_wait_s + 30.0
        # A start that comes while somebody else's stop is under way would be lost.
        while self.client.call("getProcessInfo", spec.name)["statename"] == "STOPPING" and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _wait_serving(self, spec: ServiceSpec, patience_s: float) -> str | None:
        """None as soon as the part serves; after `patience_s`, or when nothing is left to wait for, why it does not."""
        begun = time.monotonic()
        starts: set[int] = set()
        while True:
            info = self.client.call("getProcessInfo", spec.name)
            state = info["statename"]
            if info["pid"]:
                starts.add(info["pid"])
            # A probe counts for a running part only: while it starts, somebody else's server could be answering.
            sick = probe(spec.health) if state == "RUNNING" else f"its process is {state.lower()}"
            if sick is None:
                return None
            waited = time.monotonic() - begun
            # Not "EXITED": supervisord starts such a part again within a second.
            if state == "FATAL":
                return f"its process ended at once ({info['spawnerr'] or info['description']})"
            if len(starts) >= _MOST_STARTS:
                return f"its process ended {_MOST_STARTS - 1} times"
            if waited > patience_s:
                return f"not healthy after {patience_s:.0f} s: {sick}"
            self._check_given_up()
            self._say(f"{spec.name} is starting ({waited:.0f} s)")
            time.sleep(_POLL_S)

    def _check_given_up(self) -> None:
        if self._given_up.is_set():
            raise _Abandoned

    def _failure(self, spec: ServiceSpec, sick: str) -> UnavailableError:
        log = self.client.home / "logs" / f"{spec.name}.log"
        lines = tail(log, _LOG_LINES)
        said = "\n".join(f"    {line}" for line in lines) if lines else "    (nothing)"
        return UnavailableError(
            f"The part {spec.name!r} did not start: {sick}. The end of its log {log}:\n{said}\n",
            hint="Mend the cause and run `sluice up` again: what serves stays. `sluice doctor` checks the machine.",
        )

    def _say(self, message: str) -> None:
        with self._lock:
            serving = sum(event.is_set() for event in self._serving.values())
            self._report(serving, len(self.specs), message)


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log of any size; empty when there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - 64 * 1024))
            return stream.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
