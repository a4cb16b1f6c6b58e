"""What a measurement gives: metrics, columns of values by item, and the scores of one release.

Every part of an evaluation (answers, judge, benchmarks, safety, speed) ends in columns; the comparison reads nothing
else. A value is a finite number, or there is none and a cause.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, canonical_json

Group = Literal["answers", "judged", "benchmark", "safety", "speed"]

SCORES_FILE = "scores.json"
NOT_FINITE = "not a finite number"


@dataclass(frozen=True)
class Metric:
    """One metric. `kind` (`binary` values are 0 or 1) decides the statistics, `higher_is_better` the direction.

    `bounds` is the range of one item's value, None where it has no end: without bounds there is no worst case and no
    always-valid interval. `source` names where the definition comes from.
    """

    name: str
    title: str
    kind: Literal["mean", "binary"]
    higher_is_better: bool
    unit: str
    decimals: int
    description: str
    group: Group = "answers"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    source: str = ""


@dataclass(frozen=True)
class Column:
    """Values of one metric by item id; None has its cause in `causes`.

    `judge` is the digest of the judge that gave them (values of different judges are never compared). `sequential`:
    how many items were measured was decided by looking at them, so only always-valid intervals hold; `planned` is how
    many it could have been at most, known before the first (None: it was not).
    """

    metric: Metric
    values: Mapping[str, float | None]
    causes: Mapping[str, str] = field(default_factory=dict)
    judge: str | None = None
    sequential: bool = False
    planned: int | None = None

    def __post_init__(self) -> None:
        for item, value in self.values.items():
            if value is None and item not in self.causes:
                raise InputError(f"Metric {self.metric.name} has no value for item {item!r}, and no cause.")
            if value is not None and not math.isfinite(value):
                raise InputError(f"Metric {self.metric.name} of item {item!r} = {value!r} is not a finite number.")


def column(
    metric: Metric, found: Mapping[str, float | str], *, judge: str | None = None, sequential: bool = False
) -> Column:
    """A column of values and causes as they come: a text is the cause why there is no value, and so is a number that
    is not finite, whoever made it."""
    values: dict[str, float | None] = {}
    causes: dict[str, str] = {}
    for item, value in sorted(found.items()):
        if isinstance(value, str):
            values[item], causes[item] = None, value
        elif not math.isfinite(value):
            values[item], causes[item] = None, NOT_FINITE
        else:
            values[item] = float(value)
    return Column(metric, values, causes, judge, sequential)


@dataclass(frozen=True)
class Scores:
    """The columns of one release by metric name, and its answers' outcomes by item id (empty without answers)."""

    columns: Mapping[str, Column]
    outcomes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> Json:
        return {
            "columns": [
                {
                    "metric": asdict(one.metric),
                    "values": dict(sorted(one.values.items())),
                    "causes": dict(sorted(one.causes.items())),
                    "judge": one.judge,
                    "sequential": one.sequential,
                    "planned": one.planned,
                }
                for _, one in sorted(self.columns.items())
            ],
            "outcomes": dict(sorted(self.outcomes.items())),
        }


def scores_of(columns: Iterable[Column], outcomes: Mapping[str, str] | None = None) -> Scores:
    """Scores of these columns. Raises `InputError` when two are of one metric."""
    found: dict[str, Column] = {}
    for one in columns:
        if one.metric.name in found:
            raise InputError(f"Metric {one.metric.name!r} was measured twice for one release.")
        found[one.metric.name] = one
    return Scores(found, outcomes or {})


def merged(parts: Iterable[Scores]) -> Scores:
    """The scores of one release from several measurements."""
    every = list(parts)
    outcomes = {item: outcome for part in every for item, outcome in part.outcomes.items()}
    return scores_of((one for part in every for one in part.columns.values()), outcomes)


def write_scores(folder: Path, scores: Scores) -> None:
    """scores.json: the file of a `scores` artifact, or of a folder within one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SCORES_FILE).write_bytes(canonical_json(scores.to_json()))


def read_scores(folder: Path) -> Scores:
    """What `write_scores` wrote. Raises `InputError` when it is missing or not that."""
    path = folder / SCORES_FILE
    try:
        content = json.loads(path.read_bytes())
        columns = [
            Column(
                Metric(
                    **{**one["metric"], "bounds": tuple(one["metric"]["bounds"]) if one["metric"]["bounds"] else None}
                ),
                one["values"],
                one["causes"],
                one["judge"],
                one["sequential"],
                one["planned"],
            )
            for one in content["columns"]
        ]
        return scores_of(columns, content["outcomes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no scores: {error}.") from error
