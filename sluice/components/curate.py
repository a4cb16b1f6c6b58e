"""Records to examples one can defend."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from pathlib import Path

from kfp import dsl

from sluice.components.task import Task, component
from sluice.provenance.steps import StepOutput


@component
def curate(
    records: dsl.Input[dsl.Dataset],
    holdout: dsl.Input[dsl.Dataset],
    index: str,
    minimum: int,
    validation_share: float,
    curated: dsl.Output[dsl.Dataset],
) -> None:
    """Select, de-duplicate, decontaminate, cap; split; write the dataset with its lineage and card."""
    from sluice.components.curate import curate_step
    from sluice.components.task import digest_of, publish, task

    with task("curate") as running:
        digest = curate_step(
            running,
            records=digest_of(records),
            holdout=digest_of(holdout),
            index=index,
            minimum=minimum,
            validation_share=validation_share,
        )
        publish(curated, digest, kind="dataset")


def curate_step(running: Task, *, records: str, holdout: str, index: str, minimum: int, validation_share: float) -> str:
    """Digest of the dataset made from these records."""

    def work(folder: Path) -> StepOutput:
        from sluice.curation.curate import curate
        from sluice.curation.dataset import DatasetSources, write_dataset
        from sluice.curation.harvest import read_summary
        from sluice.curation.holdout import read_holdout
        from sluice.curation.policy import CurationPolicy
        from sluice.curation.records import read_records

        workspace = running.workspace
        found = workspace.folder(records)
        curation = curate(
            read_records(found / "records.jsonl"),
            read_holdout(workspace.folder(holdout)),
            CurationPolicy(),
            report=running.report,
        )
        licences = corpus_licences(running, index)
        sources = DatasetSources(records, holdout, read_summary(found), licences, workspace.settings.application)
        summary = write_dataset(curation, folder, sources, minimum=minimum, validation_share=validation_share)
        metadata = {"records": records, "holdout": holdout, "policy": curation.policy.digest}
        manifest = workspace.artifacts.put_directory(folder, "dataset", metadata)
        values = {
            "train": summary.train,
            "validation": summary.validation,
            "by_rule": dict(summary.by_rule),
            "by_reason": dict(summary.by_reason),
        }
        return StepOutput({"dataset": manifest.digest}, values)

    record = running.step(
        "curate",
        rooms=("curation", "rag.corpus", "rag.index", "components.curate"),
        parameters={
            "application": running.workspace.settings.application,
            "minimum": minimum,
            "validation_share": validation_share,
        },
        inputs={"records": records, "holdout": holdout, "index": index},
        function=work,
    )
    values = record.output.values
    rules = ", ".join(f"{count} {rule}" for rule, count in values["by_rule"].items())
    dropped = sum(values["by_reason"].values())
    running.say(f"{values['train']} + {values['validation']} examples ({rules}); {dropped} dropped with reasons")
    return record.output.artifacts["dataset"]


def corpus_licences(running: Task, index: str) -> tuple[str, ...]:
    """Who may use the passages of an index how: one line for each licence and attribution in its corpus."""
    from sluice.rag.corpus import read_documents
    from sluice.rag.index import read_index

    corpus = read_index(running.workspace.folder(index)).corpus
    documents = read_documents(running.workspace.folder(corpus))
    return tuple(sorted({": ".join(filter(None, (one.license, one.attribution))) for one in documents} - {""}))
