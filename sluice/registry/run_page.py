"""One run of MLflow, written bit by bit: found again by its key, so that whoever goes on writes on the same page.

    page = RunPage.open(registry, "training", key, "assistant training")
    page.log_points([MetricPoint("loss", 0.5, 3)])

Equal parameters, tags, inputs and files sent again are no change to MLflow; its metrics are append-only, so whoever
may send a point twice asks `history` first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sluice.infra.errors import ConflictError, InputError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, hex_of, require_digest, short
from sluice.registry import links
from sluice.registry.mlflow_registry import MlflowRegistry, pairs, quoted, unpaired

KEY_TAG = "sluice.key"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
TABLES_TAG = "mlflow.loggedArtifacts"
SOURCE = {"mlflow.user": "sluice", "mlflow.source.name": "sluice", "mlflow.source.type": "LOCAL"}

# MLflow's limits of one request, and of a value.
METRICS_IN_BATCH = 1000
TAGS_IN_BATCH = 100
PARAMETERS_IN_BATCH = 100
PARAMETER_LENGTH = 6000
TAG_LENGTH = 8000
HISTORY_IN_PAGE = 25_000

RunStatus = Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class RunLink:
    """A run and the address of its page."""

    run_id: str
    url: str


@dataclass(frozen=True)
class MetricPoint:
    """One point of a curve; the value may be NaN or infinite. `time` in seconds since the epoch, or the run's start."""

    name: str
    value: float
    step: int
    time: float | None = None


@dataclass(frozen=True)
class DatasetReference:
    """A dataset, holdout or recipe that a run used: shown by MLflow as the run's input. `counts` e.g. rows by split."""

    name: str
    digest: str
    counts: Mapping[str, int] = field(default_factory=dict)
    context: str = "training"


@dataclass(frozen=True)
class Table:
    """A table that MLflow opens inline: column names and rows of JSON values."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Json]]

    def to_json(self) -> str:
        """MLflow's form of a table artifact."""
        return json.dumps({"columns": list(self.columns), "data": [list(row) for row in self.rows]})


def table_tag(paths: Iterable[str]) -> dict[str, str]:
    """The tag by which MLflow's pages know that these artifacts are tables."""
    return {TABLES_TAG: json.dumps([{"path": path, "type": "table"} for path in paths])}


class RunPage:
    """A run that exists. `status`, `tags` and `latest` (step by metric) are as they were when it was opened."""

    def __init__(self, registry: MlflowRegistry, key: str, run: Mapping[str, Any]) -> None:
        info, data = run["info"], run.get("data", {})
        self._registry = registry
        self._key = key
        self.run_id = str(info["run_id"])
        self.status = str(info["status"])
        self.tags = unpaired(data.get("tags"))
        self.latest = {one["key"]: int(one.get("step", 0)) for one in data.get("metrics", [])}
        self._started = int(info["start_time"])
        self._artifacts = str(info["artifact_uri"])
        self.link = RunLink(self.run_id, links.run_page(registry.uri, str(info["experiment_id"]), self.run_id))

    @classmethod
    def find(cls, registry: MlflowRegistry, experiment: str, key: str) -> RunPage | None:
        """The run of this key, or None."""
        found = _find(registry, registry.experiment(experiment), key)
        return cls(registry, key, found) if found else None

    @classmethod
    def open(
        cls, registry: MlflowRegistry, experiment: str, key: str, name: str, started: float | None = None
    ) -> RunPage:
        """The run of this key, made when there is none. `started` in seconds since the epoch; now when not given."""
        experiment_id = registry.experiment(experiment)
        found = _find(registry, experiment_id, key)
        if found is None:
            created = registry.post(
                "runs/create",
                experiment_id=experiment_id,
                run_name=name,
                start_time=_milliseconds(started),
                tags=pairs({KEY_TAG: key}),
            )["run"]
            # Two processes may open one run at once: both look again, and both keep the same one.
            found = _find(registry, experiment_id, key) or created
            if found["info"]["run_id"] != created["info"]["run_id"]:
                registry.post("runs/delete", run_id=created["info"]["run_id"])
        return cls(registry, key, found)

    def log_parameters(self, parameters: Mapping[str, Json]) -> None:
        """Nested mappings become dotted names. Raises `ConflictError` when the run has other values."""
        for batch in _batches(pairs(_flat(parameters)), PARAMETERS_IN_BATCH):
            try:
                self._registry.post("runs/log-batch", run_id=self.run_id, params=batch)
            except InputError as error:
                if "Changing param values" not in error.message:
                    raise
                raise ConflictError(
                    f"The run of {short(self._key)} is logged with other parameters: {error.message}",
                    hint=f"One digest has one recipe; look at {self.link.url}.",
                ) from error

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags; long values are cut to what MLflow takes."""
        for batch in _batches(pairs({k: v[:TAG_LENGTH] for k, v in tags.items()}), TAGS_IN_BATCH):
            self._registry.post("runs/log-batch", run_id=self.run_id, tags=batch)

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """Append points, as few requests as MLflow takes."""
        for batch in _batches([_point(point, self._started) for point in points], METRICS_IN_BATCH):
            self._registry.post("runs/log-batch", run_id=self.run_id, metrics=batch)

    def history(self, name: str) -> dict[int, float]:
        """The value that counts at each step of a curve: the one with the latest time."""
        values: dict[int, float] = {}
        token = None
        while True:
            page = self._registry.get(
                "metrics/get-history",
                run_id=self.run_id,
                metric_key=name,
                max_results=HISTORY_IN_PAGE,
                page_token=token,
            )
            # By time, oldest first.
            values.update({int(one.get("step", 0)): float(one["value"]) for one in page.get("metrics", [])})
            token = page.get("next_page_token")
            if not token:
                return values

    def link_inputs(self, datasets: Sequence[DatasetReference]) -> None:
        """Show what the run was made from as its inputs."""
        if datasets:
            self._registry.post("runs/log-inputs", run_id=self.run_id, datasets=[_input(one) for one in datasets])

    def show_files(self, files: Mapping[str, Path], report: Report = no_report) -> None:
        """Store small files as the run's artifacts: relative path -> local file."""
        if files:
            self._registry.upload(files, self._artifacts, run_id=self.run_id, report=report)

    def set_status(self, status: RunStatus, ended: float | None = None) -> None:
        """The run's state; with an end time (seconds since the epoch) unless it runs, or is to go on."""
        end = None if status in ("RUNNING", "SCHEDULED") else _milliseconds(ended)
        self._registry.post("runs/update", run_id=self.run_id, status=status, end_time=end)
        self.status = status


def _find(registry: MlflowRegistry, experiment_id: str, key: str) -> dict[str, Any] | None:
    runs: list[dict[str, Any]] = registry.post(
        "runs/search",
        experiment_ids=[experiment_id],
        filter=f"tags.`{KEY_TAG}` = {quoted(key)}",
        run_view_type="ACTIVE_ONLY",
        max_results=50,
    ).get("runs", [])
    return min(runs, key=lambda run: (run["info"]["status"] != "FINISHED", run["info"]["run_id"]), default=None)


def _flat(values: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{name}"] = text[:PARAMETER_LENGTH]
    return flat


def _point(point: MetricPoint, start: int) -> dict[str, Json]:
    value: Json = point.value
    at = start if point.time is None else _milliseconds(point.time)
    if not math.isfinite(point.value):
        # JSON has no such numbers; protobuf's JSON form spells them.
        value = "NaN" if math.isnan(point.value) else "Infinity" if point.value > 0 else "-Infinity"
    return {"key": point.name, "value": value, "timestamp": at, "step": point.step}


def _input(dataset: DatasetReference) -> dict[str, Json]:
    digest = require_digest(dataset.digest, "dataset.digest")
    return {
        "tags": pairs({"mlflow.data.context": dataset.context}),
        "dataset": {
            "name": dataset.name,
            # MLflow keeps 36 characters here: enough to compare, and the whole digest is in source and profile.
            "digest": hex_of(digest)[:36],
            "source_type": "sluice",
            "source": json.dumps({"artifact": digest}),
            "profile": json.dumps({"artifact": digest, **dataset.counts}),
        },
    }


def _batches(items: Sequence[dict[str, Any]], size: int) -> Iterable[Sequence[dict[str, Any]]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _milliseconds(seconds: float | None) -> int:
    return int((time.time() if seconds is None else seconds) * 1000)
