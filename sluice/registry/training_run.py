"""A training run in MLflow while it trains: one run for each chain of attempts, its curves growing every few seconds.

Everything that talks to the server happens in a thread of its own. What cannot be sent is kept and tried again, so a
server that is down neither fails nor slows training; it is said once, and once more when the server is back.

MLflow's metrics are append-only. So a step that is done again (a resumed attempt, a roll-back) sends what is asked:
of a `Curve.LATEST` metric the new value if it differs from the one shown (of two points at a step the later counts),
of a `Curve.FIRST` metric nothing: how long a step took the second time is no news.
"""

from __future__ import annotations

import enum
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sluice.infra.errors import SluiceError
from sluice.infra.system_metrics import SystemMetrics
from sluice.provenance.canonical import Json
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.run_page import (
    PARENT_TAG,
    SOURCE,
    DatasetReference,
    MetricPoint,
    RunPage,
    RunStatus,
    Table,
    table_tag,
)

EXPERIMENT = "training"
SYSTEM_PREFIX = "system/"
"""MLflow's page shows metrics of this prefix under "System metrics"."""

SEND_EVERY_S = 3.0
FILES_EVERY_S = 20.0
RETRY_AT_MOST_S = 60.0


class Curve(enum.Enum):
    """What counts when a step is done twice."""

    LATEST = "latest"
    FIRST = "first"


@dataclass(frozen=True)
class TrainingSubject:
    """What a run is about. `key` is the digest that finds it again; `parent_key` that of the run it is shown under."""

    key: str
    name: str
    parameters: Mapping[str, Json]
    inputs: Sequence[DatasetReference] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_key: str | None = None


@dataclass
class _Pending:
    """What the server has not got yet."""

    points: list[tuple[MetricPoint, Curve]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    samples: list[tuple[float, Mapping[str, float]]] = field(default_factory=list)
    status: RunStatus | None = None

    def __bool__(self) -> bool:
        return bool(self.points or self.tags or self.files or self.status)


class LiveTrainingRun:
    """Use as a context: leaving it sends what is left, for at most `patience_s` seconds.

    `say` gets a sentence when the server is lost and when it is back; `on_page` the run's address once it is known.
    Every method returns at once and raises nothing.
    """

    def __init__(
        self,
        registry: MlflowRegistry,
        subject: TrainingSubject,
        *,
        say: Callable[[str], None] = print,
        on_page: Callable[[str], None] | None = None,
        system: SystemMetrics | None = None,
        send_every_s: float = SEND_EVERY_S,
        files_every_s: float = FILES_EVERY_S,
        patience_s: float = 20.0,
    ) -> None:
        self._registry, self._subject = registry, subject
        self._say, self._on_page, self._system = say, on_page, system
        self._send_every_s, self._files_every_s, self._patience_s = send_every_s, files_every_s, patience_s
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ending = False
        self._pending = _Pending()
        self._tables: set[str] = set()
        self._page: RunPage | None = None
        self._shown: dict[str, dict[int, float]] = {}
        self._system_step = 0
        self._files_sent = -files_every_s
        self._lost = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def __enter__(self) -> LiveTrainingRun:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending = True
        self._wake.set()
        self._thread.join(self._patience_s)
        if self._pending and not self._lost:
            self._say("MLflow did not take the last lines of this training run in time; the journal has them.")

    def add(self, points: Iterable[MetricPoint], curve: Curve = Curve.LATEST) -> None:
        """Points of curves, to be sent with the next batch."""
        with self._lock:
            self._pending.points.extend((point, curve) for point in points)

    def tag(self, **tags: str) -> None:
        """Chips of the run's page; the latest value counts."""
        with self._lock:
            self._pending.tags.update(tags)

    def show_table(self, path: str, table: Table) -> None:
        """A table among the run's artifacts, in the place of the one before."""
        with self._lock:
            self._pending.files[path] = table.to_json().encode()
            if path not in self._tables:
                self._tables.add(path)
                self._pending.tags |= table_tag(sorted(self._tables))

    def show_file(self, path: str, content: bytes) -> None:
        """A file among the run's artifacts, in the place of the one before."""
        with self._lock:
            self._pending.files[path] = content

    def end(self, status: RunStatus) -> None:
        """How this attempt ended: sent when the context is left. The next attempt makes it RUNNING again."""
        with self._lock:
            self._pending.status = status

    def _work(self) -> None:
        wait, sampled = 0.0, 0.0
        while True:
            self._wake.wait(wait)
            ending = self._ending
            if self._system is not None and time.monotonic() - sampled >= self._system.every_s:
                sampled = time.monotonic()
                self._pending.samples.append((time.time(), self._system.read()))
            try:
                self._send(everything=ending)
            except Exception as error:  # noqa: BLE001  (whatever MLflow answers, training goes on)
                if not self._lost:
                    self._lost = True
                    cause = error.message if isinstance(error, SluiceError) else f"{type(error).__name__}: {error}"
                    self._say(f"MLflow does not show this training now, and gets it when it answers: {cause}")
                wait = min(max(wait, self._send_every_s) * 2, RETRY_AT_MOST_S)
            else:
                if self._lost:
                    self._lost = False
                    self._say("MLflow answers again and has all that was missed.")
                wait = self._send_every_s
            if ending:
                return

    def _send(self, *, everything: bool) -> None:
        """One round. What raises stays pending, except what was sent before it."""
        page = self._page or self._open()
        self._number_samples()
        with self._lock:
            points, self._pending.points = self._pending.points, []
            tags, self._pending.tags = self._pending.tags, {}
        try:
            # Once sent, again is harmless: tags replace themselves, points are known by what is shown.
            if tags:
                page.set_tags(tags)
            page.log_points(fresh := self._fresh(page, points))
        except BaseException:
            with self._lock:
                self._pending.points[:0] = points
                self._pending.tags = tags | self._pending.tags
            raise
        for point in fresh:
            self._shown[point.name][point.step] = point.value
        if everything or time.monotonic() - self._files_sent >= self._files_every_s:
            self._send_files(page)
        if everything and self._pending.status is not None:
            page.set_status(self._pending.status)
            self._pending.status = None

    def _open(self) -> RunPage:
        subject = self._subject
        page = RunPage.open(self._registry, EXPERIMENT, subject.key, subject.name)
        parent = RunPage.find(self._registry, EXPERIMENT, subject.parent_key) if subject.parent_key else None
        page.set_tags({**SOURCE, **subject.tags, **({PARENT_TAG: parent.run_id} if parent else {})})
        if page.status != "RUNNING":
            page.set_status("RUNNING")
        page.log_parameters(subject.parameters)
        page.link_inputs(subject.inputs)
        # After the last sample of the attempt before, as MLflow's own monitor does.
        before = [step for name, step in page.latest.items() if name.startswith(SYSTEM_PREFIX)]
        self._system_step = max(before, default=-1) + 1
        self._page = page
        if self._on_page is not None:
            self._on_page(page.link.url)
        return page

    def _fresh(self, page: RunPage, points: list[tuple[MetricPoint, Curve]]) -> list[MetricPoint]:
        """The points to send: one a step and name, none that the page shows already."""
        chosen: dict[tuple[str, int], MetricPoint] = {}
        for point, curve in points:
            if point.name not in self._shown:
                # A curve that the page had when it was opened was drawn by an earlier attempt.
                self._shown[point.name] = page.history(point.name) if point.name in page.latest else {}
            place = (point.name, point.step)
            if curve is Curve.FIRST and (place in chosen or point.step in self._shown[point.name]):
                continue
            chosen[place] = point
        return [point for point in chosen.values() if not self._shows(point)]

    def _shows(self, point: MetricPoint) -> bool:
        shown = self._shown[point.name].get(point.step)
        # A NaN differs from itself, but is the same point.
        return shown is not None and (shown == point.value or (shown != shown and point.value != point.value))

    def _send_files(self, page: RunPage) -> None:
        with self._lock:
            files, self._pending.files = self._pending.files, {}
        if not files:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                paths = {name: Path(folder) / str(number) for number, name in enumerate(files)}
                for name, path in paths.items():
                    path.write_bytes(files[name])
                page.show_files(paths)
        except BaseException:
            with self._lock:
                self._pending.files = files | self._pending.files
            raise
        self._files_sent = time.monotonic()

    def _number_samples(self) -> None:
        """Samples of the machine as points. Only the open page knows what step the attempt before ended with."""
        samples, self._pending.samples = self._pending.samples, []
        for at, values in samples:
            points = (
                MetricPoint(f"{SYSTEM_PREFIX}{name}", value, self._system_step, at) for name, value in values.items()
            )
            self.add(points, Curve.FIRST)
            self._system_step += 1
