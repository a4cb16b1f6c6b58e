"""When to stop measuring items: as soon as what the gate will say about them is certain.

The intervals at a look are always-valid (columns marked `sequential`), so a check that passed or failed at one look
may be believed however many looks there were. The rule reads the gate's own verdicts: it cannot stop where the gate
would still be undecided.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sluice.evaluation.comparison import Slices, compare
from sluice.evaluation.gate import CheckResult, Subjects, decide
from sluice.evaluation.scores import Column, Scores
from sluice.evaluation.suite import Suite
from sluice.evaluation.wording import joined
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, canonical_json, digest_json

STOPPING_FILE = "stopping.json"
ITEM_GROUPS = ("answers", "judged")
"""Groups of metrics that are measured item by item; the others have their own items, and are measured whole."""


@dataclass(frozen=True)
class Look:
    """The gate's checks on the items measured so far. `checks` have the fields `metric`, `slice`, `verdict`, `n`,
    `difference` and `interval` (two numbers or None) of the decision's."""

    items: int
    stop: bool
    reason: str
    checks: tuple[Json, ...] = ()


@dataclass(frozen=True)
class Stopping:
    """How much was measured, and why not more. `batch`: items between two looks, 0 when all were asked at once.

    Requests are those that the items need of both releases, whether a cache knew the answer or not; `saved` would have
    been needed for the items that were not asked.
    """

    total: int
    asked: int
    batch: int
    reason: str
    answer_requests: int
    answer_requests_saved: int
    judge_requests: int = 0
    judge_requests_saved: int = 0
    looks: tuple[Look, ...] = ()

    @property
    def saved(self) -> float:
        """Share of the items that need not be asked."""
        return 1 - self.asked / self.total

    @property
    def sentence(self) -> str:
        """What a reader is told: `96 of 480 items asked, ...`."""
        if self.asked == self.total:
            return f"all {self.total} items asked{f'; {self.reason}' if self.reason else ''}"
        judged = f" and {self.judge_requests_saved} of the judge" if self.judge_requests_saved else ""
        saved = f"{self.answer_requests_saved} answers{judged} saved"
        return f"{self.asked} of {self.total} items asked, {saved}: {self.reason}"

    def to_json(self) -> Json:
        return asdict(self)


def look(
    champion: Scores, candidate: Scores, suite: Suite, *, slices: Slices, demoted: Mapping[str, str], whole: bool
) -> Look:
    """Compare as the gate will, and say whether more items could change what it says about them.

    `slices` are those of all items, measured or not; `whole`: none is left. Gating checks that are measured elsewhere
    take their place in the correction as if they had shown nothing: whatever they show, what passes here passes there.
    """
    policy, catalogue = suite.policy, suite.catalogue
    # Only what a check asks for: a look is taken often, and all the rest is compared once, by the gate.
    checked = {check.metric for check in policy.checks}
    sliced = {check.slice.partition("=")[0] for check in policy.checks}
    wanted = {item: {name: one for name, one in own.items() if name in sliced} for item, own in slices.items()}
    old, new = (
        Scores({name: one for name, one in side.columns.items() if name in checked}, side.outcomes)
        for side in (champion, candidate)
    )
    comparison = compare(old, new, policy, slices=wanted, demoted=demoted)
    checks = [
        check
        for check in decide(comparison, policy, _NOBODY, _NEVER).checks
        if catalogue[check.check.metric].group in ITEM_GROUPS
    ]
    stop, reason = settled(checks, unseen(checks, wanted), whole=whole)
    shown = ("metric", "slice", "verdict", "n", "difference", "interval")
    return Look(len(new.outcomes), stop, reason, tuple({name: one.to_json()[name] for name in shown} for one in checks))


def settled(checks: Iterable[CheckResult], unseen: Collection[str] = (), *, whole: bool = False) -> tuple[bool, str]:
    """Whether the gating ones of these checks are decided, and the sentence that says so (or what is open).

    A check that tolerates nothing is refuted by one hit, so it stays open until all items are measured (`whole`).
    `unseen`: slices that a check asks for and no measured item has.
    """
    gating = [check for check in checks if not check.advisory]
    if failed := [check.title for check in gating if check.verdict == "fail"]:
        return True, f"{joined(failed)} failed, whatever the other items say"
    undecided = [
        check.title for check in gating if check.verdict != "pass" or (_tolerates_nothing(check) and not whole)
    ]
    if undecided := [*undecided, *unseen]:
        return False, f"{joined(undecided)} {'is' if len(undecided) == 1 else 'are'} open"
    if not gating:
        return False, "no check on the items gates"
    return True, f"{joined([check.title for check in gating])} passed, however many items follow"


def unseen(checks: Sequence[CheckResult], slices: Slices) -> list[str]:
    """The values of a gating check's dimension that items have, and none that was measured."""
    seen: dict[tuple[str, str], set[str]] = {}
    for check in checks:
        # A value with a check of its own that gates nothing is seen as well: no other check is about it.
        seen.setdefault((check.check.metric, check.slice.partition("=")[0]), set()).add(check.slice)
    whole = {(check.check.metric, check.check.slice) for check in checks if not check.advisory}
    return sorted(
        {
            f"{dimension}={own[dimension]}"
            for (metric, dimension), known in seen.items()
            if dimension and (metric, dimension) in whole
            for own in slices.values()
            if dimension in own and f"{dimension}={own[dimension]}" not in known
        }
    )


def _tolerates_nothing(check: CheckResult) -> bool:
    return check.check.rule == "limit" and check.check.zero_tolerance


def joined_columns(batches: Iterable[Sequence[Column]], *, sequential: Mapping[str, int]) -> list[Column]:
    """One column of each metric over all batches; those whose metric is in `sequential` are marked so, with the number
    of items that it names as the most there can be.

    Raises `InputError` when a metric has two judges.
    """
    found: dict[str, Column] = {}
    for one in (column for batch in batches for column in batch):
        name = one.metric.name
        known = found.get(name, Column(one.metric, {}, {}, one.judge))
        if known.judge != one.judge:
            raise InputError(f"Metric {name} has values of two judges.", hint="Was the judge changed midway?")
        values, causes = {**known.values, **one.values}, {**known.causes, **one.causes}
        found[name] = Column(one.metric, values, causes, one.judge, name in sequential, sequential.get(name))
    return list(found.values())


def write_stopping(folder: Path, stopping: Stopping) -> None:
    """stopping.json of an `evaluation` artifact."""
    (folder / STOPPING_FILE).write_bytes(canonical_json(stopping.to_json()))


def read_stopping(folder: Path) -> Stopping:
    """What `write_stopping` wrote. Raises `InputError` when it is missing or not that."""
    path = folder / STOPPING_FILE
    try:
        content = json.loads(path.read_bytes())
        looks = tuple(Look(**{**one, "checks": tuple(one["checks"])}) for one in content.pop("looks"))
        return Stopping(**content, looks=looks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no account of a measurement: {error}.") from error


# What a look decides is not kept as a decision, so it has no subjects and no time.
_NOTHING = digest_json(None)
_NOBODY = Subjects(_NOTHING, _NOTHING, _NOTHING, _NOTHING)
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
