"""Runs people look at: training runs (parameters, loss, dataset) and gate runs (the report and its table).

A run is found by its key, so logging again after a crash goes on in the same run instead of starting another: equal
parameters, metrics and files are no change to MLflow.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sluice.infra.errors import ConflictError, InputError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, hex_of, require_digest, short
from sluice.registry import links
from sluice.registry.description import align_tables
from sluice.registry.mlflow_registry import MlflowRegistry, pairs, quoted

KEY_TAG = "sluice.key"

# MLflow's limits of one request, and of a value.
METRICS_IN_BATCH = 1000
PARAMETERS_IN_BATCH = 100
PARAMETER_LENGTH = 6000
TAG_LENGTH = 8000


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
    """A dataset or holdout that a run used: shown by MLflow as the run's input. `counts` are e.g. rows by split."""

    name: str
    digest: str
    counts: Mapping[str, int] = field(default_factory=dict)
    context: str = "training"


@dataclass(frozen=True)
class Table:
    """A table that MLflow opens inline: column names and rows of JSON values."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Json]]


def log_training_run(
    registry: MlflowRegistry,
    *,
    application: str,
    adapter_digest: str,
    dataset: DatasetReference,
    parameters: Mapping[str, Json],
    metrics: Iterable[MetricPoint],
    files: Mapping[str, Path],
    tags: Mapping[str, str] | None = None,
    started: float | None = None,
    finished: float | None = None,
    report: Report = no_report,
) -> RunLink:
    """Log how an adapter was trained; one run for each adapter digest.

    `parameters` is the recipe, nested mappings become dotted names. `files` are shown as artifacts (dataset card,
    recipe): relative path -> local file. `started`, `finished` in seconds since the epoch; now when not given.
    """
    return _log_run(
        registry,
        experiment="training",
        key=require_digest(adapter_digest, "adapter_digest"),
        name=f"{application} adapter {short(adapter_digest)}",
        parameters=_flat(parameters),
        metrics=metrics,
        files=files,
        dataset=dataset,
        tags={"application": application, "adapter": adapter_digest, "dataset": dataset.digest, **(tags or {})},
        started=started,
        finished=finished,
        report=report,
    )


def log_gate_run(
    registry: MlflowRegistry,
    *,
    application: str,
    report_digest: str,
    candidate_digest: str,
    champion_digest: str | None,
    verdict: str,
    metrics: Mapping[str, float],
    files: Mapping[str, Path],
    holdout: DatasetReference | None = None,
    answers: Table | None = None,
    parameters: Mapping[str, Json] | None = None,
    markdown: str = "",
    tags: Mapping[str, str] | None = None,
    started: float | None = None,
    finished: float | None = None,
    report: Report = no_report,
) -> RunLink:
    """Log a comparison of candidate and champion; one run for each report digest.

    `files`: report.html, report.json, plots. `answers`: the paired answers, question by question. `metrics` are the
    summary's figures; `parameters` the gate's policy; `markdown` is shown as the run's description.
    """
    require_digest(report_digest, "report_digest")
    require_digest(candidate_digest, "candidate_digest")
    run_tags = {"application": application, "gate": verdict, "adapter": candidate_digest, "report": report_digest}
    if champion_digest is not None:
        run_tags["champion"] = require_digest(champion_digest, "champion_digest")
    if markdown:
        run_tags["mlflow.note.content"] = align_tables(markdown)
    with tempfile.TemporaryDirectory() as folder:
        shown = dict(files)
        if answers is not None:
            path = Path(folder) / "answers.json"
            path.write_text(json.dumps({"columns": list(answers.columns), "data": [list(row) for row in answers.rows]}))
            shown["answers.json"] = path
            run_tags["mlflow.loggedArtifacts"] = json.dumps([{"path": "answers.json", "type": "table"}])
        return _log_run(
            registry,
            experiment="gates",
            key=report_digest,
            name=f"{application} {short(candidate_digest)}: {verdict}",
            parameters=_flat(parameters or {}),
            metrics=[MetricPoint(name, value, 0) for name, value in metrics.items()],
            files=shown,
            dataset=holdout,
            tags={**run_tags, **(tags or {})},
            started=started,
            finished=finished,
            report=report,
        )


def _log_run(
    registry: MlflowRegistry,
    *,
    experiment: str,
    key: str,
    name: str,
    parameters: Mapping[str, str],
    metrics: Iterable[MetricPoint],
    files: Mapping[str, Path],
    dataset: DatasetReference | None,
    tags: Mapping[str, str],
    started: float | None,
    finished: float | None,
    report: Report,
) -> RunLink:
    experiment_id = registry.experiment(experiment)
    info = _find_or_create(registry, experiment_id, key, name, started)
    run_id = str(info["run_id"])
    link = RunLink(run_id, links.run_page(registry.uri, experiment_id, run_id))
    if info["status"] == "FINISHED":
        return link
    for batch in _batches(pairs(parameters), PARAMETERS_IN_BATCH):
        try:
            registry.post("runs/log-batch", run_id=run_id, params=batch)
        except InputError as error:
            if "Changing param values" not in error.message:
                raise
            raise ConflictError(
                f"The run of {short(key)} is logged with other parameters: {error.message}",
                hint=f"One digest has one recipe; look at {link.url}.",
            ) from error
    shown = {"mlflow.user": "sluice", "mlflow.source.name": "sluice", "mlflow.source.type": "LOCAL", **tags}
    registry.post("runs/log-batch", run_id=run_id, tags=pairs({k: v[:TAG_LENGTH] for k, v in shown.items()}))
    # The same time again, or MLflow keeps a point that is sent twice as two points.
    start = int(info["start_time"])
    for points in _batches([_point(point, start) for point in metrics], METRICS_IN_BATCH):
        registry.post("runs/log-batch", run_id=run_id, metrics=points)
    if dataset is not None:
        registry.post("runs/log-inputs", run_id=run_id, datasets=[_input(dataset)])
    registry.upload(files, info["artifact_uri"], run_id=run_id, report=report)
    registry.post("runs/update", run_id=run_id, status="FINISHED", end_time=_milliseconds(finished))
    return link


def _find_or_create(
    registry: MlflowRegistry, experiment_id: str, key: str, name: str, started: float | None
) -> dict[str, Any]:
    found = _find(registry, experiment_id, key)
    if found is not None:
        return found
    created = registry.post(
        "runs/create",
        experiment_id=experiment_id,
        run_name=name,
        start_time=_milliseconds(started),
        tags=pairs({KEY_TAG: key}),
    )["run"]["info"]
    # Two processes may log one run at once: both look again, and both keep the same one.
    found = _find(registry, experiment_id, key) or created
    if found["run_id"] != created["run_id"]:
        registry.post("runs/delete", run_id=created["run_id"])
    return found


def _find(registry: MlflowRegistry, experiment_id: str, key: str) -> dict[str, Any] | None:
    runs = registry.post(
        "runs/search",
        experiment_ids=[experiment_id],
        filter=f"tags.`{KEY_TAG}` = {quoted(key)}",
        run_view_type="ACTIVE_ONLY",
        max_results=50,
    ).get("runs", [])
    infos: list[dict[str, Any]] = [run["info"] for run in runs]
    return min(infos, key=lambda info: (info["status"] != "FINISHED", info["run_id"])) if infos else None


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


def _batches(items: Sequence[dict[str, Json]], size: int) -> Iterable[Sequence[dict[str, Json]]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _milliseconds(seconds: float | None) -> int:
    return int((time.time() if seconds is None else seconds) * 1000)
