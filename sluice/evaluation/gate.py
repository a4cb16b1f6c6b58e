"""The gate: a policy and a paired comparison in, a decision out.

Three verdicts. `pass`: every gating check was shown. `fail`: one was refuted. `inconclusive`: neither, be it for too
few items, too many errors, a number that is none, or an interval that straddles the margin. Only `pass` opens the way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sluice.evaluation import wording
from sluice.evaluation.comparison import Comparison, MetricComparison
from sluice.evaluation.decision import DECISION_VERSION, CheckResult, Decision, Subjects, Verdict, read_decision
from sluice.evaluation.policy import AnyCheck, ChangeKind, Limit, NonInferiority, Policy, Superiority
from sluice.infra.errors import InputError

__all__ = ["DECISION_VERSION", "CheckResult", "Decision", "Subjects", "Verdict", "decide", "read_decision"]

CHANGES: Mapping[ChangeKind, str] = {
    "base": "another base model",
    "recipe": "another training recipe",
    "data": "another dataset",
    "tokenizer": "another tokenizer",
    "chat_template": "another chat template",
    "configuration": "another configuration",
    "suite": "another evaluation suite",
    "first": "the first gated release, with no gated champion before it",
}
"""What differs from the champion, in words."""


def decide(
    comparison: Comparison,
    policy: Policy,
    subjects: Subjects,
    now: datetime,
    *,
    longest_valid_hours: float = math.inf,
    changes: Collection[ChangeKind] = frozenset(),
) -> Decision:
    """Apply the policy. The same inputs give the same decision, byte for byte.

    `longest_valid_hours` is the installation's limit: it can shorten the policy's validity, never lengthen it.
    `changes` are the kinds of changes against the champion; those that the policy lists need a second approver. Raises
    `InputError` for a `now` without a time zone, or a comparison made at another confidence.
    """
    if now.tzinfo is None:
        raise InputError(f"now = {now.isoformat()} has no time zone.")
    if comparison.confidence != policy.confidence:
        raise InputError(f"The comparison has confidence {comparison.confidence}, the policy {policy.confidence}.")
    checks = tuple(
        _judge(check, found, comparison, policy)
        for check in policy.checks
        for found in _evidence(check, comparison, policy)
    )
    gating = [result for result in checks if not result.advisory]
    verdict: Verdict = "inconclusive"
    if any(result.verdict == "fail" for result in gating):
        verdict = "fail"
    elif gating and all(result.verdict == "pass" for result in gating):
        verdict = "pass"
    created = now.astimezone(UTC).replace(microsecond=0)
    expires = created + timedelta(hours=min(policy.valid_days * 24, longest_valid_hours))
    return Decision(
        verdict,
        _summary(verdict, gating, [one for one in checks if one.demoted and not one.check.advisory], comparison),
        checks,
        comparison.total,
        subjects,
        policy,
        created.isoformat(),
        expires.replace(microsecond=0).isoformat(),
        second_approver_because=tuple(CHANGES[kind] for kind in sorted(set(changes) & set(policy.second_approver))),
    )


def _evidence(check: AnyCheck, comparison: Comparison, policy: Policy) -> list[MetricComparison | None]:
    """What was compared for a check, slice by slice; None when its metric was not measured."""
    own = {one.slice for one in policy.checks if one.metric == check.metric} - {check.slice}
    found = [
        one
        for one in comparison.metrics
        if one.metric.name == check.metric
        and (one.slice == check.slice or (check.slice and one.slice.partition("=")[0] == check.slice))
        and one.slice not in own
    ]
    return [*found] or [None]


def _judge(check: AnyCheck, found: MetricComparison | None, comparison: Comparison, policy: Policy) -> CheckResult:
    demoted = comparison.demoted.get(check.metric, "")
    slice_ = found.slice if found else check.slice
    bare = CheckResult(check, slice_, check.advisory or bool(demoted), "inconclusive", "", found, demoted)
    if found is None:
        nothing = "there is nothing to compare, the suite gave 0 items"
        why = "it was not measured" if comparison.total else nothing
        return replace(bare, reason=f"{bare.title}: {why}.")
    if check.rule == "limit" and check.zero_tolerance and found.candidate:
        return replace(bare, verdict="fail", reason=f"{bare.title}: {_hits(found)}, and none is tolerated.")
    numbers = (found.room.low, found.room.high, found.p) if found.room else (None,)
    if found.obstacle or any(number is None or not math.isfinite(number) for number in numbers):
        return replace(bare, reason=f"{bare.title}: {found.obstacle or 'the comparison gave no finite interval'}.")
    # What stands outside the family of gating checks was not corrected, and need not be.
    significant = (found.p if found.adjusted_p is None else found.adjusted_p) <= policy.alpha  # type: ignore[operator]
    assert found.room is not None
    low, high = found.room.low, found.room.high
    result: tuple[Verdict, str]
    if check.rule == "superiority":
        result = _superior(check, found, low, high, significant)
    elif check.rule == "non_inferiority":
        result = _not_inferior(check, found, low, high, significant)
    else:
        result = _limited(check, found, low, high, significant)
    shown = wording.own(found) if check.rule == "limit" else wording.difference(found)
    return replace(bare, verdict=result[0], reason=f"{bare.title} {shown}: {result[1]}.")


def _superior(
    check: Superiority, found: MetricComparison, low: float, high: float, significant: bool
) -> tuple[Verdict, str]:
    mean = found.mean_gain or 0.0
    if low > 0 and significant and mean >= check.minimum_effect:
        return "pass", "better than the champion" + (
            f", and the measured gain is at least {check.minimum_effect:g}" if check.minimum_effect else ""
        )
    if high <= 0:
        return "fail", "not better than the champion"
    if high < check.minimum_effect:
        return "fail", f"not better by {check.minimum_effect:g}, which the interval excludes"
    if low > 0 and significant:
        return "inconclusive", f"better, but the measured gain is below the {check.minimum_effect:g} asked for"
    if low > 0:
        return "inconclusive", "better on its own, but not after correction for several checks"
    if found.pairs and not any(found.gains):
        return "inconclusive", f"not one of {found.n} items scores otherwise{_power(found, check.minimum_effect)}"
    return "inconclusive", f"a gain is neither shown nor excluded{_power(found, check.minimum_effect)}"


def _not_inferior(
    check: NonInferiority, found: MetricComparison, low: float, high: float, significant: bool
) -> tuple[Verdict, str]:
    margin = wording.margin(check, found.metric)
    loss = f"{'a drop' if found.metric.higher_is_better else 'an increase'} of {margin}"
    if low > 0 and significant:
        return "pass", f"{loss} is excluded"
    if high < 0:
        return "fail", f"worse than the champion by more than {margin}"
    if low > 0:
        return "inconclusive", f"{loss} is excluded on its own, but not after correction for several checks"
    return "inconclusive", f"{loss} is not excluded{_power(found, None)}"


def _limited(
    check: Limit, found: MetricComparison, low: float, high: float, significant: bool
) -> tuple[Verdict, str]:  # fmt: skip
    asked = wording.need(check, found.metric)
    if check.zero_tolerance:
        return "pass", f"none in {found.n} items"
    if low > 0 and significant:
        return "pass", f"{asked} is kept"
    if high < 0:
        return "fail", f"{asked} is not kept"
    if low > 0:
        return "inconclusive", f"{asked} is kept on its own, but not after correction for several checks"
    needed = f", about {found.needed_n} would show it" if (found.needed_n or 0) > found.n else ""
    return "inconclusive", f"{asked} is neither shown nor excluded by {found.n} items{needed}"


def _hits(found: MetricComparison) -> str:
    if found.metric.kind != "binary":
        return f"its mean is {wording.value(found.candidate, found.metric)}"
    return f"{round((found.candidate or 0) * found.n)} of {found.n} items"


def _power(found: MetricComparison, effect: float | None) -> str:
    """What so many items can show, and how many would show what is asked for."""
    if found.minimum_detectable_effect is None:
        return ""
    text = f"; {found.n} items would show {found.minimum_detectable_effect:.2g}"
    if found.needed_n and found.needed_n > found.n:
        asked = f"{effect:g}" if effect else "enough"
        text += f", {found.needed_n} items would show {asked}"
    return text


def _summary(verdict: Verdict, gating: list[CheckResult], demoted: list[CheckResult], comparison: Comparison) -> str:
    """One sentence that a reader understands who never saw a gate before."""
    items = f"on {comparison.total} held-out questions"
    if verdict == "pass":
        better = [_scored(result) for result in gating if result.check.rule == "superiority"]
        kept = _titles(result for result in gating if result.check.rule == "non_inferiority")
        within = _titles(result for result in gating if result.check.rule == "limit")
        claims = [f"better in {wording.joined(better)}"] if better else []
        claims += [f"not worse in {kept}"] if kept else []
        claims += [f"within the limits of {within}"] if within else []
        # What the policy wanted to gate, and could not: a reader must not take the pass for its pass.
        silent = [f"{result.title} did not count ({result.demoted})" for result in demoted]
        but = f" {wording.joined(silent)}." if silent else ""
        return f"The candidate may replace the champion: {items} its answers are {wording.joined(claims)}.{but}"
    if verdict == "fail":
        words = {"superiority": "not better in", "non_inferiority": "worse in", "limit": "beyond the limit of"}
        failed = [f"{words[one.check.rule]} {_scored(one)}" for one in gating if one.verdict == "fail"]
        return f"The candidate must not replace the champion: {items} its answers are {wording.joined(failed)}."
    if not gating:
        lower = [f"{name} ({reason})" for name, reason in sorted(comparison.demoted.items())]
        return f"The evidence does not decide, so the champion stays. Nothing may gate: {wording.joined(lower)}."
    still = [result.reason.rstrip(".") for result in gating if result.verdict == "inconclusive"]
    more = f". And {len(still) - _MOST} more checks" if len(still) > _MOST else ""
    return f"The evidence does not decide, so the champion stays. {'. '.join(still[:_MOST])}{more}."


_MOST = 3
"""Checks of a kind that a summary spells out."""


def _titles(results: Iterable[CheckResult]) -> str:
    """The first few, whole metrics before their slices; the rest is counted."""
    titles = [one.title for one in sorted(results, key=lambda one: bool(one.slice))]
    if len(titles) > _MOST + 1:
        titles = [*titles[:_MOST], f"{len(titles) - _MOST} more checks"]
    return wording.joined(titles) if titles else ""


def _scored(result: CheckResult) -> str:
    found = result.evidence
    if found is None:
        return result.title
    new, old = (wording.value(v, found.metric) for v in (found.candidate, found.champion))
    if result.check.rule == "limit":
        return f"{result.title} ({new}, {wording.need(result.check, found.metric)})"
    return f"{result.title} ({new} against {old})"
