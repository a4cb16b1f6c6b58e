"""The items that judge a release: the frozen holdout as the live index makes its prompts, or the suite's own file."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from sluice.components.task import Task, component
from sluice.components.workspace import Workspace
from sluice.infra.object_store import ObjectExists
from sluice.provenance.canonical import canonical_json, digest_file, require_digest
from sluice.provenance.steps import StepOutput

if TYPE_CHECKING:
    from sluice.evaluation.items import Item

PASSAGES = 2
"""Passages that a prompt gets, here and in production."""


@component
def holdout(
    index: str, size: int, suite: str, items: dsl.Output[dsl.Dataset], prompts: dsl.Output[dsl.Dataset]
) -> None:
    """What training may never see: the held-out questions, frozen by the application's first run; and the prompts."""
    from sluice.components.holdout import held_out
    from sluice.components.task import publish, task

    with task("holdout") as running:
        held, asked = held_out(running, index=index, size=size, suite=suite)
        publish(items, held, kind="holdout")
        publish(prompts, asked, kind="prompts")


def held_out(running: Task, *, index: str, size: int, suite: str) -> tuple[str, str]:
    """Digests of what is kept out of training and of the prompts that the suite asks.

    A suite with items of its own (`items.source: file`) asks those as they are written, without retrieval; its
    questions are kept out of training beside the application's frozen ones.
    """
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    frozen = holdout_step(running, size=size)
    if chosen.items.source == "holdout":
        return frozen, holdout_prompts(running, items=frozen, index=index, asked=size)
    return suite_items(running, frozen=frozen, name=chosen.name, path=chosen.file(chosen.items.file))


def holdout_step(running: Task, *, size: int) -> str:
    """Digest of the frozen holdout; made by the first run of the application, the same ever after."""
    known = frozen_holdout(running.workspace)
    if known is not None:
        return known

    def choose(folder: Path) -> StepOutput:
        from sluice.curation.holdout import HoldoutItem, split_holdout, write_holdout
        from sluice.rag.corpus import load_faq

        items = [HoldoutItem(item.id, item.question, item.answer, item.category) for item in load_faq()]
        held, rest = split_holdout(items, size)
        write_holdout(held, folder)
        manifest = running.workspace.artifacts.put_directory(folder, "holdout", {"items": len(held)})
        return StepOutput({"items": manifest.digest}, {"held_out": len(held), "rest": len(rest)})

    record = running.step(
        "holdout", rooms=("curation.holdout", "rag.corpus"), parameters={"size": size}, inputs={}, function=choose
    )
    try:
        value = {"digest": record.output.artifacts["items"]}
        running.workspace.objects.put(_key(running.workspace), canonical_json(value), if_absent=True)
    except ObjectExists:
        pass
    return frozen_holdout(running.workspace) or record.output.artifacts["items"]


def frozen_holdout(workspace: Workspace) -> str | None:
    """Digest of the application's holdout, or None before it is frozen."""
    if workspace.objects.head(_key(workspace)) is None:
        return None
    return require_digest(str(json.loads(workspace.objects.get(_key(workspace)))["digest"]), "holdout")


def holdout_prompts(running: Task, *, items: str, index: str, asked: int) -> str:
    """Digest of the prompts: each held-out question with the passages that `index` gives it.

    `asked` is the size that this run was given; a frozen holdout keeps the one it was made with, and the task says so.
    """

    def build(folder: Path) -> StepOutput:
        from sluice.components.index_alias import vectors_uri
        from sluice.curation.holdout import read_holdout
        from sluice.evaluation.items import ITEMS_FILE, Item, write_items
        from sluice.rag.milvus import collection_name
        from sluice.rag.prompt import PROMPT_VERSION, build_messages
        from sluice.rag.retrieve import Retriever

        workspace = running.workspace
        held = read_holdout(workspace.folder(items))
        retriever = Retriever(vectors_uri(workspace), collection_name(workspace.settings.application, index))
        found = retriever.retrieve_many([item.question for item in held], k=PASSAGES)
        asked = []
        for item, retrieval in zip(held, found, strict=True):
            passages = tuple(passage.text for passage in retrieval.passages)
            messages = tuple(build_messages(item.question, list(passages)))
            slices = {"category": item.category} if item.category else {}
            asked.append(Item(item.id, item.question, item.reference, messages, passages, slices))
        write_items(folder / ITEMS_FILE, asked)
        metadata = {"holdout": items, "index": index, "prompt_version": PROMPT_VERSION}
        manifest = workspace.artifacts.put_directory(folder, "prompts", metadata)
        return StepOutput({"prompts": manifest.digest}, {"prompts": len(held)})

    record = running.step(
        "holdout-prompts",
        rooms=(
            "rag.prompt",
            "rag.retrieve",
            "rag.embed",
            "evaluation.items",
            "evaluation.json_lines",
            "components.holdout",
        ),
        parameters={"passages": PASSAGES},
        inputs={"holdout": items, "index": index},
        function=build,
    )
    found = record.output.values["prompts"]
    running.say(f"{found} held-out questions, frozen" + (f"; size {asked} changes nothing" if asked != found else ""))
    return record.output.artifacts["prompts"]


def suite_items(running: Task, *, frozen: str, name: str, path: Path) -> tuple[str, str]:
    """Digests of the frozen holdout with the questions of a suite's file added, and of the file's items as prompts."""

    def build(folder: Path) -> StepOutput:
        from sluice.curation.holdout import HoldoutItem, read_holdout, write_holdout
        from sluice.evaluation.items import ITEMS_FILE, read_items, write_items

        artifacts = running.workspace.artifacts
        read = read_items(path)
        own = [
            HoldoutItem(f"{name}/{item.id}", item.question, item.reference, item.slices.get("category", ""))
            for item in read
        ]
        write_holdout([*read_holdout(running.workspace.folder(frozen)), *own], folder / "holdout")
        write_items(folder / "prompts" / ITEMS_FILE, [_with_its_contexts(item) for item in read])
        held = artifacts.put_directory(folder / "holdout", "holdout", {"frozen": frozen, "suite": name})
        asked = artifacts.put_directory(folder / "prompts", "prompts", {"suite": name})
        return StepOutput({"holdout": held.digest, "prompts": asked.digest}, {"prompts": len(read)})

    record = running.step(
        "suite-items",
        rooms=("curation.holdout", "evaluation.items", "evaluation.json_lines", "rag.prompt", "components.holdout"),
        parameters={"suite": name, "file": digest_file(path)},
        inputs={"holdout": frozen},
        function=build,
    )
    found = record.output.values["prompts"]
    running.say(f"{found} question{'' if found == 1 else 's'} of suite {name}, kept out of training")
    return record.output.artifacts["holdout"], record.output.artifacts["prompts"]


def _with_its_contexts(item: "Item") -> "Item":
    """An item that brings passages and no messages is asked as production would ask with these passages."""
    from sluice.rag.prompt import build_messages

    alone = ({"role": "user", "content": item.question},)
    if not item.contexts or item.messages != alone:
        return item
    return replace(item, messages=tuple(build_messages(item.question, item.contexts)))


def _key(workspace: Workspace) -> str:
    return f"holdouts/{workspace.settings.application}.json"
