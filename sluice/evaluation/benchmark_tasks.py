"""Benchmark tasks: YAML files in the format of lm-evaluation-harness, with their data beside them.

A task is data, not code: no Python of its own (`!function`), nothing from a hub. So its digest says all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.evaluation.items import asking_order
from sluice.evaluation.json_lines import json_lines
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, digest_json, short

BUNDLED = Path(__file__).parent / "tasks"
"""The tasks that come with Sluice."""

RIGHT_OR_WRONG = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "generate_until": ("exact_match",),
}
"""The harness's metrics that are 0 or 1 for each item, by the kind of output that we measure."""


@dataclass(frozen=True)
class BenchmarkTask:
    """One task. `config` is the harness's, without its data; `items` are the rows that are asked, by id, and `splits`
    the other rows (worked examples). `metric` says whether an item was answered right."""

    name: str
    path: Path
    config: Mapping[str, Json]
    metric: str
    items: Mapping[str, Json]
    splits: Mapping[str, tuple[Json, ...]]

    @property
    def output(self) -> str:
        return str(self.config["output_type"])

    @property
    def digest(self) -> str:
        """Identity of the task: another wording, prompt, option or metric is another task."""
        return digest_json({"config": dict(self.config), "items": dict(self.items), "splits": dict(self.splits)})

    def select(self, limit: int | None) -> Mapping[str, Json]:
        """The items to ask, in the order of asking: the same ones, whatever their order in the file is."""
        return {name: self.items[name] for name in asking_order(self.items)[:limit]}


def find_tasks(names: Iterable[str], beside: Path | None = None) -> tuple[BenchmarkTask, ...]:
    """Tasks by name: NAME.yaml in the folder `beside` (that of the suite's own tasks), or one of Sluice's.

    Raises `InputError` naming the file and what is wrong with it.
    """
    return tuple(_find(name, beside) for name in names)


def _find(name: str, beside: Path | None) -> BenchmarkTask:
    places = [folder / f"{name}.yaml" for folder in (beside, BUNDLED) if folder is not None]
    for path in places:
        if path.is_file():
            return read_task(path)
    known = sorted(path.stem for place in places for path in place.parent.glob("*.yaml"))
    raise InputError(
        f"There is no benchmark task {name!r}: {' and '.join(str(path) for path in places)} do not exist.",
        hint=f"There are {', '.join(known)}.",
    )


def read_task(path: Path) -> BenchmarkTask:
    """Read a task file and its data. Raises `InputError` naming the file and the field."""
    config = _mapping(path)
    where = f"The benchmark task {str(path)!r}"
    if config.get("task") != path.stem:
        raise InputError(f"{where}: task = {config.get('task')!r} must be the file's name, {path.stem!r}.")
    output = config.get("output_type")
    if output not in RIGHT_OR_WRONG:
        raise InputError(f"{where}: output_type = {output!r} is not measured; there are {', '.join(RIGHT_OR_WRONG)}.")
    metric = _metric(config.get("metric_list"), RIGHT_OR_WRONG[output], where)
    files = _files(config, where)
    split = config.get("test_split")
    if split not in files:
        raise InputError(f"{where}: test_split = {split!r} names none of its data_files ({', '.join(files)}).")
    splits = {name: _rows(path.parent / file, where) for name, file in files.items()}
    items: dict[str, Json] = {}
    for row in splits.pop(split):
        name = f"{path.stem}/{row.get('id') or short(digest_json(row))}"
        if name in items:
            raise InputError(f"{where}: two of its items are {name!r}.")
        items[name] = row
    without_data = {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs")}
    return BenchmarkTask(path.stem, path, without_data, metric, items, {k: tuple(v) for k, v in splits.items()})


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The benchmark task {str(path)!r} cannot be read: {error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"The benchmark task {str(path)!r} is not plain YAML: {error}.",
            hint="A task is data: `!function` is not taken.",
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"The benchmark task {str(path)!r} must hold a mapping, not a {type(config).__name__}.")
    if "include" in config:
        raise InputError(f"The benchmark task {str(path)!r}: include is not taken; write the task in one file.")
    return config


def _metric(found: Any, known: tuple[str, ...], where: str) -> str:
    name = found[0].get("metric") if isinstance(found, list) and found and isinstance(found[0], dict) else None
    if name not in known:
        raise InputError(
            f"{where}: metric_list.0.metric = {name!r} must say right or wrong for each item: {' or '.join(known)}."
        )
    return str(name)


def _files(config: Mapping[str, Any], where: str) -> dict[str, str]:
    options = config.get("dataset_kwargs")
    files = options.get("data_files") if isinstance(options, dict) else None
    if config.get("dataset_path") != "json" or not isinstance(files, dict) or not files:
        raise InputError(
            f"{where}: its data must be JSONL beside it: dataset_path: json, and dataset_kwargs.data_files with a file "
            "for each split.",
            hint="Nothing is taken from a hub.",
        )
    for split, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{where}: dataset_kwargs.data_files.{split} = {file!r} must name one file beside it.")
    return {str(split): file for split, file in files.items()}


def _rows(path: Path, where: str) -> list[dict[str, Any]]:
    try:
        data = path.read_text(encoding="utf-8").encode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where}: its data {str(path)!r} cannot be read: {error}.") from error
    rows = []
    for line, row in json_lines(data, str(path)):
        if not isinstance(row, dict):
            raise InputError(f"{line} must be an object.")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds 0 items.")
    return rows
