"""The policy of a gate (`gate.yaml`): what the evidence has to show, and when it counts.

One class for each section; unknown keys are refused, so a misspelt margin cannot silently become the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from sluice.infra.field_mistakes import Problem, cross_error, validated
from sluice.infra.yaml_file import read_yaml

SMALLEST_BOOTSTRAP_N = 20
"""Fewer values than this make a bootstrap interval of a mean without bounds too narrow to gate on."""

ChangeKind = Literal["base", "recipe", "data", "tokenizer", "chat_template", "configuration", "suite", "first"]
"""What can differ between candidate and champion beside the weights; `first`: there was no gated champion before."""


HINT = "docs/evaluation.md lists every field of a suite and of its policy with default and meaning."

_PERCENT = re.compile(r"^(\d+(?:\.\d+)?) ?%$")
_SLICE = r"^([^=\s]+(=.*\S)?)?$"


class Section(BaseModel):
    """Strict: text is no number, `yes` no margin, `.inf` no time. Tuples say for themselves that a YAML list is one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def habit(problem: ErrorDetails) -> str:
    """A better sentence than pydantic's, where there is one."""
    if problem["type"] == "string_pattern_mismatch" and problem["loc"][-1] == "slice":
        return "names a dimension of the items' slices, or one value of it: category, or category=permits"
    return ""


def _margin(given: Any) -> float | str:
    """A loss above 0, or a share of the champion's mean as a text that ends in %."""
    if isinstance(given, str):
        found = _PERCENT.match(given)
        if not found:
            says = "is neither a number nor a percentage; write 0.05, or '10%' for a tenth of the champion's mean"
            raise PydanticCustomError("margin", "{says}", {"says": says})
        if not 0 < float(found[1]) < 100:
            raise PydanticCustomError("margin", "{says}", {"says": "must be above 0% and below 100%"})
        return given
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1e300:
        says = "must be a number above 0: a loss that small is still tolerated, so it cannot be nothing or less"
        raise PydanticCustomError("margin", "{says}", {"says": says})
    return float(given)


class CheckSection(Section):
    """What all checks have."""

    metric: str = Field(description="name of a metric that the suite measures")
    slice: str = Field(
        "",
        pattern=_SLICE,
        description="`category`: each value of it; `category=permits`: that one; empty: all items",
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
    minimum_effect: float = Field(0.0, ge=0, description="smallest gain, in the metric's unit")


class NonInferiority(CheckSection):
    """The candidate must not be worse than the champion by `margin` or more: interval of the gain above `-margin`."""

    rule: Literal["non_inferiority"]
    margin: Annotated[float | str, PlainValidator(_margin)] = Field(
        description="loss that is not tolerated, in the metric's unit, or `10%` of the champion's mean"
    )

    @property
    def share(self) -> float | None:
        """The margin as a share of the champion's mean, 0 to 1; None when it is in the metric's unit."""
        return float(self.margin.rstrip("% ")) / 100 if isinstance(self.margin, str) else None


class Limit(CheckSection):
    """The candidate by itself, whatever the champion does: its mean at most, or at least, so much.

    `at_most: 0` of a binary metric is zero tolerance: one hit fails, none in `minimum_n` items passes.
    """

    rule: Literal["limit"]
    at_most: float | None = None
    at_least: float | None = None

    @property
    def zero_tolerance(self) -> bool:
        return self.at_most == 0 and self.at_least is None


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
    valid_days: float = Field(7.0, gt=0, le=36_500, description="age after which a decision has expired")
    second_approver: Annotated[tuple[ChangeKind, ...], Field(strict=False)] = Field(
        (), description="changes that two people have to approve"
    )
    judge: JudgeFloor = JudgeFloor()
    checks: Annotated[tuple[Check, ...], Field(strict=False)] = Field(min_length=1)

    @model_validator(mode="after")
    def _goes_together(self) -> Policy:
        if problems := list(_problems(self)):
            raise cross_error(problems, self.model_dump(mode="json"))
        return self

    @property
    def alpha(self) -> float:
        """One-sided error rate of one check: half of what the two-sided interval leaves out."""
        return (1 - self.confidence) / 2

    @property
    def gating(self) -> tuple[AnyCheck, ...]:
        return tuple(check for check in self.checks if not check.advisory)

    def minimum_n_of(self, check: AnyCheck) -> int:
        """Valid scores below which this check decides nothing."""
        return self.minimum_n if check.minimum_n is None else check.minimum_n

    def error_budget_of(self, check: AnyCheck) -> float:
        """Share of this check's items that may lack a score."""
        return self.error_budget if check.error_budget is None else check.error_budget

    @property
    def least_error_budget(self) -> float:
        """The share of items that may lack a score whatever asks."""
        return min(self.error_budget_of(check) for check in self.checks)

    @property
    def main_metric(self) -> str:
        """What it is all about: the metric of the first gating check that asks for a gain, or else of the first."""
        chosen = self.gating or self.checks
        return next((check.metric for check in chosen if check.rule == "superiority"), chosen[0].metric)


def parse_policy(text: str, source: str) -> Policy:
    """The policy in a YAML text (gate.yaml). Raises `InputError` naming field, line and value."""
    read = read_yaml(text, source, "gate policy", HINT)
    return validated(Policy, read.values, source, read.lines, read.problems, hint=HINT, habit=habit)


def _problems(policy: Policy) -> Iterator[Problem]:
    seen: dict[tuple[str, str], int] = {}
    for number, check in enumerate(policy.checks):
        place = f"checks.{number}"
        same = seen.setdefault((check.metric, check.slice), number)
        if same != number:
            where = f"slice {check.slice!r}" if check.slice else "all items"
            yield f"{place}.metric", f"two checks for the same metric and {where}, this and checks.{same}; keep one"
        if check.rule == "limit":
            yield from _limit_problems(check, place)
    if not policy.gating:
        yield "checks", "every check is advisory, so nothing would gate; make at least one gating"


def _limit_problems(check: Limit, place: str) -> Iterator[Problem]:
    if check.at_most is None and check.at_least is None:
        yield place, "a limit needs at_most or at_least"
    elif check.at_most is not None and check.at_least is not None and check.at_least > check.at_most:
        yield f"{place}.at_least", f"is above at_most = {check.at_most:g}, so no value could be right"
    if check.direction is not None:
        yield (
            f"{place}.direction",
            "says nothing in a limit, whose at_most and at_least are its direction; leave it out",
        )
