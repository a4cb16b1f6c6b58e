"""Candidate and champion timed side by side."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.canonical import Json
from sluice.provenance.steps import StepOutput, StepRecord

if TYPE_CHECKING:
    from sluice.evaluation.speed import SpeedScores
    from sluice.evaluation.suite_sections import Speed


@component
def speed(
    candidate: str,
    champion: str,
    base: str,
    suite: str,
    prompts: dsl.Input[dsl.Dataset],
    speed: dsl.Output[dsl.Dataset],
) -> None:
    """Ask both releases the suite's prompts in turn and time them."""
    from sluice.components.speed import speed_step
    from sluice.components.task import digest_of, publish, task

    with task("speed") as running:
        digest = speed_step(
            running, candidate=candidate, champion=champion, base=base, prompts=digest_of(prompts), suite=suite
        )
        publish(speed, digest, kind="speed", candidate=candidate, champion=champion)


def speed_step(running: Task, *, candidate: str, champion: str, base: str, prompts: str, suite: str) -> str:
    """Digest of the times of both releases: candidate/scores.json, champion/scores.json. Without the section there are
    no scores. A result that lost more requests than the policy allows is made anew (`Task.measured`)."""
    from sluice.components.answers import SERVING, served_as
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    section = chosen.speed
    workspace = running.workspace

    def work(folder: Path) -> StepOutput:
        from sluice.evaluation.scores import Scores, write_scores
        from sluice.evaluation.speed import SpeedScores

        found = measured(section) if section else SpeedScores(Scores({}), Scores({}))
        out = folder / "artifact"
        values: dict[str, Json] = {}
        for side, scores in (("candidate", found.candidate), ("champion", found.champion)):
            write_scores(out / side, scores)
            if "speed.latency_s" in scores.columns:
                times = [value for value in scores.columns["speed.latency_s"].values.values() if value is not None]
                lost = 1 - len(times) / len(scores.columns["speed.latency_s"].values)
                values[side] = {
                    "answered": len(times),
                    "lost": lost,
                    "mean_s": round(sum(times) / len(times), 3) if times else None,
                }
        about = {"candidate": candidate, "champion": champion} if section else {}
        return StepOutput({"speed": workspace.artifacts.put_directory(out, "speed", about).digest}, values)

    def measured(section: "Speed") -> "SpeedScores":
        from sluice.components.served import loaded, vllm_url
        from sluice.evaluation.items import ITEMS_FILE, read_items
        from sluice.evaluation.outcomes import Prompt
        from sluice.evaluation.speed import measure_speed
        from sluice.serving.vllm import VllmClient

        rows = {item.id: item for item in read_items(workspace.folder(prompts) / ITEMS_FILE)}
        asked = [rows[item] for item in chosen.select(rows)]
        url = vllm_url(workspace.settings)
        client = VllmClient(url)
        with loaded(workspace, champion, base, client) as old, loaded(workspace, candidate, base, client) as new:
            return measure_speed(
                [Prompt(item.id, item.messages, item.tools) for item in asked],
                base_url=f"{url}/v1",
                candidate=new,
                champion=old,
                section=section,
                sampling=chosen.generation.sampling,
                timeout_s=chosen.generation.timeout_s,
                report=running.report,
            )

    def made(number: int) -> StepRecord:
        return running.step(
            "speed",
            rooms=(
                "evaluation.answers",
                "evaluation.at_once",
                "evaluation.items",
                "evaluation.outcomes",
                "evaluation.scores",
                "evaluation.speed",
                "evaluation.speed_metrics",
                *SERVING,
                "components.answers",
                "components.speed",
            ),
            locks=("main", "serve"),
            parameters={
                "speed": section.model_dump(mode="json"),
                "generation": chosen.generation.model_dump(mode="json"),
                "items": chosen.items.model_dump(mode="json"),
                **served_as(workspace),
                **({"again": number} if number else {}),
            }
            if section
            else {"speed": None},
            inputs={"candidate": candidate, "champion": champion, "base": base, "prompts": prompts} if section else {},
            function=work,
        )

    def lost(record: StepRecord) -> bool:
        return any(side["lost"] > chosen.policy.least_error_budget for side in record.output.values.values())

    record = running.measured(made, lost)
    values = record.output.values
    sides = [
        f"{side} {values[side]['answered']} answers, {values[side]['mean_s']} s each"
        for side in ("candidate", "champion")
        if side in values
    ]
    running.say("; ".join(sides) or "the suite asks for no times")
    return record.output.artifacts["speed"]
