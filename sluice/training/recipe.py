"""What to train and how, as a typed YAML file: one class for each section, unknown keys refused.

    recipe = load_recipe("demo")                                  # a packaged recipe, or a path to a YAML file
    drill = recipe.with_overrides({"schedule.max_steps": 8})

An error names the field as it is written in the file, the line, and the value. `automodel.py` translates a recipe for
NeMo AutoModel; nothing else of the product knows AutoModel's own configuration keys.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic_core import ErrorDetails

from sluice.infra.errors import InputError
from sluice.infra.field_mistakes import cross_error, nearest, validated
from sluice.infra.yaml_file import read_text, read_yaml
from sluice.provenance.canonical import Json, digest_json
from sluice.training.recipe_checks import problems_of
from sluice.training.recipe_sections import (
    BudgetSection,
    CheckpointSection,
    DataSection,
    Digest,
    GuardSection,
    LoraSection,
    Method,
    OptimizerSection,
    OutputSection,
    ParallelismSection,
    PrecisionSection,
    SampleSection,
    ScheduleSection,
    Section,
    ValidationGuard,
)

RECIPES = Path(__file__).with_name("recipes")
_NOT_OF_THE_WEIGHTS = ("name", "checkpoints", "samples", "output", "budget")
_HINT = "`sluice recipe show` lists every field with its default and meaning."
_PREFERENCE = ("dpo", "orpo", "kto", "simpo", "ipo", "rlhf", "grpo", "ppo")
_NO_PREFERENCE = (
    "is not offered: NeMo AutoModel 0.7 has neither a recipe nor a loss for preference tuning; train on the preferred "
    "answers alone (method: lora)"
)


class Recipe(Section):
    """A whole recipe. Its digest is part of the training step's key: equal recipes train once."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="small letters, digits and hyphens")
    method: Method = Field("lora", description="what is trained: low-rank pairs (on 4-bit weights: qlora), or all")
    base: Digest | None = Field(None, description="train this base model artifact and refuse any other")
    seed: int = Field(42, ge=0, description="of everything random")
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    schedule: ScheduleSection
    optimizer: OptimizerSection = OptimizerSection()
    parallelism: ParallelismSection = ParallelismSection()
    precision: PrecisionSection = PrecisionSection()
    checkpoints: CheckpointSection = CheckpointSection()
    guards: GuardSection = GuardSection()
    samples: SampleSection = SampleSection()
    output: OutputSection = OutputSection()
    budget: BudgetSection = BudgetSection()

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if problems := problems_of(self):
            raise cross_error(problems, self.to_json())
        return self

    def to_json(self) -> Json:
        """Plain JSON values, every default written out."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """Digest of what decides the weights: not the name, the budget, or what is kept and shown on the way."""
        return digest_json({k: _plain_numbers(v) for k, v in self.to_json().items() if k not in _NOT_OF_THE_WEIGHTS})

    def with_overrides(self, overrides: Mapping[str, Json]) -> Recipe:
        """A copy with values replaced by dotted field name, checked like a file. Raises `InputError`."""
        values: dict[str, Any] = copy.deepcopy(self.to_json())
        for field, value in overrides.items():
            *parents, last = field.split(".")
            section: Any = values
            for parent in parents:
                section = section.get(parent) if isinstance(section, dict) else None
            if not isinstance(section, dict) or last not in section:
                raise InputError(
                    f"The override {field} = {value!r} names no field of a recipe{nearest(field, Recipe)}.",
                    hint=_known_fields(parents),
                )
            section[last] = value
        return _validated(values, f"recipe {self.name!r} with overrides {dict(overrides)!r}", {})


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A packaged recipe by name (`demo`, `tiny`, ...) or any YAML file. Raises `InputError` with field and line."""
    path = Path(name_or_path)
    packaged = RECIPES / f"{name_or_path}.yaml"
    if path.suffix not in (".yaml", ".yml") and packaged.is_file():
        path = packaged
    hint = f"Give a path to a YAML file, or one of: {', '.join(packaged_recipes())}."
    return parse_recipe(read_text(path, "recipe", hint), str(path))


def packaged_recipes() -> list[str]:
    """Names that `load_recipe` knows."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse_recipe(text: str, source: str) -> Recipe:
    """A recipe from YAML text; `source` stands in messages. Raises `InputError` with field and line."""
    hint = "`sluice recipe show` lists the fields; `name` and `schedule.max_steps` are the least."
    read = read_yaml(text, source, "recipe", hint)
    return _validated(read.values, source, read.lines, [*read.problems, *_given_in_vain(read.values)])


_NO_LORA: Json = LoraSection().model_dump(mode="json")


def _given_in_vain(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a file says and the rest of it makes meaningless. A default that is written out says nothing."""
    if values.get("method") == "full" and values.get("lora", _NO_LORA) != _NO_LORA:
        yield "lora", "means nothing with method full, which trains every weight; leave the section out"
    schedule, guards = values.get("schedule"), values.get("guards")
    guard = guards.get("validation_loss") if isinstance(guards, dict) else None
    budget = values.get("budget")
    once = isinstance(schedule, dict) and schedule.get("validate_every_steps") is None
    usual = ValidationGuard().patience
    if once and isinstance(guard, dict) and guard.get("patience", usual) != usual:
        yield "guards.validation_loss.patience", "needs schedule.validate_every_steps: one validation is no series"
    notice, minutes = (budget.get("notice_s"), budget.get("timeout_minutes")) if isinstance(budget, dict) else (0, 0)
    if isinstance(notice, int | float) and isinstance(minutes, int | float) and notice >= minutes * 60 > 0:
        yield "budget.notice_s", f"leaves no time to train in budget.timeout_minutes = {minutes:g}"


def _validated(
    values: Any, source: str, lines: Mapping[tuple[str, ...], int], problems: Sequence[tuple[str, str]] = ()
) -> Recipe:
    return validated(Recipe, values, source, lines, problems, hint=_HINT, habit=_no_preference)


def _no_preference(problem: ErrorDetails) -> str:
    preference = problem["loc"] == ("method",) and str(problem["input"]).lower() in _PREFERENCE
    return _NO_PREFERENCE if preference else ""


def _known_fields(parents: list[str]) -> str:
    model: Any = Recipe
    for parent in parents:
        field = model.model_fields.get(parent)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):
            plain = ("name", "method", "base", "seed")
            return f"Sections: {', '.join(name for name in Recipe.model_fields if name not in plain)}."
        model = field.annotation
    return f"Fields there: {', '.join(model.model_fields)}."


def _plain_numbers(value: Json) -> Json:
    """1.0 and 1 are one number and must give one digest, whichever way a file or an override spells it."""
    if isinstance(value, dict):
        return {key: _plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
