"""The policy of a gate (`gate.yaml`): what the evidence has to show, and when it counts.

One class for each section; unknown keys are refused, so a misspelt margin cannot silently become the default.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SMALLEST_BOOTSTRAP_N = 20
"""Fewer pairs than this make a bootstrap interval of a mean too narrow to gate on (tests/evaluation measures it)."""

ChangeKind = Literal["base", "recipe", "data", "tokenizer", "chat_template", "configuration", "suite", "first"]
"""What can differ between candidate and champion beside the weights; `first`: there was no gated champion before."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckSection(Section):
    """What all checks have."""

    metric: str = Field(description="name of a metric that the suite measures")
    slice: str = Field(
        "", description="`category`: each value of it by itself; `category=permits`: that one; empty: all"
    )
    advisory: bool = Field(False, description="shown, never gating")
    direction: Literal["higher", "lower"] | None = Field(
        None, description="which way is better; empty: the metric's own"
    )
    minimum_n: int | None = Field(None, ge=1, description="in place of the policy's")
    error_budget: float | None = Field(None, ge=0, lt=1, description="in place of the policy's")


class Superiority(CheckSection):
    """The candidate must be better: interval of the gain above zero, and the gain itself at least `minimum_effect`."""

    rule: Literal["superiority"]
    minimum_effect: float = Field(0.0, ge=0, allow_inf_nan=False, description="smallest gain, in the metric's unit")


class NonInferiority(CheckSection):
    """The candidate must not be worse than the champion by `margin` or more: interval of the gain above `-margin`."""

    rule: Literal["non_inferiority"]
    margin: float | str = Field(
        description="loss that is not tolerated, in the metric's unit, or `10%` of the champion's"
    )


class Limit(CheckSection):
    """The candidate by itself, whatever the champion does: its mean at most, or at least, so much.

    `at_most: 0` of a binary metric is zero tolerance: one hit fails, none in `minimum_n` items passes.
    """

    rule: Literal["limit"]
    at_most: float | None = Field(None, allow_inf_nan=False)
    at_least: float | None = Field(None, allow_inf_nan=False)


Check = Annotated[Superiority | NonInferiority | Limit, Field(discriminator="rule")]
AnyCheck = Superiority | NonInferiority | Limit


class JudgeFloor(Section):
    """What a judge's calibration must show before its metrics may gate; below it they are advisory."""

    kappa: float = Field(0.6, ge=0, le=1, description="lower limit of the interval of Cohen's kappa with people")
    self_agreement: float = Field(0.9, ge=0, le=1, description="share of equal labels when asked again")
    position_bias: float = Field(
        0.1, ge=0, le=1, description="largest share of pairs judged by the order they are shown in"
    )
    length_bias: float = Field(
        0.3, ge=0, le=1, description="largest |rank correlation| of score and length, people's taken out"
    )
    minimum_n: int = Field(50, ge=10, description="labelled items below which a judge is not calibrated")
    valid_share: float = Field(0.95, gt=0, le=1, description="share of calibration items that the judge must answer")


class Policy(Section):
    """When the evidence counts, and what it has to show. Every check that is not advisory must pass."""

    confidence: float = Field(0.95, ge=0.8, lt=1, description="level of the two-sided intervals")
    power: float = Field(0.8, ge=0.5, lt=1, description="power for the minimum detectable effect")
    minimum_n: int = Field(100, ge=2, description="pairs of valid scores below which nothing is decided")
    error_budget: float = Field(0.02, ge=0, lt=1, description="share of items that may lack a score")
    correction: Literal["holm", "none"] = Field("holm", description="over the gating checks")
    valid_days: float = Field(7.0, gt=0, allow_inf_nan=False, description="age after which a decision has expired")
    second_approver: tuple[ChangeKind, ...] = Field((), description="changes that two people have to approve")
    judge: JudgeFloor = JudgeFloor()
    checks: tuple[Check, ...] = Field(min_length=1)

    @property
    def alpha(self) -> float:
        """One-sided error rate of one check: half of what the two-sided interval leaves out."""
        return (1 - self.confidence) / 2

    @property
    def gating(self) -> tuple[AnyCheck, ...]:
        return tuple(check for check in self.checks if not check.advisory)

    @property
    def main_metric(self) -> str:
        """What it is all about: the metric of the first gating check that asks for a gain, or else of the first."""
        chosen = self.gating or self.checks
        return next((check.metric for check in chosen if check.rule == "superiority"), chosen[0].metric)
