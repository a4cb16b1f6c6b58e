"""What to train and how, as a typed YAML file: one class for each section, unknown keys refused.

    recipe = load_recipe("demo")                                  # a packaged recipe, or a path to a YAML file
    drill = recipe.with_overrides({"schedule.max_steps": 8})

An error names the field as it is written in the file, the line, and the value. `automodel.py` translates a recipe for
NeMo AutoModel; nothing else of the product knows AutoModel's own configuration keys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, digest_json
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
)

RECIPES = Path(__file__).with_name("recipes")
_NOT_OF_THE_WEIGHTS = ("name", "checkpoints", "samples", "output", "budget")


class Recipe(Section):
    """A whole recipe. Its digest is part of the training step's key: equal recipes train once."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    method: Method = "lora"
    base: Digest | None = Field(None, description="train this base model artifact and refuse any other")
    seed: int = Field(42, ge=0)
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
    def _divisible(self) -> Self:
        share = self.schedule.micro_batch_size * self.parallelism.dp
        if self.schedule.global_batch_size % share:
            raise ValueError(
                f"schedule.global_batch_size {self.schedule.global_batch_size} is not a multiple of "
                f"schedule.micro_batch_size x the data-parallel size = {share}"
            )
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
                    f"The override {field} = {value!r} names no field of a recipe.", hint=_known_fields(parents)
                )
            section[last] = value
        return _validated(values, f"recipe {self.name!r} with overrides {dict(overrides)!r}", {})


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A packaged recipe by name (`demo`, `tiny`) or any YAML file. Raises `InputError` with field and line."""
    path = Path(name_or_path)
    packaged = RECIPES / f"{name_or_path}.yaml"
    if path.suffix not in (".yaml", ".yml") and packaged.is_file():
        path = packaged
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise InputError(
            f"There is no recipe {str(name_or_path)!r}: {error.strerror}.",
            hint=f"Give a path to a YAML file, or one of: {known}.",
        ) from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, source: str) -> Recipe:
    """A recipe from YAML text; `source` stands in messages. Raises `InputError` with field and line."""
    import yaml

    try:
        values = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not YAML: {error}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{source} holds no recipe: a mapping of sections was expected, not {values!r}.")
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines)
    return _validated(values, source, lines)


def _validated(values: Any, source: str, lines: Mapping[tuple[str, ...], int]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            location = tuple(str(part) for part in problem["loc"])
            field = ".".join(location) or "recipe"
            line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
            where = f" (line {line})" if line else ""
            given = f", not {problem['input']!r}" if location and problem["type"] != "missing" else ""
            says = "no such field" if problem["type"] == "extra_forbidden" else problem["msg"]
            problems.append(f"{field}{where}: {says}{given}")
        raise InputError(
            f"{source}: " + "; ".join(problems) + ".",
            hint="The fields are described in sluice/training/recipe_sections.py.",
        ) from error


def _collect_lines(node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    """1-based line of every key and list item, by its path."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*path, str(key.value))] = key.start_mark.line + 1
            _collect_lines(value, (*path, str(key.value)), lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*path, str(number))] = value.start_mark.line + 1
            _collect_lines(value, (*path, str(number)), lines)


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
