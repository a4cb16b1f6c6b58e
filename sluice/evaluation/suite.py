"""A suite: which items are asked, how, what is measured, and the policy that turns scores into a verdict.

A suite is a YAML file. Unknown keys are refused, so a misspelt margin cannot silently become the default; the digest
of the parsed suite is part of every decision that rests on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sluice.evaluation.metrics import METRICS
from sluice.evaluation.outcomes import Patience, Sampling
from sluice.infra.errors import InputError
from sluice.provenance.canonical import digest_json

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SMALLEST_BOOTSTRAP_N = 20
"""Fewer pairs than this make a bootstrap interval of a mean too narrow to gate on (tests/evaluation measures it)."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Superiority(Section):
    """The candidate must be better: interval of the gain above zero, and the gain itself at least `minimum_effect`."""

    rule: Literal["superiority"]
    metric: str
    minimum_effect: float = Field(0.0, ge=0, allow_inf_nan=False, description="smallest gain, in the metric's unit")
    advisory: bool = Field(False, description="shown, never gating")

    @property
    def null(self) -> float:
        """The gain that the interval has to exclude."""
        return 0.0


class NonInferiority(Section):
    """The candidate must not be worse than the champion by `margin` or more: interval of the gain above `-margin`."""

    rule: Literal["non_inferiority"]
    metric: str
    margin: float = Field(gt=0, allow_inf_nan=False, description="loss that is not tolerated, in the metric's unit")
    advisory: bool = Field(False, description="shown, never gating")

    @property
    def null(self) -> float:
        """The gain that the interval has to exclude."""
        return -self.margin


Check = Annotated[Superiority | NonInferiority, Field(discriminator="rule")]


class Policy(Section):
    """When the evidence counts, and what it has to show. Every check that is not advisory must pass."""

    confidence: float = Field(0.95, ge=0.8, lt=1, description="level of the two-sided intervals")
    power: float = Field(0.8, ge=0.5, lt=1, description="power for the minimum detectable effect")
    minimum_n: int = Field(100, ge=2, description="pairs of valid scores below which nothing is decided")
    error_budget: float = Field(0.02, ge=0, lt=1, description="share of items that may lack a score")
    correction: Literal["holm", "none"] = Field("holm", description="over the gating checks")
    valid_hours: float = Field(168.0, gt=0, allow_inf_nan=False, description="age after which a decision has expired")
    checks: tuple[Check, ...] = Field(min_length=1)

    @property
    def alpha(self) -> float:
        """One-sided error rate of one check: half of what the two-sided interval leaves out."""
        return (1 - self.confidence) / 2

    @property
    def gating(self) -> tuple[Superiority | NonInferiority, ...]:
        return tuple(check for check in self.checks if not check.advisory)

    @property
    def main_metric(self) -> str:
        """What it is all about: the metric of the first gating check that asks for a gain, or else of the first."""
        return next((check.metric for check in self.gating if check.rule == "superiority"), self.gating[0].metric)

    @model_validator(mode="after")
    def _can_decide(self) -> Policy:
        names = [check.metric for check in self.checks]
        for name in names:
            if name not in METRICS:
                raise ValueError(f"metric {name!r} is unknown; there are {', '.join(METRICS)}")
            if names.count(name) > 1:
                raise ValueError(f"metric {name!r} has two checks; one metric gives one verdict")
        if not self.gating:
            raise ValueError("every check is advisory, so this policy would pass anything")
        for check in self.gating:
            if METRICS[check.metric].kind == "mean" and self.minimum_n < SMALLEST_BOOTSTRAP_N:
                raise ValueError(
                    f"minimum_n = {self.minimum_n} is too few to gate on the mean {check.metric!r}: its bootstrap "
                    f"interval needs {SMALLEST_BOOTSTRAP_N}; make the check advisory or ask for more items"
                )
        return self


class Items(Section):
    """Which items are asked."""

    source: Literal["holdout"] = "holdout"
    limit: int | None = Field(None, ge=1, description="ask only so many, chosen by the digest of their ids")


class Generation(Section):
    """How the items are asked."""

    max_tokens: int = Field(80, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int = 0
    concurrency: int = Field(32, ge=1, le=1024)
    timeout_s: float = Field(60.0, gt=0)
    attempts: int = Field(3, ge=1, le=10)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.seed)

    @property
    def patience(self) -> Patience:
        return Patience(timeout_s=self.timeout_s, attempts=self.attempts)


class Suite(Section):
    """One evaluation suite."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    title: str
    items: Items = Items()
    generation: Generation = Generation()
    metrics: tuple[str, ...] = Field(min_length=1)
    policy: Policy

    @property
    def digest(self) -> str:
        """Identity of the suite: any change of an item rule, a metric, a margin or a budget changes it."""
        return digest_json(self.model_dump(mode="json"))

    def select(self, item_ids: Iterable[str]) -> tuple[str, ...]:
        """The items to ask, in the given order. A limit takes the same ids whatever that order is."""
        ids = tuple(item_ids)
        if self.items.limit is None or self.items.limit >= len(ids):
            return ids
        chosen = set(sorted(ids, key=digest_json)[: self.items.limit])
        return tuple(item_id for item_id in ids if item_id in chosen)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"metric {name!r} is unknown; there are {', '.join(METRICS)}")
        for check in self.policy.checks:
            if check.metric not in self.metrics:
                raise ValueError(f"the policy checks {check.metric!r}, which `metrics` does not list")
        if self.items.limit is not None and self.items.limit < self.policy.minimum_n:
            raise ValueError(
                f"items.limit = {self.items.limit} can never reach policy.minimum_n = {self.policy.minimum_n}"
            )
        return self


def find_suite(name: str) -> Suite:
    """A bundled suite by its name, or the suite in a file when `name` ends in .yaml or .yml."""
    return load_suite(Path(name)) if name.endswith((".yaml", ".yml")) else bundled_suite(name)


def load_suite(path: Path) -> Suite:
    """Read a suite file. Raises `InputError` naming the file, the field and the value."""
    try:
        return parse_suite(path.read_text(), str(path))
    except OSError as error:
        raise InputError(f"The suite {str(path)!r} cannot be read: {error}.") from error


def bundled_suite(name: str) -> Suite:
    """A suite that comes with Sluice: `demo` or `tiny`."""
    folder = files("sluice.evaluation") / "suites"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    if name not in known:
        raise InputError(f"There is no suite {name!r}.", hint=f"Sluice brings {', '.join(known)}; or give a file.")
    return parse_suite((folder / f"{name}.yaml").read_text(), f"{name}.yaml")


def parse_suite(text: str, source: str) -> Suite:
    """The suite in a YAML text; `source` is named in errors."""
    import yaml

    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"The suite {source!r} is not YAML: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"The suite {source!r} must hold a mapping, not a {type(content).__name__}.")
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_sentence(problem) for problem in error.errors())
        raise InputError(f"The suite {source!r} is refused. {problems}.") from error


def _sentence(problem: ErrorDetails) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "suite"
    got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{got}"
