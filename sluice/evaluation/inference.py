"""What measurements show: the interval of the difference, and the test that a check asks for.

Every check asks that something be above 0, its room: the gain (superiority), the gain and the margin (non-inferiority),
or the distance from the limit. One interval and one p-value of it decide; the statistics are in `sluice.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from sluice.evaluation import wording
from sluice.evaluation.pairing import Alone, Measured, Pairing
from sluice.evaluation.policy import AnyCheck, Limit, Policy
from sluice.statistics.bounded import bounded_mean, rate_interval, rate_p
from sluice.statistics.paired import (
    RESAMPLES,
    Floats,
    Interval,
    bootstrap_mean,
    mcnemar_exact,
    minimum_detectable_effect,
    needed_n,
    relative_gain,
    score_interval,
    score_p,
    seed_of,
)
from sluice.statistics.sequential import betting_p, confidence_sequence

Bounds = tuple[float, float] | None
_FEW = 20
"""Pairs from which the score interval of a difference of rates holds what it says: with 8 it lets twice as many losses
pass as alpha allows, with 20 a seventh more (exact enumeration, tests/evaluation)."""
_MANY = 4_000
"""Values above which resampling one by one costs more than it tells."""


@dataclass(frozen=True)
class Inference:
    """What measurements show: `interval` of the difference, `own` of the candidate's mean, `room` and one-sided `p` of
    the check, and `obstacle`, why they cannot count. `always_valid`: however often one looked."""

    obstacle: str = ""
    interval: Interval | None = None
    own: Interval | None = None
    room: Interval | None = None
    p: float | None = None
    minimum_detectable_effect: float | None = None
    needed_n: int | None = None
    always_valid: bool = False


@dataclass(frozen=True)
class _Mean:
    """A mean: its interval, and the one-sided p-value of "it is at most this"."""

    interval: Interval
    p_above: Callable[[float], float]


def infer(
    found: Pairing, own: Alone | None, check: AnyCheck | None, policy: Policy, resamples: int = RESAMPLES
) -> Inference:
    """Interval and test; `own` is the candidate by itself, for a limit. Deterministic: seeds come from the values."""
    judged = found if own is None else own
    obstacle = "" if check is None else _obstacle(judged, check, policy)
    if judged.n < 2:
        return Inference(obstacle)
    told = Inference(obstacle, always_valid=judged.sequential and judged.metric.bounds is not None)
    gain = _gain(found, policy, resamples) if found.n > 1 else None
    if gain is not None:
        low, high = gain.interval.low, gain.interval.high
        told = replace(told, interval=gain.interval if found.metric.higher_is_better else Interval(-high, -low))
    if check is None:
        return told
    if judged.sequential and judged.metric.bounds is None:
        return replace(told, obstacle=obstacle or "it has no bounds, so no interval of it holds after looking")
    if check.rule == "limit":
        assert own is not None
        interval, room, p = _limit(own, check, policy, resamples)
        shown, needed = _detectable(own.values, interval, policy), _needed(own, check, policy)
        return replace(told, own=interval, room=room, p=p, minimum_detectable_effect=shown, needed_n=needed)
    assert gain is not None
    effect = check.minimum_effect if check.rule == "superiority" else 0.0
    if check.rule == "non_inferiority" and check.share is not None:
        mean = float(found.before.mean())
        if mean <= 0:
            return replace(told, obstacle=obstacle or f"the champion's mean is 0, so {check.margin} of it is nothing")
        tested, above, effect = _relative(found, check.share, policy, resamples), 0.0, check.share * mean
    else:
        effect = float(check.margin) if check.rule == "non_inferiority" else effect
        above = effect if check.rule == "non_inferiority" else 0.0
        tested = gain
    gains = found.after - found.before
    shown = _detectable(gains, gain.interval, policy)
    if effect:
        needed = needed_n(float(gains.std(ddof=1)), effect, alpha=policy.alpha, power=policy.power)
        told = replace(told, needed_n=needed)
    room = Interval(tested.interval.low + above, tested.interval.high + above)
    return replace(told, room=room, p=tested.p_above(-above), minimum_detectable_effect=shown)


def _gain(found: Pairing, policy: Policy, resamples: int) -> _Mean:
    """The difference turned so that more is better."""
    gains = (found.after - found.before) * (1.0 if found.metric.higher_is_better else -1.0)
    rates = found.metric.kind == "binary" and _is_binary(found.before, found.after)
    if rates and not found.sequential and found.n >= _FEW:
        up, down, n = int((gains > 0).sum()), int((gains < 0).sum()), found.n
        interval = score_interval(up, down, n, confidence=policy.confidence)
        return _Mean(interval, lambda null: score_p(up, down, n, null) if null else mcnemar_exact(up, down))
    bounds = found.metric.bounds
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return _mean(gains, span, found, policy, resamples)


def _relative(found: Pairing, share: float, policy: Policy, resamples: int) -> _Mean:
    """Candidate against the champion's mean less (or more) a share of it, pair by pair: both means are uncertain."""
    high = found.metric.higher_is_better
    contrast = relative_gain(found.before, found.after, share, higher_is_better=high)
    if found.metric.bounds is None:
        return _mean(contrast, None, found, policy, resamples)
    low, top = (np.array([bound]) for bound in found.metric.bounds)
    corners = [relative_gain(a, b, share, higher_is_better=high) for a, b in ((low, top), (top, low))]
    bounds = tuple(sorted(float(one[0]) for one in corners))
    return _mean(contrast, (bounds[0], bounds[1]), found, policy, resamples)


def _mean(values: Floats, bounds: Bounds, about: Measured, policy: Policy, resamples: int) -> _Mean:
    """The mean of values [n]: always-valid, or of bounded values, or (without bounds) by the bootstrap."""
    confidence = policy.confidence
    if bounds is None and len(values) > _MANY:
        return _by_limit_theorem(values, confidence)
    if bounds is None:
        seed = seed_of([about.metric.name, list(about.items), values.tolist()])
        boot = bootstrap_mean(values, confidence=confidence, seed=seed, resamples=resamples)
        return _Mean(boot.interval, boot.p_greater)
    low, high = bounds
    values = np.clip(values, low, high)  # the last bit of a difference may lie outside
    if about.sequential:
        return _Mean(
            confidence_sequence(values, low, high, confidence, planned=about.planned),
            lambda null: betting_p(values, null, low, high, planned=about.planned),
        )
    if len(values) <= _MANY:
        mean = bounded_mean(values, low, high, confidence=confidence, resamples=resamples)
        return _Mean(mean.interval, mean.p_greater)
    # So many values take minutes one by one: moved outwards to a grid they take a second, and the interval still holds.
    grid = (high - low) / _MANY
    steps = (values - low) / grid
    under, over = (np.clip(low + grid * end(steps), low, high) for end in (np.floor, np.ceil))
    below, above = (bounded_mean(one, low, high, confidence=confidence, resamples=resamples) for one in (under, over))
    return _Mean(Interval(below.interval.low, above.interval.high), below.p_greater)


def _by_limit_theorem(values: Floats, confidence: float) -> _Mean:
    """Student's t, which a mean of thousands of values without bounds follows closely enough."""
    from scipy import stats

    if np.ptp(values) == 0:
        return _Mean(Interval(float(values[0]), float(values[0])), lambda null: float(values[0] <= null))
    found = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    return _Mean(
        Interval(float(found.low), float(found.high)),
        lambda null: float(stats.ttest_1samp(values, null, alternative="greater").pvalue),
    )


def _limit(own: Alone, check: Limit, policy: Policy, resamples: int) -> tuple[Interval, Interval, float]:
    """Interval of the candidate's own mean, of its distance from the limit, and the p-value that it is kept."""
    n, bounds = own.n, own.metric.bounds
    below: Callable[[float], float]
    above: Callable[[float], float]
    if own.metric.kind == "binary" and not own.sequential and _is_binary(own.values):
        hits = int(own.values.sum())
        interval = rate_interval(hits, n, confidence=policy.confidence)
        below, above = (lambda x: rate_p(hits, n, x, "less")), (lambda x: rate_p(hits, n, x, "greater"))
    else:
        mean = _mean(own.values, bounds, own, policy, resamples)
        turned = None if bounds is None else (-bounds[1], -bounds[0])
        interval, above = mean.interval, mean.p_above
        below = lambda x: _mean(-own.values, turned, own, policy, resamples).p_above(-x)  # noqa: E731
    rooms, ps = [], []
    if check.at_most is not None:
        rooms.append(Interval(check.at_most - interval.high, check.at_most - interval.low))
        ps.append(below(check.at_most))
    if check.at_least is not None:
        rooms.append(Interval(interval.low - check.at_least, interval.high - check.at_least))
        ps.append(above(check.at_least))
    return interval, Interval(min(one.low for one in rooms), min(one.high for one in rooms)), max(ps)


def _needed(own: Alone, check: Limit, policy: Policy) -> int | None:
    """About how many items would show that the limit is kept, were the measured mean the true one."""
    mean = float(own.values.mean())
    distances = [check.at_most - mean] if check.at_most is not None else []
    distances += [mean - check.at_least] if check.at_least is not None else []
    if not distances or min(distances) <= 0:
        return None
    known = needed_n(float(own.values.std(ddof=1)), min(distances), alpha=policy.alpha, power=policy.power)
    if own.metric.bounds != (0.0, 1.0):
        return known
    # Of values that hardly vary: n without the worst value leave a rate of 1 - alpha ** (1 / n) of it possible.
    return max(known, math.ceil(math.log(policy.alpha) / math.log1p(-min(min(distances), 1 - 1e-9))))


def _obstacle(found: Measured, check: AnyCheck, policy: Policy) -> str:
    """Why the evidence cannot count at all; empty when it can."""
    if found.total == 0:
        return "there is nothing to compare, it has 0 items"
    lacking, budget = found.total - found.n, policy.error_budget_of(check)
    if lacking > budget * found.total:
        return (
            f"{lacking} of {_items(found.total)} ({lacking / found.total:.1%}) lack a score "
            f"({wording.counts(found.missing)}), and the error budget is {budget:.1%}{_at_worst(found)}"
        )
    if found.n < (needed := policy.minimum_n_of(check)):
        sides = "a score" if check.rule == "limit" else "scores on both sides"
        return f"{_items(found.n)} {'has' if found.n == 1 else 'have'} {sides}, and the policy needs {needed}"
    return ""


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _at_worst(found: Measured) -> str:
    """What the missing values could have made of it."""
    if found.worst is None:
        return ""
    if isinstance(found, Alone):
        low, high = (wording.value(one, found.metric) for one in (found.worst.low, found.worst.high))
        return f"; with them the mean would lie between {low} and {high}"
    ends = (found.worst.low, found.worst.high)
    against, favour = ends if found.metric.higher_is_better else reversed(ends)
    worst, best = (wording.change(one, found.metric) for one in (against, favour))
    return f"; the difference would be {worst} if all of them went against the candidate, {best} if all went for it"


def _is_binary(*sides: Floats) -> bool:
    return all(bool(np.isin(one, (0.0, 1.0)).all()) for one in sides)


def _detectable(values: Floats, interval: Interval, policy: Policy) -> float:
    half = (interval.high - interval.low) / 2
    return minimum_detectable_effect(half, float(values.std(ddof=1)), len(values), power=policy.power)
