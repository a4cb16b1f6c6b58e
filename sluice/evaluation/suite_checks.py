"""What no single section of a suite can know: metrics, files and numbers that do not go together.

Each check yields the dotted field to change and why; `suite.py` adds file, line and value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sluice.evaluation.items import Item
from sluice.evaluation.policy import SMALLEST_BOOTSTRAP_N, AnyCheck
from sluice.evaluation.scores import Metric
from sluice.evaluation.speed_metrics import SPEED_METRICS
from sluice.infra.field_mistakes import Problem, listed, meant
from sluice.statistics.paired import RESAMPLES

SMALLEST_P = 1 / (RESAMPLES + 1)
"""No p-value of a resampled mean is smaller."""

if TYPE_CHECKING:
    from sluice.evaluation.suite import Suite
    from sluice.evaluation.suite_sections import Probe

PROBED: Mapping[Probe, tuple[str, ...]] = {
    "leakage": ("safety.canary_leak",),
    "personal_data": ("safety.personal_data",),
    "refusal": ("safety.refusal", "safety.false_refusal"),
    "toxicity": ("safety.toxicity",),
    "triggers": ("safety.trigger",),
}
"""What each probe measures."""

COST = "speed.cost_per_1000"


def measured(suite: Suite) -> tuple[str, ...]:
    """Names of the metrics that the suite's sections measure."""
    names = [*suite.metrics, *(suite.judged.metrics if suite.judged else ())]
    names += [f"benchmark.{task}" for task in (suite.benchmarks.tasks if suite.benchmarks else ())]
    names += [name for probe in (suite.safety.probes if suite.safety else ()) for name in PROBED[probe]]
    if suite.speed:
        names += [one.name for one in SPEED_METRICS if one.name != COST or suite.speed.price_per_hour]
    return tuple(names)


def problems_of(suite: Suite) -> list[Problem]:
    """Everything that does not go together, in the order of the sections."""
    return [*_metrics(suite), *_items(suite), *_checks(suite)]


def item_problems(suite: Suite, items: Sequence[Item]) -> list[Problem]:
    """Checks that the suite's own items can never answer: too few of them, or a slice that none has."""
    dimensions = {name for item in items for name in item.slices}
    found: list[Problem] = []
    for number, check in enumerate(suite.policy.checks):
        needed = suite.policy.minimum_n_of(check)
        on_items = suite.catalogue[check.metric].group in ("answers", "judged")
        if on_items and not check.advisory and not check.slice and len(items) < needed:
            says = f"has {len(items)} items, which can never reach minimum_n = {needed} of the check on {check.metric}"
            found.append(("items.file", says))
        if (name := check.slice.partition("=")[0]) and name not in dimensions:
            says = f"no item has {name!r}; {_there_are(dimensions)}{meant(name, dimensions)}"
            found.append((f"policy.checks.{number}.slice", says))
    return found


def _there_are(dimensions: Collection[str]) -> str:
    return f"items have {listed(sorted(dimensions))}" if dimensions else "items have no slices"


def _metrics(suite: Suite) -> Iterator[Problem]:
    known = suite.catalogue
    for field, names, group in (
        ("metrics", suite.metrics, "answers"),
        ("judged.metrics", suite.judged.metrics if suite.judged else (), "judged"),
    ):
        for number, name in enumerate(names):
            place = f"{field}.{number}"
            if name not in known:
                yield place, _unknown(name, known)
            elif known[name].group != group:
                yield place, f"is no metric of this list; {_how(known[name])}"
            elif name in names[:number]:
                yield place, "is given twice"


def _unknown(name: str, known: Mapping[str, Metric]) -> str:
    near = meant(name, known)
    return f"no such metric{near}" if near else f"no such metric; there are {', '.join(sorted(known))}"


def _how(metric: Metric) -> str:
    """How a suite comes to measure a metric."""
    if metric.group == "answers":
        return "list it under metrics"
    if metric.group == "judged":
        return "list it under judged.metrics"
    if metric.group == "safety":
        probe = next((probe for probe, names in PROBED.items() if metric.name in names), "")
        return f"list {probe} under safety.probes" if probe else "nothing measures it"
    if metric.group == "speed":
        return "give the suite a section speed" + (" with a price_per_hour" if metric.name == COST else "")
    return f"list {metric.name.removeprefix('benchmark.')} under benchmarks.tasks"


def _items(suite: Suite) -> Iterator[Problem]:
    if suite.items.source == "file" and not suite.items.file:
        yield "items.file", "is required with source: file"
    if suite.items.source == "holdout" and suite.items.file:
        yield "items.file", "means nothing with source: holdout; write source: file"
    if len(set(tasks := suite.benchmarks.tasks if suite.benchmarks else ())) < len(tasks):
        yield "benchmarks.tasks", "names a task twice"


def _checks(suite: Suite) -> Iterator[Problem]:
    known, does = suite.catalogue, suite.measured
    tests = len(suite.policy.gating) if suite.policy.correction == "holm" else 1
    if tests and suite.policy.alpha / tests < SMALLEST_P:
        yield (
            "policy.confidence",
            f"is too high for {tests} gating checks: no p-value is below {SMALLEST_P:g}, so nothing could pass",
        )
    for number, check in enumerate(suite.policy.checks):
        place = f"policy.checks.{number}"
        metric = known.get(check.metric)
        if metric is None:
            if check.metric.startswith("benchmark."):
                yield f"{place}.metric", f"the suite does not measure it; {_task_hint(check.metric)}"
            else:
                yield f"{place}.metric", _unknown(check.metric, known)
            continue
        if check.metric not in does:
            yield f"{place}.metric", f"the suite does not measure it; {_how(metric)}"
            continue
        yield from _direction(check, metric, place)
        yield from _scale(check, metric, place)
        if check.slice and metric.group in ("benchmark", "speed"):
            yield f"{place}.slice", f"{metric.group} has no items with slices; leave it out"
        if not check.advisory:
            yield from _gating(suite, check, metric, place)


def _task_hint(name: str) -> str:
    return f"list {name.removeprefix('benchmark.')} under benchmarks.tasks"


def _direction(check: AnyCheck, metric: Metric, place: str) -> Iterator[Problem]:
    own = "higher" if metric.higher_is_better else "lower"
    taste = metric.group == "answers" and metric.bounds is None
    if check.direction not in (None, own) and not taste:
        yield (
            f"{place}.direction",
            f"{metric.title} is better when it is {own}, so this would pass what is worse; only lengths can be turned",
        )


def _scale(check: AnyCheck, metric: Metric, place: str) -> Iterator[Problem]:
    """Margins and limits that this metric's range gives no meaning to."""
    if check.rule == "non_inferiority" and check.share is not None:
        if metric.bounds is not None and metric.bounds[0] < 0:
            yield f"{place}.margin", f"{metric.title} has no zero point to take a percentage from; give it in its unit"
        elif metric.kind == "binary" and not metric.higher_is_better:
            yield (
                f"{place}.margin",
                f"{metric.title} should be 0 at the champion, and a share of 0 tolerates nothing; give it as a rate",
            )
    elif metric.bounds is not None:
        low, high = metric.bounds
        span = high - low
        if check.rule == "non_inferiority" and not isinstance(check.margin, str) and check.margin >= span:
            yield f"{place}.margin", f"tolerates any loss: {metric.title} goes from {low:g} to {high:g}"
        if check.rule == "superiority" and check.minimum_effect >= span:
            yield f"{place}.minimum_effect", f"can never be reached: {metric.title} goes from {low:g} to {high:g}"
        if check.rule == "limit":
            yield from _range(place, "at_most", check.at_most, low, high, metric)
            yield from _range(place, "at_least", check.at_least, low, high, metric)


def _range(
    place: str, field: str, bound: float | None, low: float, high: float, metric: Metric
) -> Iterator[Problem]:  # fmt: skip
    if bound is None:
        return
    idle = bound >= high if field == "at_most" else bound <= low
    if idle or not low <= bound <= high:
        effect = "always holds" if idle else "can never hold"
        yield f"{place}.{field}", f"{effect}: {metric.title} goes from {low:g} to {high:g}"
    elif field == "at_least" and bound == high:
        yield f"{place}.{field}", "is the best there is, and no number of items shows that; ask for a little less"


def _gating(suite: Suite, check: AnyCheck, metric: Metric, place: str) -> Iterator[Problem]:
    policy = suite.policy
    needed = policy.minimum_n_of(check)
    field = "policy.minimum_n" if check.minimum_n is None else f"{place}.minimum_n"
    if metric.bounds is None and needed < SMALLEST_BOOTSTRAP_N:
        yield (
            field,
            f"is too few to gate on {metric.name}, which has no bounds: its bootstrap interval needs "
            f"{SMALLEST_BOOTSTRAP_N}; make the check advisory or ask for more items",
        )
    limits: dict[str, int | None] = {}
    if metric.group in ("answers", "judged"):
        limits["items.limit"] = suite.items.limit
    if metric.group == "judged" and suite.judged:
        limits["judged.limit"] = suite.judged.limit
        if not suite.judged.calibration:
            yield (
                f"{place}.metric",
                "cannot gate: the judge is never calibrated; name labelled items in judged.calibration, "
                "or make the check advisory",
            )
    if metric.group == "benchmark" and suite.benchmarks:
        limits["benchmarks.limit"] = suite.benchmarks.limit
    if metric.group == "speed" and suite.speed:
        limits["speed.requests"] = suite.speed.requests
    for name, limit in limits.items():
        if limit is not None and limit < needed:
            yield name, f"can never reach minimum_n = {needed} of the check on {metric.name}"
    if suite.sequential and metric.group in ("answers", "judged") and metric.bounds is None:
        yield (
            f"{place}.metric",
            f"cannot gate in a sequential suite: {metric.title} has no bounds, so no interval of it is always valid; "
            "make the check advisory",
        )
