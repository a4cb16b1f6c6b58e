"""Two releases' answers to the same questions, a policy, a signed decision."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from kfp import dsl

from sluice.components.evidence import Measurements
from sluice.components.task import Task, component
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, canonical_json, short
from sluice.provenance.steps import StepOutput, StepRecord


@component
def gate(
    candidate: str,
    champion: str,
    index: str,
    suite: str,
    calibration: str,
    items: dsl.Input[dsl.Dataset],
    prompts: dsl.Input[dsl.Dataset],
    dataset: dsl.Input[dsl.Dataset],
    training: dsl.Input[dsl.Artifact],
    evaluation: dsl.Input[dsl.Dataset],
    benchmark_candidate: dsl.Input[dsl.Dataset],
    benchmark_champion: dsl.Input[dsl.Dataset],
    safety_candidate: dsl.Input[dsl.Dataset],
    safety_champion: dsl.Input[dsl.Dataset],
    speed: dsl.Input[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    decision: dsl.Output[dsl.Artifact],
) -> str:
    """Decide, write the report people read, record the decision in the ledger. Returns the verdict, one word."""
    from sluice.components.evidence import Measurements
    from sluice.components.gate import gate_step
    from sluice.components.task import digest_of, publish, task

    with task("gate") as running:
        record = gate_step(
            running,
            candidate=candidate,
            champion=champion,
            index=index,
            suite=suite,
            items=digest_of(items),
            prompts=digest_of(prompts),
            dataset=digest_of(dataset),
            training=digest_of(training),
            measured=Measurements(
                evaluation=digest_of(evaluation),
                calibration=calibration,
                benchmark_candidate=digest_of(benchmark_candidate),
                benchmark_champion=digest_of(benchmark_champion),
                safety_candidate=digest_of(safety_candidate),
                safety_champion=digest_of(safety_champion),
                speed=digest_of(speed),
            ),
        )
        publish(report, record.output.artifacts["report"], kind="report")
        publish(decision, record.output.artifacts["decision"], kind="decision")
    return str(record.output.values["verdict"])


def gate_step(
    running: Task,
    *,
    candidate: str,
    champion: str,
    index: str,
    suite: str,
    items: str,
    prompts: str,
    dataset: str,
    training: str,
    measured: Measurements,
) -> StepRecord:
    """The gate's record: artifacts `report` and `decision`, values `verdict`, `summary`, `checks`."""
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    settings = running.workspace.settings

    from sluice.components.judge import demoted_metrics
    from sluice.components.origins import compare_origins

    require_evaluation_of(
        running.workspace,
        measured.evaluation,
        {"candidate": candidate, "champion": champion, "prompts": prompts, "suite": chosen.digest},
    )
    # What the ledger and the settings say today is part of the key: the same inputs give the same decision.
    origins = compare_origins(running.workspace, candidate, champion, chosen)
    demoted = demoted_metrics(running.workspace, chosen, measured.calibration)

    def work(folder: Path) -> StepOutput:
        from sluice.components.evidence import scores_of_side
        from sluice.components.gate_report import report_evidence
        from sluice.evaluation.comparison import compare
        from sluice.evaluation.gate import Subjects, decide
        from sluice.evaluation.items import ITEMS_FILE, read_items
        from sluice.evaluation.report import write_report

        workspace = running.workspace
        new, old = (scores_of_side(workspace, measured, side) for side in ("candidate", "champion"))
        slices = {item.id: item.slices for item in read_items(workspace.folder(prompts) / ITEMS_FILE)}
        comparison = compare(old, new, chosen.policy, slices=slices, demoted=demoted)
        subjects = Subjects(
            candidate=candidate,
            champion=champion,
            holdout=items,
            suite=chosen.digest,
            index=index,
            evidence=measured.by_name(),
        )
        decided = decide(
            comparison,
            chosen.policy,
            subjects,
            datetime.now(UTC),
            longest_valid_hours=settings.release.decision_valid_hours,
            changes=origins.kinds,
        )
        evidence = report_evidence(
            workspace,
            chosen,
            measured,
            candidate=candidate,
            champion=champion,
            candidate_scores=new,
            champion_scores=old,
            prompts=prompts,
            dataset=dataset,
            training=training,
            changes=origins.sentences,
        )
        write_report(folder / "report", decided, comparison, evidence)
        report = workspace.artifacts.put_directory(folder / "report", "report", {"candidate": candidate})
        sealed = decided.with_report(report.digest)
        files = {"decision.json": canonical_json(sealed.to_json())}
        decision = workspace.artifacts.put_files(files, "decision", {"candidate": candidate, "verdict": sealed.verdict})
        values: dict[str, Json] = {
            "verdict": sealed.verdict,
            "summary": sealed.summary,
            "expires": sealed.expires,
            "approvers": sealed.approvers,
            "checks": [check.to_json() for check in sealed.checks],
        }
        return StepOutput({"report": report.digest, "decision": decision.digest}, values)

    def decided_after(lapsed: str | None) -> StepRecord:
        return running.step(
            "gate",
            rooms=("evaluation", "statistics", "components.evidence", "components.gate", "components.gate_report"),
            parameters={
                "suite": chosen.digest,
                "valid_hours": settings.release.decision_valid_hours,
                "changes": list(origins.sentences),
                "demoted": dict(demoted),
                **({"lapsed": lapsed} if lapsed else {}),
            },
            inputs={
                "candidate": candidate,
                "champion": champion,
                "index": index,
                "holdout": items,
                "prompts": prompts,
                "dataset": dataset,
                "training": training,
                **measured.by_name(),
            },
            function=work,
        )

    record = decided_after(None)
    # A decision that nobody used in its time is made anew, on the same answers; people are asked again.
    while lapsed_unused(running, record, candidate):
        record = decided_after(str(record.output.values["expires"]))
    record_in_ledger(running, record, candidate=candidate, champion=champion, holdout=items)
    running.say(f"{record.output.values['verdict'].upper()}: {record.output.values['summary']}")
    return record


def require_evaluation_of(workspace: Workspace, evaluation: str, subjects: Mapping[str, str]) -> None:
    """Raises `InputError` when an evaluation is of something else than the gate is to decide about: a suite is read
    from its files by each step, so that one may have been changed in between."""
    about = workspace.artifacts.manifest(evaluation).metadata
    for name, expected in subjects.items():
        if about.get(name) != expected:
            raise InputError(
                f"The evaluation {short(evaluation)} is of another {name} than {short(expected)}, which the decision "
                "would be about.",
                hint="Was the suite changed while the run was under way? Start it again: answers are kept.",
            )


def lapsed_unused(running: Task, record: StepRecord, candidate: str) -> bool:
    """Whether the decision has expired and its candidate was neither released, nor failed, nor rejected."""
    from sluice.provenance.releases import read_state
    from sluice.provenance.times import parse_time

    if datetime.now(UTC) < parse_time(str(record.output.values["expires"]), "expires"):
        return False
    state = read_state(running.workspace.ledger)
    released = any(change.release == candidate for change in state.history())
    return not (released or state.failed(candidate) or state.rejection_of(candidate))


def record_in_ledger(running: Task, record: StepRecord, *, candidate: str, champion: str, holdout: str) -> None:
    """Write the decision into the ledger, unless it is the one that the ledger holds about the candidate.

    Writing it again would open a question that a person has answered: an approval belongs to one decision.
    """
    from sluice.provenance.releases import read_state, record_decision

    report = record.output.artifacts["report"]
    known = read_state(running.workspace.ledger).decision_for(candidate)
    if known is not None and known.report == report and known.expires == str(record.output.values["expires"]):
        return
    record_decision(
        running.workspace.ledger,
        adapter=candidate,
        verdict=record.output.values["verdict"],
        report=report,
        expires=str(record.output.values["expires"]),
        holdout=holdout,
        champion=champion,
        actor="gate",
        approvers=int(record.output.values["approvers"]),
    )
