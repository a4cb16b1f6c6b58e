"""Benchmark tasks of a suite, asked of one release through the server that would serve it."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.canonical import Json, canonical_json
from sluice.provenance.steps import StepOutput, StepRecord

if TYPE_CHECKING:
    from sluice.evaluation.scores import Scores


@component
def benchmark(release: str, base: str, suite: str, scores: dsl.Output[dsl.Dataset]) -> None:
    """Ask the release all items of the suite's benchmark tasks; an interrupted run asks only what is missing."""
    from sluice.components.benchmark import benchmark_step
    from sluice.components.task import publish, task

    with task("benchmark") as running:
        digest = benchmark_step(running, release=release, base=base, suite=suite)
        publish(scores, digest, kind="benchmark", release=release)


def benchmark_step(running: Task, *, release: str, base: str, suite: str, again: int = 0) -> str:
    """Digest of the release's scores in the benchmark tasks (scores.json, and samples.jsonl: what it said).

    A suite without benchmarks gives scores without columns. A result that lost more items than the policy allows is
    made anew (`Task.measured`).
    """
    from sluice.components.answers import SERVING, served_as
    from sluice.evaluation.benchmark_tasks import find_tasks
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    section = chosen.benchmarks
    tasks = find_tasks(section.tasks, chosen.tasks_folder) if section else ()
    asked: dict[str, Json] = {"tasks": {task.name: task.digest for task in tasks}}
    if section:
        asked |= {"section": section.model_dump(mode="json"), **served_as(running.workspace)}

    def work(folder: Path) -> StepOutput:
        from sluice.components.answers import answering_digest
        from sluice.components.served import loaded, vllm_url
        from sluice.evaluation.benchmark_endpoint import Endpoint
        from sluice.evaluation.benchmarks import SAMPLES_FILE, Sample, benchmark_scores, run_benchmarks
        from sluice.evaluation.cache import open_cache
        from sluice.evaluation.outcomes import Patience
        from sluice.evaluation.scores import write_scores
        from sluice.serving.vllm import VllmClient

        workspace = running.workspace
        samples: list[Sample] = []
        if section:
            url = vllm_url(workspace.settings)
            with (
                open_cache(workspace.evaluation_cache) as cache,
                loaded(workspace, release, base, VllmClient(url)) as name,
            ):
                endpoint = Endpoint(
                    f"{url}/v1",
                    name,
                    answering_digest(workspace, release, base),
                    cache,
                    section.concurrency,
                    Patience(timeout_s=section.timeout_s),
                )
                samples = run_benchmarks(
                    tasks, endpoint, base=workspace.folder(base), limit=section.limit, report=running.report
                )
        out = folder / "artifact"
        scores = benchmark_scores(tasks, samples)
        write_scores(out, scores)
        (out / SAMPLES_FILE).write_bytes(b"".join(canonical_json(asdict(one)) + b"\n" for one in samples))
        manifest = workspace.artifacts.put_directory(out, "benchmark", {"release": release})
        return StepOutput({"benchmark": manifest.digest}, {"tasks": counted(scores)})

    def made(number: int) -> StepRecord:
        return running.step(
            "benchmark",
            rooms=(
                "evaluation.benchmarks",
                "evaluation.benchmark_endpoint",
                "evaluation.benchmark_metrics",
                "evaluation.benchmark_model",
                "evaluation.benchmark_tasks",
                "evaluation.json_lines",
                "evaluation.cache",
                "evaluation.at_once",
                "evaluation.scores",
                *SERVING,
                "components.answers",
                "components.benchmark",
            ),
            locks=("main", "serve"),
            parameters={**asked, **({"again": number} if number else {})},
            inputs={"release": release, "base": base},
            function=work,
        )

    def lost(record: StepRecord) -> bool:
        found = record.output.values["tasks"].values()
        return any(one["lost"] > chosen.policy.least_error_budget * one["items"] for one in found)

    record = running.measured(made, lost, again)
    running.say(summary(record.output.values["tasks"]))
    return record.output.artifacts["benchmark"]


def counted(scores: "Scores") -> dict[str, Json]:
    """Items, items without a value, and items answered right, by task."""
    found: dict[str, Json] = {}
    for name, one in scores.columns.items():
        values = [value for value in one.values.values() if value is not None]
        found[name.removeprefix("benchmark.")] = {
            "items": len(one.values),
            "lost": len(one.values) - len(values),
            "right": int(sum(values)),
        }
    return found


def summary(tasks: Mapping[str, Json]) -> str:
    """One line: `general-choice 177 of 248 right, 2 lost`."""
    parts = [
        f"{name} {one['right']} of {one['items']} right" + (f", {one['lost']} lost" if one["lost"] else "")
        for name, one in tasks.items()
    ]
    return "; ".join(parts) or "the suite has no benchmarks"
