"""An index as people see it: a version of the registered model `<application>-index`, with its gate's figures."""

from __future__ import annotations

from sluice.components.aliases import note_repairs
from sluice.components.workspace import Workspace
from sluice.infra.errors import UnavailableError
from sluice.provenance.canonical import Json


def show_index(workspace: Workspace, *, index: str, decision: str, result: Json, live: str | None) -> list[str]:
    """Register the index with its gate's decision, and point `champion` at the `live` one; what there is to tell.

    `result` is the gate's decision as JSON. The vector store's alias decides what is live; an MLflow that does not
    answer is told, and holds nothing up.
    """
    from sluice.registry.aliases import reconcile
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.versions import index_model, register_version, set_gate

    name = index_model(workspace.settings.application)
    try:
        registry = MlflowRegistry(workspace.settings.mlflow.tracking_uri)
        made = workspace.artifacts.manifest(index).metadata
        version = register_version(
            registry,
            application=name,
            kind="index",
            digest=index,
            tags={key: str(value) for key, value in {**made, **_figures(result["metrics"])}.items() if value},
            description="",
            files={},
            run_id=None,
        )
        if index != live or version.tags.get("gate") != "PASS":
            # Of a live index the page keeps the decision that made it live, not a later one against itself.
            set_gate(registry, version, result["verdict"], index_markdown(result), decision)
        return note_repairs(workspace, name, reconcile(registry, name, champion_digest=live, candidate_digest=None))
    except UnavailableError as error:
        return [f"MLflow does not show the index: {error.message}"]


def follow_live_index(workspace: Workspace) -> list[str]:
    """Put `champion` back on the index that queries go to, should somebody have moved it; what there is to tell."""
    from sluice.components.index_alias import find_index
    from sluice.registry.aliases import reconcile
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.versions import index_model, list_versions

    name = index_model(workspace.settings.application)
    try:
        registry = MlflowRegistry(workspace.settings.mlflow.tracking_uri)
        if not list_versions(registry, name):
            return []
        live = find_index(workspace)
        return note_repairs(workspace, name, reconcile(registry, name, champion_digest=live, candidate_digest=None))
    except UnavailableError as error:
        return [f"The index's alias in MLflow was not looked at: {error.message}"]


def index_markdown(result: Json) -> str:
    """The gate's figures for the version's page."""
    present = result["current_metrics"] or {}
    rows = [
        f"| {name} | {value:.3f} | {f'{present[name]:.3f}' if name in present else ''} |"
        for name, value in result["metrics"].items()
    ]
    return "\n\n".join(
        [
            f"**Gate: {result['verdict'].upper()}.** Asked {result['queries']} labelled questions.",
            "\n".join(["| Figure | This index | Live index |", "|---|---:|---:|", *rows]),
            "\n".join(f"- {reason}" for reason in result["reasons"]),
        ]
    )


def _figures(metrics: dict[str, float]) -> dict[str, str]:
    # MLflow takes no @ in a tag's name.
    return {name.replace("@", ".at."): f"{value:.3f}" for name, value in metrics.items()}
