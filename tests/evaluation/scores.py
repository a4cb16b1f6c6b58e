"""Made-up scores and policies for the gate's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sluice.evaluation.comparison import compare
from sluice.evaluation.gate import Decision, Subjects, decide
from sluice.evaluation.metrics import Scores
from sluice.evaluation.suite import Policy
from sluice.provenance.canonical import digest_json

NOW = datetime(2026, 11, 21, 10, 0, tzinfo=UTC)
SUBJECTS = Subjects(*(digest_json(name) for name in ("candidate", "champion", "holdout", "suite", "index")))


def scores(**columns: Sequence[float | None]) -> Scores:
    """Scores of items `0000`, `0001`, ... with these columns; what is None has the cause `timeout`."""
    n = max(len(column) for column in columns.values())
    items = tuple(f"{i:04}" for i in range(n))
    causes: Mapping[str, Mapping[str, str]] = {
        name: {item: "timeout" for item, value in zip(items, column, strict=True) if value is None}
        for name, column in columns.items()
    }
    return Scores(items, {k: tuple(v) for k, v in columns.items()}, causes, dict.fromkeys(items, "answered"))


def policy(*checks: dict[str, Any], **changes: Any) -> Policy:
    """A policy of these checks; without any, superiority in token F1 by 0.02 and answer rate within 0.05."""
    if not checks:
        checks = (
            {"rule": "superiority", "metric": "token_f1", "minimum_effect": 0.02},
            {"rule": "non_inferiority", "metric": "answer_rate", "margin": 0.05},
        )
    return Policy.model_validate({"minimum_n": 100, "error_budget": 0.02, "checks": list(checks), **changes})


def gate(champion: Scores, candidate: Scores, rules: Policy | None = None) -> Decision:
    """Compare and decide."""
    rules = rules or policy()
    return decide(compare(champion, candidate, rules), rules, SUBJECTS, NOW)
