"""What a release was made of, gathered from the chain for its bill of materials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sluice.components.curate import corpus_licences
from sluice.components.task import Task
from sluice.components.workspace import Workspace
from sluice.provenance.canonical import Json, short
from sluice.provenance.code import lock_digests, lock_files
from sluice.provenance.steps import StepOutput
from sluice.registry.bom import BOM_FILE, Material, Metric, ModelCard, build_bom
from sluice.registry.transfer.companions import pointers


def bill_of_materials(running: Task, adapter: str, statement: Json, *, dataset: str, decision: str) -> str:
    """Digest of the release's bill of materials (kind `bom`), made once for each decision. `statement` is the signed
    one about the adapter's training: it names the code and the commit."""
    workspace = running.workspace
    decided = json.loads(workspace.file(decision, "decision.json"))
    base = str(workspace.artifacts.manifest(adapter).metadata["base"])

    def work(_: Path) -> StepOutput:
        licences = corpus_licences(running, decided["index"])
        materials = [
            _base(workspace, base),
            _data(workspace, "dataset", dataset, "question and answer pairs from production traces", licences),
            _data(workspace, "holdout", decided["holdout"], "questions and references of the gate", licences),
            _data(workspace, "index", decided["index"], "the passages that answers were generated from", licences),
            _code(statement),
        ]
        release = Material(
            f"{workspace.settings.application}-{short(adapter)}",
            "model",
            adapter,
            "LoRA adapter",
            properties=_words(workspace.artifacts.manifest(adapter).metadata),
        )
        created = datetime.fromisoformat(decided["created"])
        card = _card(workspace, base, dataset, adapter, decided)
        data = build_bom(workspace.settings.application, release, materials, card, lock_files(), created)
        manifest = workspace.artifacts.put_files({BOM_FILE: data}, "bom", {"subject": adapter, "decision": decision})
        return StepOutput({"bom": manifest.digest})

    record = running.step(
        "bom",
        rooms=("registry.bom", "components.materials", "components.curate"),
        parameters={"locks": lock_digests()},
        inputs={
            "adapter": adapter,
            "base": base,
            "dataset": dataset,
            "decision": decision,
            "holdout": decided["holdout"],
            "index": decided["index"],
        },
        function=work,
    )
    bom = record.output.artifacts["bom"]
    # The latest one: a new decision about the same adapter makes a new bill.
    for key, pointer in pointers(adapter, {"bom": bom}).items():
        workspace.objects.put(key, pointer)
    return bom


def _base(workspace: Workspace, base: str) -> Material:
    about = workspace.artifacts.manifest(base).metadata
    licences = (str(about["license"]),) if about.get("license") else ()
    return Material(str(about.get("name", "base model")), "model", base, "base model", licences, _words(about))


def _data(workspace: Workspace, name: str, digest: str, description: str, licences: tuple[str, ...]) -> Material:
    about = workspace.artifacts.manifest(digest).metadata
    # A licence comes with the sentence of attribution that it asks for; the list wants its name.
    names = tuple(one.split(": ")[0] for one in licences)
    return Material(name, "data", digest, description, names, _words(about) | {"licences": "; ".join(licences)})


def _code(statement: Json) -> Material:
    found = {one["name"]: one for one in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    source = found.get("source", {})
    properties = {}
    if source:
        properties["commit"] = source["digest"]["gitCommit"]
        properties["changed"] = str(source.get("annotations", {}).get("dirty", "unknown")).lower()
    digest = f"sha256:{found['code']['digest']['sha256']}"
    return Material("sluice", "code", digest, "the sources that trained the adapter", ("Apache-2.0",), properties)


def _card(workspace: Workspace, base: str, dataset: str, adapter: str, decided: dict[str, Any]) -> ModelCard:
    metrics = [
        Metric(
            check["metric"],
            float(check["candidate"]),
            f"holdout, {check['n']} items",
            (float(check["interval"][0]), float(check["interval"][1])) if None not in check["interval"] else None,
        )
        for check in decided["checks"]
        if check["candidate"] is not None
    ]
    about = workspace.artifacts.manifest(adapter).metadata
    return ModelCard(
        str(workspace.artifacts.manifest(base).metadata.get("name", short(base))),
        (dataset,),
        {"gate": decided["verdict"], "gate-expires": decided["expires"], "seed": str(about.get("seed", ""))},
        tuple(metrics),
        (f"Measured on {decided['items']} held-out questions against {short(decided['champion'])}; nothing else is.",),
    )


def _words(metadata: Mapping[str, Json]) -> dict[str, str]:
    return {name: str(value) for name, value in metadata.items() if isinstance(value, str | int | float)}
