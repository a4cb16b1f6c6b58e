"""Answers of one release to every item of a suite, through the server that would serve them."""

# No `from __future__ import annotations` here: KFP's rule for this folder.
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.infra.progress import Report
from sluice.provenance.canonical import Json, digest_json
from sluice.provenance.steps import StepOutput

if TYPE_CHECKING:
    from sluice.evaluation.cache import Cache
    from sluice.evaluation.items import Item
    from sluice.evaluation.outcomes import Answer
    from sluice.evaluation.suite import Suite

SERVING = ("serving.adapters", "serving.vllm", "serving.vllm_worker")
"""The code that serves a release here: another one may answer otherwise."""

Ask = Callable[[Sequence["Item"], Report], list["Answer"]]


def answers_step(running: Task, *, release: str, base: str, prompts: str, suite: str) -> str:
    """Digest of the answers of a release to all items that the suite selects."""
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)

    def work(folder: Path) -> StepOutput:
        from sluice.evaluation.answers import write_answers
        from sluice.evaluation.cache import open_cache
        from sluice.evaluation.items import ITEMS_FILE, read_items

        workspace = running.workspace
        rows = {item.id: item for item in read_items(workspace.folder(prompts) / ITEMS_FILE)}
        items = [rows[item] for item in chosen.select(rows)]
        with open_cache(workspace.evaluation_cache) as cache, asking(workspace, release, base, chosen, cache) as ask:
            found = ask(items, running.report)
        out = folder / "artifact"
        out.mkdir(exist_ok=True)
        write_answers(out / "answers.jsonl", found)
        manifest = workspace.artifacts.put_directory(out, "answers", {"release": release, "prompts": prompts})
        return StepOutput({"answers": manifest.digest}, {"answers": len(found), "outcomes": counted(found)})

    record = running.step(
        "answers",
        rooms=(
            "evaluation.answers",
            "evaluation.at_once",
            "evaluation.outcomes",
            "evaluation.items",
            "evaluation.json_lines",
            "evaluation.cache",
            *SERVING,
            "components.answers",
        ),
        locks=("main", "serve"),
        parameters={
            "generation": chosen.generation.model_dump(mode="json"),
            "items": chosen.items.model_dump(mode="json"),
            **served_as(running.workspace),
        },
        inputs={"release": release, "base": base, "prompts": prompts},
        function=work,
    )
    values = record.output.values
    running.say(f"{values['answers']} answers: {told(values['outcomes'])}")
    return record.output.artifacts["answers"]


@contextmanager
def asking(workspace: Workspace, release: str, base: str, suite: "Suite", cache: "Cache") -> Iterator[Ask]:
    """A function that asks a release, its adapter loaded under its immutable name, without any route weight."""
    from sluice.components.served import loaded, vllm_url
    from sluice.evaluation.answers import Prompt, generate_answers
    from sluice.serving.vllm import VllmClient

    url = vllm_url(workspace.settings)
    generation = suite.generation
    with loaded(workspace, release, base, VllmClient(url)) as name:
        yield lambda items, report: generate_answers(
            [Prompt(item.id, item.messages, item.tools) for item in items],
            base_url=f"{url}/v1",
            model=name,
            model_digest=answering_digest(workspace, release, base),
            cache=cache,
            sampling=generation.sampling,
            concurrency=generation.concurrency,
            patience=generation.patience,
            report=report,
        )


def answering_digest(workspace: Workspace, release: str, base: str) -> str:
    """Digest of all of a served release that its answers depend on: weights, precision, and what serves it."""
    from sluice.provenance.code import code_digest

    serving: Json = {"code": code_digest(*SERVING, locks=("serve",)), **served_as(workspace)}
    return digest_json({"release": release, "base": base, "serving": serving})


def served_as(workspace: Workspace) -> dict[str, Json]:
    """The settings of serving that change answers."""
    serving = workspace.settings.serving
    return {"dtype": serving.dtype, "max_model_len": serving.max_model_len}


def counted(answers: Sequence["Answer"]) -> dict[str, Json]:
    """How many answers there are of each outcome."""
    outcomes = [answer.outcome for answer in answers]
    return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}


def told(outcomes: dict[str, Json]) -> str:
    """Outcomes in words: `108 answered, 2 no answer`."""
    return ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in outcomes.items())
