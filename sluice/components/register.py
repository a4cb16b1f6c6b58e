"""A decided candidate becomes a version that people see, with its training, its gate and its data card."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
import re
from collections import Counter
from datetime import datetime
from typing import Any

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.canonical import short

LONGEST_NAME = 110
"""Characters of a metric's or slice's name in MLflow's names, which hold 250."""
_UNNAMEABLE = re.compile(r"[^\w\-.: ]")


@component
def register(
    adapter: dsl.Input[dsl.Model],
    training: dsl.Input[dsl.Artifact],
    dataset: dsl.Input[dsl.Dataset],
    decision: dsl.Input[dsl.Artifact],
    report: dsl.Input[dsl.HTML],
) -> int:
    """Register the candidate in MLflow, passed or refused. Returns the version's number."""
    from sluice.components.register import register_step
    from sluice.components.task import digest_of, task

    with task("register") as running:
        return register_step(
            running,
            adapter=digest_of(adapter),
            training=digest_of(training),
            dataset=digest_of(dataset),
            decision=digest_of(decision),
            report=digest_of(report),
        )


def register_step(running: Task, *, adapter: str, training: str, dataset: str, decision: str, report: str) -> int:
    """The version's number. Everything here may be repeated: MLflow shows what the chain holds, once."""
    from sluice.components.changes import changes_against, markdown_of
    from sluice.components.lineage import draw_lineage
    from sluice.components.materials import bill_of_materials
    from sluice.components.training_progress import REPORT
    from sluice.components.verification import verify_signature
    from sluice.registry.bom import BOM_FILE
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.model_signature import SIGNATURE_FILE
    from sluice.registry.run_page import DatasetReference, MetricPoint
    from sluice.registry.runs import log_gate_run, log_training_run
    from sluice.registry.versions import register_version, set_gate
    from sluice.training.adapter import check_adapter
    from sluice.training.recipe import Recipe

    workspace = running.workspace
    application = workspace.settings.application
    registry = MlflowRegistry(workspace.settings.mlflow.tracking_uri)
    made = workspace.artifacts.manifest(adapter).metadata
    account = json.loads(workspace.file(training, "training.json"))
    card = json.loads(workspace.file(dataset, "card.json"))
    decided = json.loads(workspace.file(decision, "decision.json"))
    page = workspace.folder(report)
    lineage = draw_lineage(workspace, adapter, workspace.settings.home / "lineage" / "pages" / f"{short(adapter)}.html")
    signature, statement = verify_signature(workspace, adapter)
    check_adapter(
        workspace.folder(adapter), workspace.folder(str(made["base"])), Recipe.model_validate(account["recipe"])
    )
    changes = changes_against(workspace, adapter, decided["champion"])
    bom = bill_of_materials(running, adapter, statement, dataset=dataset, decision=decision)
    trained = log_training_run(
        registry,
        application=application,
        adapter_digest=adapter,
        key=account["key"],
        dataset=DatasetReference("dataset", dataset, card["examples"]),
        parameters=account["recipe"],
        metrics=[
            MetricPoint(name, point[name], point["step"])
            for point in account["curve"]
            for name in ("loss", "learning_rate", "tokens_per_second")
        ],
        files={
            "data-card.html": workspace.folder(dataset) / "card.html",
            "training.json": workspace.folder(training) / "training.json",
            REPORT: workspace.folder(training) / REPORT,
            **lineage,
        },
        report=running.report,
    )
    gated = log_gate_run(
        registry,
        application=application,
        report_digest=report,
        candidate_digest=adapter,
        champion_digest=decided["champion"],
        verdict=decided["verdict"],
        metrics=gate_metrics(json.loads((page / "report.json").read_text())),
        tables=[name for name in ("items.json",) if (page / name).is_file()],
        files={path.relative_to(page).as_posix(): path for path in sorted(page.rglob("*")) if path.is_file()},
        holdout=DatasetReference("holdout", decided["holdout"], {"items": decided["items"]}, "evaluation"),
        parameters=decided["policy"],
        markdown=(page / "report.md").read_text(),
        finished=datetime.fromisoformat(decided["created"]).timestamp(),
        report=running.report,
    )
    version = register_version(
        registry,
        application=application,
        kind="adapter",
        digest=adapter,
        tags={"base": str(made["base"]), "dataset": dataset, "signature": signature.digest, "bom": bom},
        description="",
        files={
            "data-card.html": workspace.folder(dataset) / "card.html",
            "report.html": page / "report.html",
            **lineage,
            SIGNATURE_FILE: workspace.folder(signature.digest) / SIGNATURE_FILE,
            BOM_FILE: workspace.folder(bom) / BOM_FILE,
        },
        run_id=trained.run_id,
        report=running.report,
    )
    picture = "forest.png" if (page / "forest.png").is_file() else None
    version = set_gate(
        registry,
        version,
        decided["verdict"],
        f"{(page / 'report.md').read_text().rstrip()}\n\n{markdown_of(changes)}",
        decision,
        gate_run=gated,
        picture=picture,
        more={"Data card": f"{trained.url}/artifacts/data-card.html", "Training run": trained.url},
        second_approver=" and ".join(decided["second_approver_because"]),
    )
    running.state.values.update(
        version=version.number,
        url=version.url,
        training_run=trained.url,
        gate_run=gated.url,
        digest=adapter,
        signature=signature.digest,
        bom=bom,
        changes=[change.to_json() for change in changes],
    )
    running.say(f"version {version.number} ({short(adapter)}), gate {decided['verdict']}: {version.url}")
    return version.number


def gate_metrics(document: dict[str, Any]) -> dict[str, float]:
    """All figures of a report as MLflow metrics; what was not measured is left out.

    `token_f1/difference`, on a slice `token_f1/category:permits/difference`: MLflow's pages group metrics by what
    stands before a slash, and its names take letters, digits and `_-.: /` only.
    """
    found: dict[str, float] = {}
    for one in document["metrics"]:
        parts = [one["metric"], *([one["slice"].replace("=", ":", 1)] if one["slice"] else [])]
        place = "/".join(_UNNAMEABLE.sub("_", part)[:LONGEST_NAME] for part in parts)
        low, high = one["interval"]
        figures = {name: one[name] for name in ("champion", "candidate", "difference")}
        for name, value in {**figures, "low": low, "high": high, "n": one["n"]}.items():
            if value is not None:
                found[f"{place}/{name}"] = float(value)
    verdicts = Counter(check["verdict"] for check in document["decision"]["checks"] if not check["advisory"])
    return found | {f"checks/{verdict}": float(verdicts[verdict]) for verdict in ("pass", "fail", "inconclusive")}
