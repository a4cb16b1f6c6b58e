"""Runs people look at: training runs (parameters, loss, dataset) and gate runs (the report and its table).

A run is found by its key, so logging again after a crash goes on in the same run instead of starting another. A
training run may have been written while training ran (`training_run.py`): it is the same page, taken over here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json, require_digest, short
from sluice.registry.description import align_tables
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.run_page import (
    NOTE_TAG,
    SOURCE,
    DatasetReference,
    MetricPoint,
    RunLink,
    RunPage,
    table_tag,
)

WHOLE_TAG = "sluice.whole"
"""Written last: a run that is finished and has it was logged to its end, and is not touched again."""


def log_training_run(
    registry: MlflowRegistry,
    *,
    application: str,
    adapter_digest: str,
    key: str,
    dataset: DatasetReference,
    parameters: Mapping[str, Json],
    metrics: Iterable[MetricPoint],
    files: Mapping[str, Path],
    tags: Mapping[str, str] | None = None,
    started: float | None = None,
    finished: float | None = None,
    report: Report = no_report,
) -> RunLink:
    """Log how an adapter was trained; one run for each training step.

    `key` is the training step's key digest: the page that was written while it ran is found by it, and gets what is
    missing. `parameters` is the recipe, nested mappings become dotted names. `files` are shown as artifacts (dataset
    card, recipe): relative path -> local file. `started`, `finished` in seconds since the epoch; now when not given.
    """
    return _log_run(
        registry,
        experiment="training",
        key=require_digest(key, "key"),
        name=f"{application} adapter {short(require_digest(adapter_digest, 'adapter_digest'))}",
        parameters=parameters,
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
    tables: Sequence[str] = (),
    parameters: Mapping[str, Json] | None = None,
    markdown: str = "",
    tags: Mapping[str, str] | None = None,
    started: float | None = None,
    finished: float | None = None,
    report: Report = no_report,
) -> RunLink:
    """Log a comparison of candidate and champion; one run for each report digest.

    `files`: report.html, report.json, plots; `tables` names those among them that are tables in MLflow's form.
    `metrics` are the figures; `parameters` the gate's policy; `markdown` is shown as the run's description.
    """
    require_digest(report_digest, "report_digest")
    require_digest(candidate_digest, "candidate_digest")
    run_tags = {"application": application, "gate": verdict, "adapter": candidate_digest, "report": report_digest}
    if champion_digest is not None:
        run_tags["champion"] = require_digest(champion_digest, "champion_digest")
    if markdown:
        run_tags[NOTE_TAG] = align_tables(markdown)
    if tables:
        run_tags |= table_tag(tables)
    return _log_run(
        registry,
        experiment="gates",
        key=report_digest,
        name=f"{application} {short(candidate_digest)}: {verdict}",
        parameters=parameters or {},
        metrics=[MetricPoint(name, value, 0) for name, value in metrics.items()],
        files=files,
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
    parameters: Mapping[str, Json],
    metrics: Iterable[MetricPoint],
    files: Mapping[str, Path],
    dataset: DatasetReference | None,
    tags: Mapping[str, str],
    started: float | None,
    finished: float | None,
    report: Report,
) -> RunLink:
    page = RunPage.open(registry, experiment, key, name, started)
    if page.status == "FINISHED" and WHOLE_TAG in page.tags:
        return page.link
    page.log_parameters(parameters)
    page.log_points(_missing(page, list(metrics)))
    page.link_inputs([dataset] if dataset else [])
    page.show_files(files, report)
    page.set_tags({**SOURCE, **tags, "mlflow.runName": name, WHOLE_TAG: "true"})
    # What was finished while it ran keeps its end.
    if page.status != "FINISHED":
        page.set_status("FINISHED", finished)
    return page.link


def _missing(page: RunPage, points: list[MetricPoint]) -> list[MetricPoint]:
    """Points of steps that the run's curves lack: an append-only curve would keep a point sent twice as two."""
    known = {name: page.history(name) for name in {point.name for point in points} & set(page.latest)}
    return [point for point in points if point.step not in known.get(point.name, {})]
