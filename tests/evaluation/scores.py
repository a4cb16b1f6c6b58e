"""Made-up scores and policies for the gate's tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.comparison import compare
from sluice.evaluation.gate import Decision, Subjects, decide
from sluice.evaluation.policy import Policy
from sluice.evaluation.scores import Scores, column, scores_of
from sluice.provenance.canonical import digest_json

NOW = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
SUBJECTS = Subjects(
    candidate=digest_json("candidate"),
    champion=digest_json("champion"),
    holdout=digest_json("holdout"),
    suite=digest_json("suite"),
    index=digest_json("index"),
)


def scores(**columns: Sequence[float | None]) -> Scores:
    """Scores of items `0000`, `0001`, ... with these columns; what is None has the cause `timeout`."""
    known = catalogue()
    made = [
        column(known[name.replace("__", ".")], {f"{i:04}": "timeout" if v is None else v for i, v in enumerate(values)})
        for name, values in columns.items()
    ]
    items = {item for one in made for item in one.values}
    return scores_of(made, dict.fromkeys(sorted(items), "answered"))


def policy(*checks: dict[str, Any], **changes: Any) -> Policy:
    """A policy of these checks; without any, superiority in token F1 by 0.02 and answer rate within 0.05."""
    if not checks:
        checks = (
            {"rule": "superiority", "metric": "token_f1", "minimum_effect": 0.02},
            {"rule": "non_inferiority", "metric": "answer_rate", "margin": 0.05},
        )
    return Policy.model_validate({"minimum_n": 100, "error_budget": 0.02, "checks": list(checks), **changes})


def gate(champion: Scores, candidate: Scores, rules: Policy | None = None, **more: Any) -> Decision:
    """Compare (`more`: slices, demoted) and decide."""
    rules = rules or policy()
    return decide(compare(champion, candidate, rules, **more), rules, SUBJECTS, NOW)
