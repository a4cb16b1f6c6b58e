"""What a pairing shows: the interval of the difference, and the test that a check asks for.

Every check asks that something be above 0, its room: the gain (superiority), the gain and the margin (non-inferiority),
or the distance from the limit. One interval and one p-value of it decide; the statistics are in `sluice.statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sluice.evaluation import wording
from sluice.evaluation.pairing import Pairing
from sluice.evaluation.policy import AnyCheck, Limit, Policy
from sluice.statistics.paired import (
    RESAMPLES,
    Floats,
    Interval,
    bootstrap_mean,
    mcnemar_exact,
    minimum_detectable_effect,
    needed_n,
    score_interval,
    score_p,
    seed_of,
)


@dataclass(frozen=True)
class Inference:
    """What a pairing shows: `interval` of the difference, `own` of the candidate's mean, `room` and one-sided `p` of the
    check, and `obstacle`, why they cannot count."""

    obstacle: str = ""
    interval: Interval | None = None
    own: Interval | None = None
    room: Interval | None = None
    p: float | None = None
    minimum_detectable_effect: float | None = None
    needed_n: int | None = None


@dataclass(frozen=True)
class _Tested:
    """An interval of a mean, and the one-sided p-value that the mean is above 0."""

    interval: Interval
    p: float


def infer(found: Pairing, check: AnyCheck | None, policy: Policy, resamples: int = RESAMPLES) -> Inference:
    """Interval and test of a pairing. Deterministic: the bootstrap's seed comes from the pairs."""
    obstacle = "" if check is None else _obstacle(found, check, policy)
    if found.n < 2:
        return Inference(obstacle)
    values = found.own if found.candidate_only else found.after - found.before
    effect = _effect(check, found)
    told = Inference(
        obstacle,
        _difference(found, policy, resamples).interval if len(found.items) > 1 else None,
        minimum_detectable_effect=_detectable(values, policy),
        needed_n=_needed(values, effect, policy) if effect else None,
    )
    if check is None:
        return told
    if check.rule == "limit":
        own, room, p = _limit(found, check, policy)
        return replace(told, own=own, room=room, p=p)
    if check.rule == "non_inferiority" and check.share is not None:
        if not found.champion_mean or found.champion_mean <= 0:
            return replace(told, obstacle=obstacle or f"the champion's mean is 0, so {check.margin} of it is nothing")
        tested = _relative(found, check.share, policy, resamples)
    else:
        margin = float(check.margin) if check.rule == "non_inferiority" else 0.0
        tested = _difference(found, policy, resamples, margin)
    return replace(told, room=tested.interval, p=tested.p)


def _difference(found: Pairing, policy: Policy, resamples: int, margin: float | None = None) -> _Tested:
    """Without a margin: interval of candidate minus champion. With one: that of the gain and the margin together."""
    sign = 1.0 if found.metric.higher_is_better or margin is None else -1.0
    gains = sign * (found.after - found.before)
    above = margin or 0.0
    if _is_binary(found):
        gained, lost = int((gains > 0).sum()), int((gains < 0).sum())
        interval = score_interval(gained, lost, found.n, confidence=policy.confidence)
        p = score_p(gained, lost, found.n, -above) if above else mcnemar_exact(gained, lost)
        return _Tested(_moved(interval, above), p)
    bounds = found.metric.bounds
    span = None if bounds is None else bounds[1] - bounds[0]
    return _mean(gains, above, None if span is None else -span, found, policy, resamples)


def _relative(found: Pairing, share: float, policy: Policy, resamples: int) -> _Tested:
    """Candidate against the champion's mean less (or more) a share of it, pair by pair: both means are uncertain."""
    high = found.metric.higher_is_better
    contrast = found.after - (1 - share) * found.before if high else (1 + share) * found.before - found.after
    bounds = found.metric.bounds
    return _mean(contrast, 0.0, None if bounds is None else -bounds[1] * (1 + share), found, policy, resamples)


def _mean(
    values: Floats, above: float, lowest: float | None, found: Pairing, policy: Policy, resamples: int
) -> _Tested:  # fmt: skip
    """Interval of the mean of `values + above` by the bootstrap, and the p-value that it is above 0."""
    if np.ptp(values) == 0:
        return _constant(float(values[0]) + above, None if lowest is None else lowest + above, len(values), policy)
    seed = seed_of([found.metric.name, [[item, before, after] for item, before, after in found.pairs]])
    boot = bootstrap_mean(values, confidence=policy.confidence, seed=seed, resamples=resamples)
    return _Tested(_moved(boot.interval, above), boot.p_greater(-above))


def _constant(value: float, lowest: float | None, n: int, policy: Policy) -> _Tested:
    """Nothing varies, so nothing can be resampled. The p-value is that of the sign test."""
    return _Tested(Interval(value, value), 0.5**n if value > 0 else 1.0)


def _limit(found: Pairing, check: Limit, policy: Policy) -> tuple[Interval, Interval, float]:
    """Interval of the candidate's own mean, of its distance from the limit, and the p-value that it keeps it."""
    from scipy import stats

    values, n = found.own, found.n
    rooms: list[Interval] = []
    ps: list[float] = []
    binary = found.metric.kind == "binary" and bool(np.isin(values, (0.0, 1.0)).all())
    hits = int(values.sum()) if binary else 0
    if binary:
        exact = stats.binomtest(hits, n).proportion_ci(policy.confidence, method="exact")
        own = Interval(float(exact.low), float(exact.high))
    elif np.ptp(values) == 0:
        own = Interval(float(values[0]), float(values[0]))
    else:
        seed = seed_of([found.metric.name, values.tolist()])
        own = bootstrap_mean(values, confidence=policy.confidence, seed=seed).interval
    for bound, sign in ((check.at_most, -1.0), (check.at_least, 1.0)):
        if bound is None:
            continue
        rooms.append(
            Interval(own.low - bound, own.high - bound) if sign > 0 else Interval(bound - own.high, bound - own.low)
        )
        if binary:
            ps.append(float(stats.binomtest(hits, n, bound, alternative="less" if sign < 0 else "greater").pvalue))
        elif np.ptp(values) == 0:
            ps.append(0.5**n if sign * (float(values[0]) - bound) > 0 else 1.0)
        else:
            boot = bootstrap_mean(sign * values, confidence=policy.confidence, seed=seed)
            ps.append(boot.p_greater(sign * bound))
    room = Interval(min(one.low for one in rooms), min(one.high for one in rooms))
    return own, room, max(ps)


def _obstacle(found: Pairing, check: AnyCheck, policy: Policy) -> str:
    """Why the evidence cannot count at all; empty when it can."""
    if found.total == 0:
        return "there is nothing to compare, the suite gave 0 items"
    lacking, budget = found.total - found.n, policy.error_budget_of(check)
    if lacking > budget * found.total:
        return (
            f"{lacking} of {_items(found.total)} ({lacking / found.total:.1%}) lack a score "
            f"({wording.counts(found.missing)}), and the error budget is {budget:.1%}{_at_worst(found)}"
        )
    if found.n < (needed := policy.minimum_n_of(check)):
        sides = "a score" if found.candidate_only else "scores on both sides"
        verb = "has" if found.n == 1 else "have"
        return f"{_items(found.n)} {verb} {sides}, and the policy needs {needed}"
    return ""


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _at_worst(found: Pairing) -> str:
    """What the missing values could have made of it."""
    if found.worst is None:
        return ""
    if found.candidate_only:
        low, high = (wording.value(one, found.metric) for one in (found.worst.low, found.worst.high))
        return f"; with them the mean would lie between {low} and {high}"
    against, favour = found.worst.low, found.worst.high
    if not found.metric.higher_is_better:
        against, favour = favour, against
    worst, best = (wording.change(one, found.metric) for one in (against, favour))
    return f"; the difference would be {worst} if all of them went against the candidate, {best} if all went for it"


def _is_binary(found: Pairing) -> bool:
    both = (found.before, found.after)
    return found.metric.kind == "binary" and all(bool(np.isin(one, (0.0, 1.0)).all()) for one in both)


def _moved(interval: Interval, by: float) -> Interval:
    return Interval(interval.low + by, interval.high + by)


def _effect(check: AnyCheck | None, found: Pairing) -> float:
    """The difference that the check turns on; 0 when it names none."""
    if check is None or check.rule == "limit":
        return 0.0
    if check.rule == "superiority":
        return check.minimum_effect
    return check.share * abs(found.champion_mean or 0.0) if check.share is not None else float(check.margin)


def _detectable(values: Floats, policy: Policy) -> float:
    return minimum_detectable_effect(float(values.std(ddof=1)), len(values), alpha=policy.alpha, power=policy.power)


def _needed(values: Floats, effect: float, policy: Policy) -> int:
    return needed_n(float(values.std(ddof=1)), effect, alpha=policy.alpha, power=policy.power)
