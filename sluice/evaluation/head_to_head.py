"""Candidate and champion answer the same items, batch by batch, until what the gate will say about them is certain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sluice.evaluation.answer_metrics import score_answers
from sluice.evaluation.items import Item
from sluice.evaluation.judged_scores import Embedder
from sluice.evaluation.outcomes import Answer
from sluice.evaluation.scores import Column, Scores, scores_of
from sluice.evaluation.stopping import Look, Stopping, joined_columns, look
from sluice.evaluation.suite import Suite
from sluice.evaluation.wording import joined
from sluice.infra.errors import InputError
from sluice.infra.progress import Report, no_report

Ask = Callable[[Sequence[Item], Report], list[Answer]]
"""Asks one release; one answer for each item."""


class Judging(Protocol):
    """A judge, as a measurement needs it."""

    def columns(self, items: Sequence[Item], answers: Sequence[Answer], report: Report) -> list[Column]:
        """Columns of the suite's judged metrics over these answers."""

    def requests(self, items: Sequence[Item]) -> int:
        """Requests that judging one answer to each of these items takes."""


@dataclass(frozen=True)
class Side:
    """One release's answers and scores; answers in the order of asking."""

    answers: tuple[Answer, ...]
    scores: Scores


@dataclass(frozen=True)
class HeadToHead:
    """What was measured of both releases, and why not more."""

    candidate: Side
    champion: Side
    stopping: Stopping


def head_to_head(
    items: Sequence[Item],
    suite: Suite,
    *,
    candidate: Ask,
    champion: Ask,
    judging: Judging | None = None,
    embed: Embedder | None = None,
    demoted: Mapping[str, str] | None = None,
    report: Report = no_report,
) -> HeadToHead:
    """Measure both releases on the items that the suite selects of `items`.

    Without a `sequential` section all are asked at once. With one, each batch is answered and judged on both sides
    before the next look; the suite's order is made of digests, so nobody chooses which items come first. The result
    depends on the answers alone. Raises `InputError` for no items, and what asking
    raises.
    """
    known = {item.id: item for item in items}
    order = [known[item] for item in suite.select(known)]
    if not order:
        raise InputError("There are 0 items to ask.", hint="Does the holdout hold items, and the suite select any?")
    judged_limit = (suite.judged.limit or len(order)) if suite.judged and judging else 0
    judged = {item.id for item in order[:judged_limit]}
    batch = suite.sequential.batch if suite.sequential else len(order)
    by_looking = dict.fromkeys(suite.metrics, len(order)) if batch < len(order) else {}
    # Metrics whose items were all measured before the first look were never chosen by looking.
    if suite.judged and batch < min(judged_limit, len(order)):
        by_looking |= dict.fromkeys(suite.judged.metrics, len(judged))
    slices = {item.id: item.slices for item in order}
    sides = (
        _Measuring(champion, "champion", suite, judging, embed),
        _Measuring(candidate, "candidate", suite, judging, embed),
    )
    looks: list[Look] = []
    for start in range(0, len(order), batch):
        asked = order[start : start + batch]
        for number, side in enumerate(sides):
            side.measure(asked, judged, _part(report, start * 2 + number * len(asked), len(order) * 2))
        done = start + len(asked)
        if suite.sequential:
            old, new = (side.scores(by_looking) for side in sides)
            looks.append(look(old, new, suite, slices=slices, demoted=demoted or {}, whole=done == len(order)))
            if looks[-1].stop:
                break
    left = order[done:]

    def judge_requests(some: Sequence[Item]) -> int:
        return 2 * judging.requests([item for item in some if item.id in judged]) if judging else 0

    stopping = Stopping(
        total=len(order),
        asked=done,
        batch=batch if suite.sequential else 0,
        reason=looks[-1].reason if looks else "",
        answer_requests=2 * done,
        answer_requests_saved=2 * len(left),
        judge_requests=judge_requests(order[:done]),
        judge_requests_saved=judge_requests(left),
        looks=tuple(looks),
    )
    was, now = (Side(tuple(side.answers), side.scores(by_looking)) for side in sides)
    return HeadToHead(candidate=now, champion=was, stopping=stopping)


class _Measuring:
    """One side while it is being measured: its answers, and the columns of each batch."""

    def __init__(self, ask: Ask, name: str, suite: Suite, judging: Judging | None, embed: Embedder | None) -> None:
        self._ask = ask
        self._name = name
        self._suite = suite
        self._judging = judging
        self._embed = embed
        self._columns: list[list[Column]] = []
        self._outcomes: dict[str, str] = {}
        self.answers: list[Answer] = []

    def measure(self, items: Sequence[Item], judged: set[str], report: Report) -> None:
        answers = self._ask(items, lambda done, _, told: report(done, 0, f"{self._name}: {told}"))
        self.answers += answers
        scored = score_answers(answers, items, self._suite.metrics, embed=self._embed)
        self._columns.append(list(scored.columns.values()))
        self._outcomes |= scored.outcomes
        chosen = [item for item in items if item.id in judged]
        if self._judging and chosen:
            of_chosen = [answer for answer in answers if answer.item_id in judged]
            # Scores are no items: while it judges, the count stands still and the words move.
            said: Report = lambda _, __, told: report(len(items), 0, f"{self._name}: {told}")  # noqa: E731
            self._columns.append(self._judging.columns(chosen, of_chosen, said))

    def scores(self, by_looking: Mapping[str, int]) -> Scores:
        return scores_of(joined_columns(self._columns, sequential=by_looking), dict(sorted(self._outcomes.items())))


def _part(report: Report, before: int, whole: int) -> Report:
    """Progress of one batch of one side within the whole."""
    return lambda done, _, message: report(before + done, whole, message)


def lost(found: HeadToHead, suite: Suite, demoted: Collection[str] = ()) -> str:
    """Which gating metrics lack more scores than the policy allows, in words; empty when none does."""
    missing = {}
    for check in suite.policy.gating:
        sides = [found.candidate] if check.rule == "limit" else [found.candidate, found.champion]
        columns = [side.scores.columns.get(check.metric) for side in sides]
        items = {item for one in columns if one for item in one.values}
        lacking = sum(any(one is None or one.values.get(item) is None for one in columns) for item in items)
        if check.metric not in demoted and lacking > suite.policy.error_budget_of(check) * len(items):
            missing[check.metric] = f"{suite.catalogue[check.metric].title} of {lacking} of {len(items)} items"
    return f"{joined(list(missing.values()))} could not be measured" if missing else ""
