"""An adapter and its base model to one merged model: what a server of one release holds."""

from __future__ import annotations

from pathlib import Path

from sluice.components.task import Task
from sluice.components.verification import verify_release
from sluice.components.workspace import Workspace
from sluice.infra.errors import IntegrityError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import short
from sluice.provenance.steps import StepOutput, StepRecord

ROOMS = (
    "training.full_model",
    "training.merge",
    "training.round_trip",
    "training.safetensors_file",
    "components.merge",
)


def merge_release(workspace: Workspace, adapter: str, base: str, report: Report = no_report) -> StepRecord:
    """The record of the step that merged this adapter into this base; made once, and found ever after.

    The adapter is verified first: its bytes, its signature, the statement of its training, and that the ledger holds a
    decision for it. The record's own signed statement names adapter and base as what the model was made of, and was
    verified when this returns. Raises `IntegrityError` when the merged model would not answer as the adapter does,
    `GateRefused` without a decision, `StepFailed` when PEFT cannot merge.
    """
    folder = verify_release(workspace, adapter)
    trained_on = workspace.artifacts.manifest(adapter).metadata.get("base")
    if trained_on not in (None, base):
        raise IntegrityError(
            f"The adapter {short(adapter)} was trained on the base model {short(str(trained_on))}, "
            f"and would be merged into {short(base)}.",
            hint="Set SLUICE_BASE_MODEL back, or train it again on this base.",
        )

    def work(scratch: Path) -> StepOutput:
        from sluice.training.merge import merge_adapter

        report(0, 0, f"merging {short(adapter)} into its base model")
        merged = merge_adapter(workspace.folder(base), folder, scratch / "model")
        made = workspace.artifacts.put_directory(merged.model_dir, "model", {"base": base, "adapter": adapter}, report)
        return StepOutput(
            {"model": made.digest},
            {
                "bytes": made.size,
                "exact_difference": merged.exact_difference,
                "stored_difference": merged.stored_difference,
                "answer_difference": merged.answer_difference,
                "agreement": merged.agreement,
            },
        )

    key, sources = Task.key("merge", rooms=ROOMS, parameters={}, inputs={"adapter": adapter, "base": base})
    record, _ = workspace.steps.run(key, work, report, sources)
    workspace.steps.verify(record)
    return record
