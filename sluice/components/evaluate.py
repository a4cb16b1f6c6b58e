"""Answers of a release to the held-out questions, through the server that would serve them."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput


@component
def evaluate(
    release: str, base: str, prompts: dsl.Input[dsl.Dataset], suite: str, answers: dsl.Output[dsl.Dataset]
) -> None:
    """Ask the release every held-out question; an interrupted run asks only what is missing."""
    from sluice.components.evaluate import evaluate_step
    from sluice.components.task import digest_of, publish, task

    with task("evaluate") as running:
        digest = evaluate_step(running, release=release, base=base, prompts=digest_of(prompts), suite=suite)
        publish(answers, digest, kind="answers", release=release)


def evaluate_step(running: Task, *, release: str, base: str, prompts: str, suite: str) -> str:
    """Digest of the answers of a release (its adapter loaded under its immutable name, without any route weight)."""
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    settings = running.workspace.settings

    def work(folder: Path) -> StepOutput:
        from sluice.components.served import loaded, vllm_url
        from sluice.evaluation.answers import Prompt, generate_answers, write_answers
        from sluice.evaluation.items import ITEMS_FILE, read_items
        from sluice.serving.vllm import VllmClient

        workspace = running.workspace
        rows = {item.id: item for item in read_items(workspace.folder(prompts) / ITEMS_FILE)}
        items = [Prompt(item, rows[item].messages) for item in chosen.select(rows)]
        client = VllmClient(vllm_url(settings))
        with loaded(workspace, release, base, client) as name:
            found = generate_answers(
                items,
                base_url=f"{vllm_url(settings)}/v1",
                model=name,
                work_dir=folder,
                sampling=chosen.generation.sampling,
                concurrency=chosen.generation.concurrency,
                patience=chosen.generation.patience,
                report=running.report,
            )
        out = folder / "artifact"
        out.mkdir(exist_ok=True)
        write_answers(out / "answers.jsonl", found)
        manifest = workspace.artifacts.put_directory(out, "answers", {"release": release, "prompts": prompts})
        outcomes: dict[str, int] = {}
        for answer in found:
            outcomes[answer.outcome] = outcomes.get(answer.outcome, 0) + 1
        return StepOutput({"answers": manifest.digest}, {"answers": len(found), "outcomes": outcomes})

    record = running.step(
        "evaluate",
        rooms=(
            "evaluation.answers",
            "evaluation.outcomes",
            "evaluation.items",
            "serving.adapters",
            "serving.vllm",
            "serving.vllm_worker",
            "components.evaluate",
        ),
        locks=("main", "serve"),
        parameters={
            "generation": chosen.generation.model_dump(mode="json"),
            "items": chosen.items.model_dump(mode="json"),
            "dtype": settings.serving.dtype,
            "max_model_len": settings.serving.max_model_len,
        },
        inputs={"release": release, "base": base, "prompts": prompts},
        function=work,
    )
    values = record.output.values
    running.say(f"{values['answers']} answers: " + ", ".join(f"{n} {kind}" for kind, n in values["outcomes"].items()))
    return record.output.artifacts["answers"]
