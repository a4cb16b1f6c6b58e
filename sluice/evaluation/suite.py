"""A suite: which items are asked, how, what is measured, and the policy that turns scores into a verdict.

A suite is a YAML file. Unknown keys are refused, so a misspelt margin cannot silently become the default; the digest
of the parsed suite is part of every decision that rests on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.policy import SMALLEST_BOOTSTRAP_N, Policy, Section
from sluice.evaluation.scores import Metric
from sluice.evaluation.suite_sections import Benchmarks, Generation, Items, Judged, Safety, Sequential, Speed
from sluice.infra.errors import InputError
from sluice.provenance.canonical import digest_json

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Suite(Section):
    """One evaluation suite."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    title: str
    items: Items = Items()
    generation: Generation = Generation()
    metrics: tuple[str, ...] = Field(min_length=1, description="metrics of the answers to the items")
    sequential: Sequential | None = None
    judged: Judged | None = None
    benchmarks: Benchmarks | None = None
    safety: Safety | None = None
    speed: Speed | None = None
    policy: Policy

    @property
    def digest(self) -> str:
        """Identity of the suite: any change of an item rule, a metric, a margin or a budget changes it."""
        return digest_json(self.model_dump(mode="json"))

    @property
    def catalogue(self) -> Mapping[str, Metric]:
        """All metrics that the suite could measure, by name."""
        return catalogue(self.benchmarks.tasks if self.benchmarks else ())

    def select(self, item_ids: Iterable[str]) -> tuple[str, ...]:
        """The items to ask, in the given order. A limit takes the same ids whatever that order is."""
        ids = tuple(item_ids)
        if self.items.limit is None or self.items.limit >= len(ids):
            return ids
        chosen = set(sorted(ids, key=digest_json)[: self.items.limit])
        return tuple(item_id for item_id in ids if item_id in chosen)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        known = self.catalogue
        for name in [*self.metrics, *(self.judged.metrics if self.judged else ())]:
            if name not in known:
                raise ValueError(f"metric {name!r} is unknown; there are {', '.join(known)}")
        for check in self.policy.gating:
            metric = known.get(check.metric)
            if metric is None:
                raise ValueError(f"the policy checks {check.metric!r}, which is unknown; there are {', '.join(known)}")
            if metric.kind == "mean" and self.policy.minimum_n < SMALLEST_BOOTSTRAP_N:
                raise ValueError(
                    f"minimum_n = {self.policy.minimum_n} is too few to gate on the mean {check.metric!r}: its bootstrap "
                    f"interval needs {SMALLEST_BOOTSTRAP_N}; make the check advisory or ask for more items"
                )
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
