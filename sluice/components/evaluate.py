"""Candidate and champion on the same items, each through the server that would serve it, judged side by side."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from collections.abc import Mapping
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.canonical import Json
from sluice.provenance.steps import StepOutput, StepRecord


@component
def evaluate(
    candidate: str,
    champion: str,
    base: str,
    calibration: str,
    suite: str,
    prompts: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Dataset],
) -> None:
    """Ask both releases; an interrupted run asks only what is missing, a sequential suite stops when it is certain."""
    from sluice.components.evaluate import evaluate_step
    from sluice.components.task import digest_of, publish, task

    with task("evaluate") as running:
        digest = evaluate_step(
            running,
            candidate=candidate,
            champion=champion,
            base=base,
            prompts=digest_of(prompts),
            suite=suite,
            calibration=calibration,
        )
        publish(evaluation, digest, kind="evaluation", candidate=candidate, champion=champion)


def evaluate_step(
    running: Task,
    *,
    candidate: str,
    champion: str,
    base: str,
    prompts: str,
    suite: str,
    calibration: str = "",
    again: int = 0,
) -> str:
    """Digest of the evaluation: answers and scores of both releases, and the account of how much was measured.

    One that lost more answers or scores than the policy allows is inconclusive, and is made anew (`Task.measured`).
    """
    from sluice.components.judge import demoted_metrics
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    demoted = demoted_metrics(running.workspace, chosen, calibration)

    def work(folder: Path) -> StepOutput:
        from sluice.components.answers import asking, counted
        from sluice.components.judge import suite_judge
        from sluice.evaluation.answers import write_answers
        from sluice.evaluation.cache import open_cache
        from sluice.evaluation.head_to_head import head_to_head, lost
        from sluice.evaluation.items import ITEMS_FILE, read_items
        from sluice.evaluation.scores import write_scores
        from sluice.evaluation.stopping import write_stopping
        from sluice.rag.embed import MiniLmEmbedder

        workspace = running.workspace
        items = read_items(workspace.folder(prompts) / ITEMS_FILE)
        with (
            open_cache(workspace.evaluation_cache) as cache,
            asking(workspace, candidate, base, chosen, cache) as ask_candidate,
            asking(workspace, champion, base, chosen, cache) as ask_champion,
        ):
            found = head_to_head(
                items,
                chosen,
                candidate=ask_candidate,
                champion=ask_champion,
                judging=suite_judge(workspace, chosen, cache),
                embed=MiniLmEmbedder(),
                demoted=demoted,
                report=running.report,
            )
        out = folder / "artifact"
        for name, side in (("candidate", found.candidate), ("champion", found.champion)):
            write_scores(out / name, side.scores)
            write_answers(out / name / "answers.jsonl", side.answers)
        write_stopping(out, found.stopping)
        about = {"candidate": candidate, "champion": champion, "prompts": prompts, "suite": chosen.digest}
        manifest = workspace.artifacts.put_directory(out, "evaluation", about)
        values: dict[str, Json] = {
            "asked": found.stopping.sentence,
            "candidate": counted(found.candidate.answers),
            "champion": counted(found.champion.answers),
            "lost": lost(found, chosen, demoted),
        }
        return StepOutput({"evaluation": manifest.digest}, values)

    def arguments(number: int) -> dict[str, Json]:
        from sluice.components.answers import SERVING, served_as
        from sluice.components.judge import judge_of

        own = ("components.answers", "components.calibrate", "components.evaluate", "components.judge")
        return {
            "rooms": ("evaluation", "statistics", "rag.embed", *SERVING, *own),
            "locks": ("main", "serve"),
            "parameters": {
                "suite": chosen.digest,
                "judge": judge_of(running.workspace, chosen.judged).digest if chosen.judged else None,
                **served_as(running.workspace),
                **({"again": number} if number else {}),
            },
            "inputs": {
                "candidate": candidate,
                "champion": champion,
                "base": base,
                "prompts": prompts,
                **({"calibration": calibration} if calibration else {}),
            },
        }

    def made(number: int) -> StepRecord:
        return running.step("evaluate", **arguments(number), function=work)

    record = running.measured(made, lambda found: bool(found.output.values["lost"]), again)
    running.say(summary(record.output.values))
    return record.output.artifacts["evaluation"]


def summary(values: Mapping[str, Json]) -> str:
    """One line: `all 110 items asked; candidate 108 answered, 2 no answer; champion 110 answered`."""
    from sluice.components.answers import told

    sides = [f"{name} {told(values[name])}" for name in ("candidate", "champion")]
    return "; ".join([values["asked"], *sides, *([values["lost"]] if values["lost"] else [])])
