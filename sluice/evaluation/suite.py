"""A suite: which items are asked, how, what is measured, and the policy that turns scores into a verdict.

A suite is a folder: suite.yaml, the policy (gate.yaml, or inline), and the files that they name: items, labelled items,
probes, benchmark tasks. Unknown keys are refused, so a misspelt margin cannot silently become the default; the digest
of the suite covers what its files hold and is part of every decision that rests on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from sluice.evaluation.benchmark_tasks import find_tasks
from sluice.evaluation.catalogue import catalogue
from sluice.evaluation.items import asking_order, read_items
from sluice.evaluation.policy import HINT, Policy, Section, habit
from sluice.evaluation.scores import Metric
from sluice.evaluation.suite_checks import item_problems, measured, problems_of
from sluice.evaluation.suite_sections import Benchmarks, Generation, Items, Judged, Names, Safety, Sequential, Speed
from sluice.infra.errors import InputError
from sluice.infra.field_mistakes import Problem, cross_error, describe, validated
from sluice.infra.yaml_file import read_text, read_yaml
from sluice.provenance.canonical import digest_file, digest_json

SUITES = Path(__file__).with_name("suites")
SUITE_FILE = "suite.yaml"
TASKS = "tasks"
_NAMING = (("items", "file"), ("judged", "calibration"), ("safety", "file"))
"""The fields that name a file beside the suite."""


class Suite(Section):
    """One evaluation suite."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$", description="small letters, digits and hyphens")
    title: str
    items: Items = Items()
    generation: Generation = Generation()
    metrics: Names = Field(min_length=1, description="metrics of the answers to the items")
    sequential: Sequential | None = None
    judged: Judged | None = None
    benchmarks: Benchmarks | None = None
    safety: Safety | None = None
    speed: Speed | None = None
    policy: Policy
    _folder: Path | None = PrivateAttr(None)
    _files: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identity of the suite: any change of an item, a metric, a margin, a task or a label changes it."""
        return digest_json({**self.model_dump(mode="json"), "files": dict(self._files)})

    @property
    def files(self) -> Mapping[str, str]:
        """Digest of the content of each file beside the suite that it rests on, by name."""
        return self._files

    @property
    def catalogue(self) -> Mapping[str, Metric]:
        """All metrics that the suite could measure, by name."""
        return catalogue(self.benchmarks.tasks if self.benchmarks else ())

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics that the suite does measure."""
        return measured(self)

    @property
    def tasks_folder(self) -> Path | None:
        """Where the suite's own benchmark tasks are; None for a suite that was read without a folder."""
        return self._folder / TASKS if self._folder else None

    def file(self, name: str) -> Path:
        """A file beside the suite. Raises `InputError` when it is not there, or not below the suite's folder."""
        if self._folder is None:
            raise InputError(f"The suite {self.name!r} was read without a folder, so it has no file {name!r}.")
        if problem := _lacking(self._folder, name):
            raise InputError(f"The suite {self.name!r} names the file {name!r}: {problem}.")
        return self._folder / name

    def select(self, item_ids: Iterable[str]) -> tuple[str, ...]:
        """The items to ask, in the order of asking: the same ones in the same order, however they come."""
        return asking_order(item_ids)[: self.items.limit]

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        if problems := problems_of(self):
            raise cross_error(problems, self.model_dump(mode="json"))
        return self


def find_suite(name: str) -> Suite:
    """A bundled suite by its name, or the suite in a folder, or in a file when `name` ends in .yaml or .yml."""
    if name in bundled_suites():
        return load_suite(SUITES / name)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_dir():
        return load_suite(path)
    raise InputError(
        f"There is no suite {name!r}.", hint=f"Sluice brings {', '.join(bundled_suites())}; or give a folder or a file."
    )


def bundled_suites() -> tuple[str, ...]:
    """Names of the suites that come with Sluice."""
    return tuple(sorted(path.parent.name for path in SUITES.glob(f"*/{SUITE_FILE}")))


def bundled_suite(name: str) -> Suite:
    """A suite that comes with Sluice. Raises `InputError` for another name."""
    if name not in bundled_suites():
        raise InputError(f"There is no suite {name!r}.", hint=f"Sluice brings {', '.join(bundled_suites())}.")
    return load_suite(SUITES / name)


def load_suite(path: Path) -> Suite:
    """Read the suite in a folder or a file. Raises `InputError` naming the file, the field, the line and the value."""
    file = path / SUITE_FILE if path.is_dir() else path
    return parse_suite(read_text(file, "suite"), str(file), file.parent)


def parse_suite(text: str, source: str, folder: Path | None = None) -> Suite:
    """The suite in a YAML text; `source` is named in errors, `folder` has the files that the suite names."""
    read = read_yaml(text, source, "suite", HINT)
    values, lines, problems = read.values, dict(read.lines), list(read.problems)
    files: dict[str, str] = {}
    if isinstance(gate := values.get("policy"), str):
        if lacking := _lacking(folder, gate):
            raise describe(None, [*problems, ("policy", lacking)], values, lines, Suite, source, hint=HINT)
        assert folder is not None
        beside = read_yaml(read_text(folder / gate, "gate policy"), str(folder / gate), "gate policy", HINT)
        values = {**values, "policy": beside.values}
        lines |= {("policy", *place): line for place, line in beside.lines.items()}
        problems += [(f"policy.{field}", says) for field, says in beside.problems]
        files["policy"] = gate
    problems += [*_missing_files(values, folder), *_bad_tasks(values, folder)]
    suite = validated(Suite, values, source, lines, problems, hint=HINT, habit=habit, files=files)
    suite._folder = folder
    suite._files = dict(_contents(suite))
    if suite.items.file and (never := item_problems(suite, read_items(suite.file(suite.items.file)))):
        raise describe(None, never, values, lines, Suite, source, hint=HINT, files=files)
    return suite


def _lacking(folder: Path | None, name: str) -> str:
    """What is wrong with a file's name; empty for a file below `folder`."""
    if folder is None:
        return "names a file, but the suite was read without a folder"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "must name a file below the suite's folder, so that the suite can be copied as one"
    return "" if (folder / name).is_file() else f"there is no such file in {str(folder)!r}"


def _missing_files(values: Mapping[str, Any], folder: Path | None) -> Iterator[Problem]:
    for section, field in _NAMING:
        within = values.get(section)
        name = within.get(field) if isinstance(within, dict) else None
        if isinstance(name, str) and name and (lacking := _lacking(folder, name)):
            yield f"{section}.{field}", lacking


def _bad_tasks(values: Mapping[str, Any], folder: Path | None) -> Iterator[Problem]:
    within = values.get("benchmarks")
    names = within.get("tasks") if isinstance(within, dict) else None
    for number, name in enumerate(names if isinstance(names, list) else ()):
        try:
            find_tasks([str(name)], folder / TASKS if folder else None)
        except InputError as error:
            yield f"benchmarks.tasks.{number}", str(error).rstrip(".")


def _contents(suite: Suite) -> Iterator[tuple[str, str]]:
    """Digests of the files that the suite names, and of its benchmark tasks with their data, Sluice's own included."""
    for section, field in _NAMING:
        within = getattr(suite, section)
        if name := getattr(within, field) if within else "":
            yield name, digest_file(suite.file(name))
    for name in suite.benchmarks.tasks if suite.benchmarks else ():
        yield f"{TASKS}/{name}", find_tasks([name], suite.tasks_folder)[0].digest
