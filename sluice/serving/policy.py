"""The rollout's policy: a reviewed file, `rollout.yaml`. Every mistake in it is named with its line.

Times are seconds, weights percent of the sessions. Unknown keys are refused, so that a misspelt limit cannot silently
become the default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sluice.infra.field_mistakes import Problem, cross_error, validated
from sluice.infra.yaml_file import read_text, read_yaml
from sluice.serving.metrics import LIVE_METRICS

HINT = "sluice/serving/rollout.yaml explains every field."


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Minimum(Section):
    """Fewest samples of the canary in a step for it to pass. 0 feedback: judged if there is any, not required."""

    requests: int = Field(ge=1)
    feedback: int = Field(0, ge=0)


class StepPolicy(Section):
    """One step: the canary's weight, and how long and on what evidence it is held."""

    weight: int = Field(ge=1, le=99, description="below 100: without stable beside it there is nothing to compare with")
    minimum: Minimum
    minimum_time_s: float = Field(ge=0)
    maximum_time_s: float = Field(gt=0, description="after this, what is still inconclusive is rolled back")


class ShadowPolicy(Section):
    """Before the first user: the canary is asked what stable is asked, and nobody sees what it answers."""

    percent: int = Field(100, ge=1, le=100, description="share of stable's requests that is asked twice")
    requests: int = Field(ge=1, description="fewest answers of the canary for the shadow to pass")
    maximum_time_s: float = Field(gt=0, description="after this, too few requests end the release")


class TripPolicy(Section):
    """What ends a rollout at once, without waiting for statistics: looked at several times a second."""

    failed: int = Field(5, ge=1, description="so many failed or broken answers of the canary")
    within_s: float = Field(10.0, gt=0, description="in so many seconds")
    share: float = Field(0.5, gt=0, le=1, description="and at least this share of what it finished in them")
    silent_s: float = Field(
        60.0, gt=0, description="seconds in which the canary has requests and finishes none, while stable does"
    )


class MetricPolicy(Section):
    """Limits of one metric: a difference of rates and scores (0.1: ten points), a factor of ratios (1.5: half more)."""

    gating: bool = Field(True, description="false: shown, never deciding")
    fail_above: float = Field(ge=0, description="worse than this, and shown to be: the release fails")
    margin: float = Field(gt=0, description="shown to be no worse than this: the metric passes")
    superior: bool = Field(False, description="it passes only when it is shown to be better than stable")
    minimum: int = Field(1, ge=1, description="fewest values of the canary for it to pass")


class AnalysisPolicy(Section):
    """How canary and stable are compared. Both error rates hold for the whole rollout, however often one looks."""

    false_rollback: float = Field(0.01, gt=0, lt=0.5, description="chance that a release as good as stable fails")
    false_pass: float = Field(0.05, gt=0, lt=0.5, description="chance that a metric passes that is worse by its margin")
    requests_per_session: int = Field(
        0,
        ge=0,
        description="so many of a session's requests count, the first ones, since they resemble each other; 0: all",
    )
    metrics: dict[str, MetricPolicy] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> AnalysisPolicy:
        problems = list(_metric_problems(self.metrics))
        if not any(metric.gating for metric in self.metrics.values()):
            problems.append(("metrics", "none of them is gating: every release would pass"))
        if problems:
            raise cross_error(problems, self.metrics)
        return self


class ParityPolicy(Section):
    """A larger difference from what the training library says fails, by the precision that serves.

    Seen with SmolLM2-135M and two adapters, 256 tokens: in bfloat16 the right one differs by 0.24 at most (0.025 on
    average), the wrong one or none by 1.7 and more; in float32 a small Llama stays below 0.0001.
    """

    float32: float = Field(0.001, gt=0)
    bfloat16: float = Field(0.5, gt=0)


class ProbePolicy(Section):
    """What a release is asked before it gets any user. Differences are of log-probabilities, in nats."""

    prompts: tuple[str, ...] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1, le=256)
    timeout_s: float = Field(60.0, gt=0)
    answered: float = Field(1.0, ge=0, le=1, description="share of the prompts that must get an answer with text")
    effect_above: float = Field(0.05, gt=0, description="a smaller difference from stable means: it does nothing")
    base_within: float = Field(0.3, gt=0, description="a larger difference of the base model's own answers fails")
    parity_within: ParityPolicy = ParityPolicy()
    at_once: int = Field(
        4, ge=1, le=256, description="questions asked at once to warm it up: as many as the first step's users ask"
    )


class RolloutPolicy(Section):
    """Probes, shadow, steps and analysis of a rollout."""

    steps: tuple[StepPolicy, ...] = Field(min_length=1)
    shadow: ShadowPolicy | None = None
    bake_s: float = Field(ge=0, description="seconds at the last weight, still analysed, before the promotion")
    check_interval_s: float = Field(1.0, gt=0, description="seconds between two analyses")
    cool_down_s: float = Field(0.0, ge=0, description="seconds after a failed rollout in which no other one begins")
    rollback_window_s: float = Field(
        86400.0, ge=0, description="seconds for which the champion before stays loaded, so that going back is instant"
    )
    trip: TripPolicy = TripPolicy()
    analysis: AnalysisPolicy
    probes: ProbePolicy

    @model_validator(mode="after")
    def _rising(self) -> RolloutPolicy:
        problems: list[Problem] = []
        weights = [step.weight for step in self.steps]
        if weights != sorted(set(weights)):
            problems.append(("steps", f"the weights {weights} must rise"))
        for number, step in enumerate(self.steps):
            if step.maximum_time_s <= step.minimum_time_s:
                says = f"must be above minimum_time_s, which is {step.minimum_time_s:g}"
                problems.append((f"steps.{number}.maximum_time_s", says))
        if problems:
            raise cross_error(problems, self.model_dump())
        return self


def default_policy() -> RolloutPolicy:
    """The policy that comes with Sluice: small samples, for a demonstration."""
    return parse_policy(resources.files("sluice.serving").joinpath("rollout.yaml").read_text(), "rollout.yaml")


def load_policy(path: Path) -> RolloutPolicy:
    """Read a policy. Raises `InputError` naming file, line, field and value."""
    return parse_policy(read_text(path, "rollout policy", HINT), str(path))


def parse_policy(text: str, source: str) -> RolloutPolicy:
    """The policy in a text; `source` names it in messages. Raises `InputError` with everything that is wrong."""
    found = read_yaml(text, source, "rollout policy", HINT)
    return validated(RolloutPolicy, found.values, source, found.lines, found.problems, hint=HINT)


def _metric_problems(metrics: Mapping[str, MetricPolicy]) -> Iterator[Problem]:
    for name, limits in metrics.items():
        where = f"metrics.{name}"
        known = LIVE_METRICS.get(name)
        if known is None:
            yield where, f"is no metric of a rollout; there are {', '.join(LIVE_METRICS)}"
            continue
        if known.kind == "ratio" and limits.fail_above < 1:
            yield f"{where}.fail_above", "is a ratio to stable and cannot be below 1"
        if known.kind != "ratio" and limits.margin > 1:
            yield f"{where}.margin", "is a difference and cannot be above 1"
        if limits.margin < limits.fail_above:
            yield f"{where}.margin", f"is below fail_above ({limits.fail_above:g}): nothing could pass"
