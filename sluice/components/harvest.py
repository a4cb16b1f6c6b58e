"""Production traces to records."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput
from sluice.provenance.times import parse_time


@component
def harvest(since: str, until: str, records: dsl.Output[dsl.Dataset]) -> None:
    """Read the traces of a window with all their scores."""
    from sluice.components.harvest import harvest_step
    from sluice.components.task import publish, task

    with task("harvest") as running:
        publish(records, harvest_step(running, since=since, until=until), kind="records")


def harvest_step(running: Task, *, since: str, until: str) -> str:
    """Digest of the records of a window, as of its end. Times are ISO 8601 with offset."""
    start = int(parse_time(since, "since").timestamp() * 1000)
    end = int(parse_time(until, "until").timestamp() * 1000)
    settings = running.workspace.settings

    def read(folder: Path) -> StepOutput:
        from sluice.curation.harvest import harvest, write_harvest
        from sluice.curation.trace_store import Window, open_trace_store

        store = open_trace_store(settings)
        found = harvest(
            store, Window(start, end), as_of_ms=end, settle_s=settings.traces.settle_s, report=running.report
        )
        write_harvest(found, folder)
        manifest = running.workspace.artifacts.put_directory(folder, "records", {"records": found.counts.records})
        values = {"records": found.counts.records, "scores": found.counts.scores, "left": found.counts.unfinished}
        return StepOutput({"records": manifest.digest}, values)

    record = running.step(
        "harvest",
        rooms=("curation", "components.harvest"),
        parameters={
            "since_ms": start,
            "until_ms": end,
            "store": settings.traces.backend,
            "experiment": settings.traces.experiment,
            "settle_s": settings.traces.settle_s,
        },
        inputs={},
        function=read,
    )
    values = record.output.values
    running.say(f"{values['records']} traces, {values['scores']} scores")
    return record.output.artifacts["records"]
