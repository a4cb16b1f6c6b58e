"""Benchmark tasks run by lm-evaluation-harness against the served model, and what it said to each item.

The harness makes prompts and few-shot examples, tokenises, extracts and scores (Biderman et al. 2024,
arXiv:2405.14782). Requests are sent by `Endpoint`, statistics are made by the gate.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.evaluation.benchmark_endpoint import Endpoint
from sluice.evaluation.benchmark_metrics import benchmark_metrics
from sluice.evaluation.benchmark_tasks import BenchmarkTask
from sluice.evaluation.scores import Scores, column, scores_of
from sluice.infra.errors import InputError, SluiceError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json

if TYPE_CHECKING:
    from sluice.evaluation.benchmark_model import ServedModel, Told

SAMPLES_FILE = "samples.jsonl"
_FEWSHOT_SEED = 1234
_SIZES: Mapping[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda text: len(text.encode())}


@dataclass(frozen=True)
class Sample:
    """What one item was asked and what came back. `value` is 1 (right), 0 (wrong), or the cause why there is none.

    `asked` is the prompt (plain text, or the last user message), `said` the choice or the answer as it was scored.
    """

    item: str
    task: str
    asked: str
    expected: str
    said: str
    value: float | str


def run_benchmarks(
    tasks: Sequence[BenchmarkTask],
    endpoint: Endpoint,
    *,
    base: Path,
    limit: int | None = None,
    report: Report = no_report,
) -> list[Sample]:
    """Ask the served model all items of `tasks` (at most `limit` of each).

    `base` is the base model's folder. An interrupted call, started again with the endpoint's cache, asks only
    what is missing. Raises `InputError` for a task that the harness refuses, and what `Endpoint.ask_all` raises.
    """
    if not (base / "tokenizer.json").is_file():
        raise InputError(f"The base model's folder {str(base)!r} holds no tokenizer.json.")
    chosen = [(task, task.select(limit)) for task in tasks]
    total, done, samples = sum(len(items) for _, items in chosen), 0, list[Sample]()
    report(0, total, "opening lm-evaluation-harness")
    with _quiet_harness():
        from sluice.evaluation.benchmark_model import ServedModel

        model = ServedModel(endpoint, base, lambda *_: None)
        for task, items in chosen:
            model.told = _told(report, done, total, len(items), task.name)
            samples += _run(task, items, model)
            done += len(items)
    report(total, total, f"{total} items of {len(chosen)} tasks")
    return samples


def benchmark_scores(tasks: Sequence[BenchmarkTask], samples: Sequence[Sample]) -> Scores:
    """One column for each task."""
    metrics = benchmark_metrics(task.name for task in tasks)
    return scores_of(
        column(metric, {sample.item: sample.value for sample in samples if sample.task == task.name})
        for task, metric in zip(tasks, metrics, strict=True)
    )


def _told(report: Report, done: int, total: int, items: int, task: str) -> Told:
    def told(answered: int, requests: int) -> None:
        report(done + items * answered / requests, total, f"benchmark {task}: {answered} of {requests} requests")

    return told


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """lm_eval imported without a network and without a word: it logs each prompt option and draws bars."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _run(task: BenchmarkTask, items: Mapping[str, Json], model: ServedModel) -> Iterator[Sample]:
    from lm_eval.evaluator import evaluate

    chat = task.output == "generate_until"
    try:
        built = _built(task, items)
        result = evaluate(
            lm=model,
            task_dict=built,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    except SluiceError:
        raise
    except Exception as error:
        # The harness raises whatever its templates, filters and metrics raise: it is the task that makes them fail.
        raise InputError(
            f"lm-evaluation-harness cannot run the benchmark task {str(task.path)!r}: {type(error).__name__}: {error}"
        ) from error
    found = result["samples"][task.name]
    names = list(items)
    first = found[0]["filter"]
    for one in found:
        if one["filter"] == first:
            yield _sample(task, names[one["doc_id"]], one, model)


def _built(task: BenchmarkTask, items: Mapping[str, Json]) -> Any:
    """The task as the harness holds it, its rows given to it as they were read."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    rows = {**task.splits, str(task.config["test_split"]): list(items.values())}
    data = {split: Dataset.from_list(list(some)) for split, some in rows.items()}
    config = {**task.config, "custom_dataset": lambda **_: data}
    built = TaskManager(include_defaults=False).load([config])
    for one in built["tasks"].values():
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
        one.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return built


def _sample(task: BenchmarkTask, item: str, found: Mapping[str, Any], model: ServedModel) -> Sample:
    from sluice.evaluation.benchmark_model import request_name

    lost = [cause for one in found["arguments"] if (cause := model.lost.get(request_name(*one)))]
    context = found["arguments"][0][0]
    if task.output == "generate_until":
        asked, said = json.loads(context[0])[-1]["content"], str(found["filtered_resps"][0])
        expected = found["target"] if isinstance(found["target"], str) else " | ".join(map(str, found["target"]))
    else:
        choices = [str(rest).strip() for _, rest in found["arguments"]]
        asked, said = str(context), "" if lost else choices[_preferred(task.metric, choices, found)]
        target = found["target"]
        if isinstance(target, int) and not 0 <= target < len(choices):
            raise InputError(f"{task.path}: the right choice of item {item!r} is {target}, and it has {len(choices)}.")
        expected = choices[target] if isinstance(target, int) else str(target)
    value = lost[0] if lost else float(found[task.metric])
    return Sample(item, task.name, asked, expected, said, value)


def _preferred(metric: str, choices: Sequence[str], found: Mapping[str, Any]) -> int:
    """Number of the choice that the model finds most likely, by the measure of `metric`."""
    sizes = [_SIZES[metric](choice) if metric in _SIZES else 1 for choice in choices]
    likelihoods = [answer[0] / size for answer, size in zip(found["filtered_resps"], sizes, strict=True)]
    return likelihoods.index(max(likelihoods))
