"""Why a gate decided as it did, in words: for the terminal, from the decision alone and what stands around it.

The decision says what was shown; `Standing` says what became of it since. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from sluice.evaluation import wording
from sluice.evaluation.calibration import JudgeCalibration
from sluice.evaluation.decision import CheckResult, Decision
from sluice.evaluation.stopping import Stopping
from sluice.provenance.canonical import Json, short


@dataclass(frozen=True)
class Standing:
    """What became of a decision. `version` is the candidate's number in MLflow, where it has one; `approvals` are the
    people who approved, `closed` says why no approval counts any more (promoted, rejected, failed); empty: none."""

    version: int | None = None
    approvals: tuple[str, ...] = ()
    closed: str = ""
    later: bool = False


@dataclass(frozen=True)
class Row:
    """One check. `gates`: empty, or why it does not."""

    metric: str
    slice: str
    champion: str
    candidate: str
    difference: str
    needed: str
    verdict: str
    gates: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """All that a reader is told: the verdict in a paragraph, each check, and notes as (what, sentence)."""

    verdict: str
    paragraph: str
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]
    next_step: str

    def to_json(self) -> Json:
        document = asdict(self)
        return {**document, "notes": [{"about": about, "says": says} for about, says in self.notes]}


def explain(
    decision: Decision,
    *,
    now: datetime,
    standing: Standing = Standing(),
    calibration: JudgeCalibration | None = None,
    stopping: Stopping | None = None,
) -> Explanation:
    """The explanation of a decision at a moment."""
    open_ = [result for result in decision.checks if not result.advisory and result.verdict != "pass"]
    counts = f"{sum(not result.advisory for result in decision.checks)} checks gate"
    advisory = sum(result.advisory for result in decision.checks)
    counts += f", {advisory} are shown only" if advisory else ""
    why = " ".join(result.reason for result in sorted(open_, key=lambda one: one.verdict))
    paragraph = decision.summary if decision.verdict == "inconclusive" or not why else f"{decision.summary} {why}"
    notes = (
        ("checks", f"{counts}; a pass needs every gating one, at {decision.policy.confidence:.0%} confidence."),
        *_corrected(decision),
        *_missing(decision),
        *_power(decision),
        *_judge(decision, calibration),
        *_sequential(decision, stopping),
        ("valid", _validity(decision, now)),
        ("approval", _approval(decision, standing)),
    )
    return Explanation(
        decision.verdict,
        paragraph,
        tuple(_row(result) for result in decision.checks),
        notes,
        _next(decision, standing, now),
    )


def _row(result: CheckResult) -> Row:
    found = result.evidence
    need = wording.need(result.check, found.metric if found else None)
    gates = "" if not result.advisory else "demoted" if result.demoted else "advisory"
    if found is None:
        return Row(result.check.metric, result.slice, "–", "–", "–", need, result.verdict, gates, result.reason)
    old, new = (wording.value(one, found.metric) for one in (found.champion, found.candidate))
    title = found.metric.title + (f", {found.metric.unit}" if found.metric.unit else "")
    return Row(title, result.slice, old, new, wording.difference(found), need, result.verdict, gates, result.reason)


def _corrected(decision: Decision) -> Iterator[tuple[str, str]]:
    tested = [one for one in decision.checks if not one.advisory and one.evidence and one.evidence.p is not None]
    if decision.policy.correction == "holm" and len(tested) > 1:
        says = "a pass has to hold after Holm's correction over all gating checks, slices and silent ones included."
        yield "correction", says


def _missing(decision: Decision) -> Iterator[tuple[str, str]]:
    lost = {
        result.title: f"{sum(result.evidence.missing.values())} of {result.evidence.total} "
        f"({wording.counts(result.evidence.missing)})"
        for result in decision.checks
        if result.evidence and result.evidence.missing
    }
    if lost:
        yield "missing", "; ".join(f"{title} lacks {what}" for title, what in lost.items()) + "."
    else:
        yield "missing", "no item lacks a score on either side."


def _power(decision: Decision) -> Iterator[tuple[str, str]]:
    """Of the checks that did not pass: what so many items can show at all."""
    found = [
        f"{one.title} {one.evidence.minimum_detectable_effect:.2g} with {one.evidence.n} items"
        + (f" ({one.evidence.needed_n} for what is asked)" if (one.evidence.needed_n or 0) > one.evidence.n else "")
        for one in decision.checks
        if one.evidence and one.evidence.minimum_detectable_effect and not one.advisory and one.verdict != "pass"
    ]
    if found:
        power = f"{decision.policy.power:.0%}"
        yield "power", f"the smallest true change that would be shown {power} of the time: {'; '.join(found)}."


def _judge(decision: Decision, calibration: JudgeCalibration | None) -> Iterator[tuple[str, str]]:
    if calibration is not None:
        each = [
            f"{one.metric.removeprefix('judged.').replace('_', ' ')} kappa {one.kappa:.2f} "
            f"[{one.kappa_low:.2f}, {one.kappa_high:.2f}] on {one.labelled} labels"
            for one in calibration.metrics
        ]
        floor = decision.policy.judge.kappa
        yield (
            "judge",
            f"{calibration.model}, against people: {'; '.join(each)} (lower limit {floor:.2f} needed to gate).",
        )
    for result in decision.checks:
        if result.demoted and not result.check.advisory:
            yield "judge", f"{result.title} does not gate: {result.demoted}."


def _sequential(decision: Decision, stopping: Stopping | None) -> Iterator[tuple[str, str]]:
    if any(result.evidence and result.evidence.always_valid for result in decision.checks):
        yield "intervals", "always-valid where items were looked at batch by batch: they hold however often one looked."
    if stopping is not None:
        yield "asked", f"{stopping.sentence}."


def _validity(decision: Decision, now: datetime) -> str:
    expires = datetime.fromisoformat(decision.expires)
    until = f"{expires.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if now >= expires:
        return f"expired {_long(now - expires)} ago, at {until}."
    return f"for another {_long(expires - now)}, until {until}."


def _long(time: timedelta) -> str:
    hours = time.total_seconds() / 3600
    if hours < 1:
        return f"{max(1, round(hours * 60))} minutes"
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"


def _approval(decision: Decision, standing: Standing) -> str:
    if standing.closed:
        return f"{standing.closed}."
    if decision.verdict != "pass":
        return "a decision that did not pass cannot be approved."
    because = f", because of {wording.joined(list(decision.second_approver_because))}" if decision.approvers > 1 else ""
    people = "one person has" if decision.approvers == 1 else "two different people have"
    given = f"; {wording.joined(list(standing.approvals))} did" if standing.approvals else "; nobody did yet"
    return f"{people} to approve{because}{given}."


def _next(decision: Decision, standing: Standing, now: datetime) -> str:
    version = str(standing.version) if standing.version is not None else "VERSION"
    if standing.later:
        return "There is a later decision about this candidate: `sluice gate explain` shows it."
    if standing.closed:
        return f"Nothing: {standing.closed}."
    if now >= datetime.fromisoformat(decision.expires):
        return "It has expired. `sluice run retrain` decides anew on the same answers."
    if decision.verdict == "pass":
        missing = decision.approvers - len(standing.approvals)
        if missing <= 0:
            return "It is approved; `sluice release status` shows the rollout."
        who = "another person" if standing.approvals else "a person"
        return f"Read the report, then {who}: `sluice approve {version} --reason WHY`, or `sluice reject {version}`."
    if decision.verdict == "fail":
        return (
            "The champion stays. Look at the worst items in the report, mend data or recipe, then `sluice run retrain`."
        )
    return f"The champion stays. {_mend(decision)}"


def _mend(decision: Decision) -> str:
    """What would make an inconclusive decision conclusive."""
    still = [one for one in decision.checks if not one.advisory and one.verdict == "inconclusive"]
    evidence = [one.evidence for one in still if one.evidence is not None]
    if not evidence:
        return "Have the suite measure what the policy checks: `sluice suite show` lists it."
    if any(one.obstacle and one.missing and one.n < one.total for one in evidence):
        return "Mend what lost the scores (above, by cause), then `sluice run retrain`: it asks only what is missing."
    if any(one.obstacle for one in evidence):
        return "Ask more items, or lower minimum_n in the policy if fewer are truly enough."
    needed = max((one.needed_n or 0 for one in evidence), default=0)
    more = f" (about {needed} would show what is asked)" if needed > max(one.n for one in evidence) else ""
    return f"Ask more items{more}, or ask for less in the policy; docs/evaluation.md tells what n buys."


def subject_line(decision: Decision) -> str:
    """`candidate 3f2a90cc1122 against champion 77ab...`."""
    return f"candidate {short(decision.subjects.candidate)} against champion {short(decision.subjects.champion)}"
