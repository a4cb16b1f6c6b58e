"""MLflow's record of what a version was made of: a logged model, without weights, and the registered model above it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sluice.infra.errors import ConflictError, InputError, UnavailableError
from sluice.infra.progress import Report
from sluice.provenance.canonical import short
from sluice.registry.mlflow_registry import MlflowRegistry, RegistryExists, pairs, quoted, unpaired

EXPERIMENT = "releases"
DIGEST_TAG = "release"
"""The tag that holds a version's identity, on versions and on logged models."""


def log_model(
    registry: MlflowRegistry,
    application: str,
    kind: str,
    digest: str,
    tags: Mapping[str, str],
    files: Mapping[str, Path],
    run_id: str | None,
    report: Report,
) -> str:
    """The id of the logged model (MLflow's record of what was made, without its weights), ready to be registered."""
    experiment = registry.experiment(EXPERIMENT)
    name = f"{application}-{short(digest)}"
    found = registry.post(
        "logged-models/search", experiment_ids=[experiment], filter=f"name = {quoted(name)}", max_results=50
    ).get("models", [])
    for model in found:
        other = unpaired(model["info"].get("tags")).get(DIGEST_TAG)
        if other != digest:
            raise ConflictError(
                f"The model {name!r} is registered in MLflow with another digest: {other}, not {digest}.",
                hint="It was changed by hand, or two digests begin alike. Remove the one that has no ledger entry.",
            )
    if found:
        info = min(found, key=lambda model: model["info"]["creation_timestamp_ms"])["info"]
    else:
        info = registry.post(
            "logged-models",
            experiment_id=experiment,
            name=name,
            model_type=kind,
            source_run_id=run_id,
            params=pairs({"release": digest, **tags}),
            tags=pairs({DIGEST_TAG: digest}),
        )["model"]["info"]
    model_id = str(info["model_id"])
    if info.get("status") != "LOGGED_MODEL_READY":
        registry.upload(files, info["artifact_uri"], model_id=model_id, report=report)
        if run_id is not None:
            _link_output(registry, run_id, model_id)
        registry.patch(f"logged-models/{model_id}", model_id=model_id, status="LOGGED_MODEL_READY")
    return model_id


def _link_output(registry: MlflowRegistry, run_id: str, model_id: str) -> None:
    """Show the model on its run's page. MLflow refuses the same link twice, so look, before and after."""
    try:
        if not _is_output(registry, run_id, model_id):
            registry.post("runs/outputs", run_id=run_id, models=[{"model_id": model_id, "step": 0}])
    except (InputError, UnavailableError):
        # The refusal may mean that another process linked it between the look and the call.
        if not _is_output(registry, run_id, model_id):
            raise


def _is_output(registry: MlflowRegistry, run_id: str, model_id: str) -> bool:
    outputs = registry.get("runs/get", run_id=run_id)["run"].get("outputs", {}).get("model_outputs", [])
    return any(output["model_id"] == model_id for output in outputs)


def create_model(registry: MlflowRegistry, application: str) -> None:
    """Make the application's registered model; one that exists is success."""
    about = (
        f"Everything that was a release of `{application}`, or wanted to be. The alias `champion` marks what "
        "users get, `challenger` what a few of them get in a canary, `candidate` what waits for approval. The signed "
        "ledger decides; this page shows it, and one of these that is moved by hand is put back. The alias `approved` "
        "is yours: put it on a version to approve it."
    )
    try:
        registry.post("registered-models/create", name=application, description=about)
    except RegistryExists:
        pass
