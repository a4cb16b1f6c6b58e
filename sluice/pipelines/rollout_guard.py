"""No rollout is left alone: one whose controller is gone is taken over, with nobody watching.

A local part of its own (`sluice up` starts it). It reads files only: the rollouts' states and the runs. A rollout that
nobody has led for `AFTER_S` seconds gets its release run again, which goes on where the last one stopped; the same
process answers Prometheus with the figures of the moment.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sluice.infra.errors import SluiceError
from sluice.infra.ports import LOOPBACK
from sluice.infra.services import HealthCheck, ServiceSpec
from sluice.infra.settings import SETTINGS_VARIABLE, Settings, load_settings
from sluice.provenance.canonical import Json

PART = "rollouts"
AFTER_S = 30.0
"""A person, or whatever else leads the rollout, has so long to run it again."""
_EVERY_S = 2.0
_AGAIN_S = 60.0
"""Between two attempts: one that ends at once (its stores are down) is not made in a loop."""


class Guard:
    """Finds the rollout that nobody leads, and starts its release again."""

    def __init__(self, settings: Settings, *, after_s: float = AFTER_S, again_s: float = _AGAIN_S) -> None:
        self._settings = settings
        self._after_s = after_s
        self._again_s = again_s
        self._alone: tuple[str, float] | None = None
        self._tried = -again_s

    def look(self, now: float) -> str:
        """One look at the monotonic time `now`. The id of the run that took a rollout over, or nothing."""
        from sluice.pipelines.runs import start_run

        release = self._left_alone()
        if release is None:
            self._alone = None
            return ""
        if self._alone is None or self._alone[0] != release:
            self._alone = (release, now)
        if now - self._alone[1] < self._after_s or now - self._tried < self._again_s:
            return ""
        self._tried = now
        return start_run(self._settings, "release", self._parameters(release)).id

    def _left_alone(self) -> str | None:
        """The release whose rollout has begun and not ended, and that no living run is about."""
        from sluice.components.rollout_facts import store_of
        from sluice.pipelines.runs import list_runs

        begun = [one.release for one in store_of(self._settings).states() if one.goes_on and not one.ended]
        if not begun:
            return None
        led = {run.parameters.get("adapter") for run in list_runs(self._settings) if run.alive}
        return next((release for release in begun if release not in led), None)

    def _parameters(self, release: str) -> Mapping[str, Json]:
        """Those of its latest run: its policy, and whether it may be forced."""
        from sluice.pipelines.runs import list_runs

        found = (run for run in list_runs(self._settings) if run.pipeline == "release")
        of_release = (run.parameters for run in found if run.parameters.get("adapter") == release)
        return next(of_release, {"adapter": release, "policy": "default", "allow_override": False})


def guard_service(settings: Settings, port: int) -> ServiceSpec:
    """How to run it: supervised like every other part, so that it is there when anything else is not."""
    url = f"http://{LOOPBACK}:{port}"
    environment = {"SLUICE_HOME": str(settings.home), "SLUICE_SERVE_PYTHON": str(settings.serve_python)}
    if file := os.environ.get(SETTINGS_VARIABLE):
        environment[SETTINGS_VARIABLE] = str(Path(file).absolute())
    return ServiceSpec(
        name=PART,
        command=(sys.executable, "-m", "sluice.pipelines.rollout_guard", str(port)),
        environment=environment,
        health=HealthCheck.http(f"{url}/healthz"),
        ready_timeout_s=60.0,
        stop_wait_s=5,
        url=f"{url}/metrics",
    )


def main(port: int) -> None:
    """Guard and answer Prometheus until the process is told to stop."""
    from sluice.pipelines.metrics_server import metrics_server

    settings = load_settings()
    guard = Guard(settings)

    def watch() -> None:
        said = ""
        while True:
            try:
                run = guard.look(time.monotonic())
                if run:
                    print(f"{time.strftime('%H:%M:%S')} a rollout had no controller; {run} leads it", flush=True)
            except (SluiceError, OSError) as error:
                if str(error) != said:
                    said = str(error)
                    print(f"{time.strftime('%H:%M:%S')} {said}", flush=True)
            time.sleep(_EVERY_S)

    threading.Thread(target=watch, name="guard", daemon=True).start()
    with metrics_server(port, partial(_figures, settings)) as server:
        server.serve_forever()


def _figures(settings: Settings) -> str:
    from sluice.components.rollout_facts import gather
    from sluice.serving.rollout_metrics import exposition

    return exposition(gather(settings))


if __name__ == "__main__":
    main(int(sys.argv[1]))
