"""The rollout's policy: a reviewed file, `rollout.yaml`. Every mistake in it is named with its line."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sluice.infra.errors import InputError
from sluice.serving.analysis import AnalysisPolicy, Minimum

if TYPE_CHECKING:
    import yaml


class StepPolicy(BaseModel):
    """One step: the canary's weight in percent, and how long and on what evidence it is held. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: int = Field(ge=1, le=100)
    minimum: Minimum
    minimum_time_s: float = Field(ge=0)
    maximum_time_s: float = Field(gt=0, description="after this, what is still inconclusive is rolled back")

    @model_validator(mode="after")
    def _ordered(self) -> StepPolicy:
        if self.maximum_time_s <= self.minimum_time_s:
            raise ValueError(
                f"maximum_time_s {self.maximum_time_s:g} must be above minimum_time_s {self.minimum_time_s:g}"
            )
        return self


class ProbePolicy(BaseModel):
    """What a release is asked before it gets any user. Differences are of log-probabilities, in nats."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[str, ...] = Field(min_length=1)
    max_tokens: int = Field(16, ge=1, le=256)
    timeout_s: float = Field(60.0, gt=0)
    answered: float = Field(1.0, ge=0, le=1, description="share of the prompts that must get an answer with text")
    effect_above: float = Field(0.05, gt=0, description="a smaller difference from stable means: it does nothing")
    base_within: float = Field(0.3, gt=0, description="a larger difference of the base model's own answers fails")


class RolloutPolicy(BaseModel):
    """Steps, analysis and probes of a rollout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: tuple[StepPolicy, ...] = Field(min_length=1)
    bake_s: float = Field(ge=0, description="seconds at 100 percent, still analysed, before the promotion")
    check_interval_s: float = Field(1.0, gt=0)
    analysis: AnalysisPolicy
    probes: ProbePolicy

    @model_validator(mode="after")
    def _rising(self) -> RolloutPolicy:
        weights = [step.weight for step in self.steps]
        if weights != sorted(set(weights)) or weights[-1] != 100:
            raise ValueError(f"steps: the weights {weights} must rise and end at 100")
        if len(weights) < 2:
            raise ValueError("steps: a step below 100 is needed, or there is no stable release to compare with")
        return self


def default_policy() -> RolloutPolicy:
    """The policy that comes with Sluice: small samples, for a demonstration."""
    return _parse(resources.files("sluice.serving").joinpath("rollout.yaml").read_text(), "sluice/serving/rollout.yaml")


def load_policy(path: Path) -> RolloutPolicy:
    """Read a policy. Raises `InputError` naming file, line, field and value."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The rollout policy {str(path)!r} cannot be read: {error}.") from error
    return _parse(text, str(path))


def _parse(text: str, source: str) -> RolloutPolicy:
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{source}{where}: not YAML: {getattr(error, 'problem', None) or error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{source}, line 1: a rollout policy is a mapping with steps, analysis and probes.")
    try:
        return RolloutPolicy.model_validate(content)
    except ValidationError as error:
        sentences = [_sentence(node, problem, source) for problem in error.errors()]
        raise InputError(" ".join(sentences), hint="sluice/serving/rollout.yaml explains every field.") from error


def _sentence(node: yaml.Node | None, problem: Any, source: str) -> str:
    path = problem["loc"]
    field = ".".join(str(part) for part in path) or "the policy"
    line = _line(node, path)
    value = problem["input"]
    shown = "" if isinstance(value, dict | list | tuple) else f" = {value!r}"
    return f"{source}, line {line}: {field}{shown}: {problem['msg'].removeprefix('Value error, ')}."


def _line(node: yaml.Node | None, path: Sequence[int | str]) -> int:
    """The line of the deepest part of `path` that the file holds."""
    import yaml

    line = node.start_mark.line + 1 if node else 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
