"""What a person tells a rollout under way: orders, kept beside its state, obeyed by whichever controller is active."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OrderKind = Literal["pause", "resume", "promote"]
"""`pause`: hold this weight, keep analysing (a failure still rolls back). `resume`: go on. `promote`: do not wait for
minimum samples and times of the steps that are left; what has failed stays failed, and leave is asked all the same."""


@dataclass(frozen=True)
class Order:
    """One order. `time` in seconds since the epoch; `actor` is who gave it, `reason` why, in their words."""

    kind: OrderKind
    actor: str
    reason: str
    time: float
