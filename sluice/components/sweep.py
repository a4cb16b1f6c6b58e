"""What a sweep's trials share: the examples they are chosen by, their scores, the ranking and the chosen recipe.

Trials are chosen on the dataset's validation split, never on the gate's frozen holdout: whoever picks the best of many
on the questions that later judge it has used them up. The gate then asks its holdout for the first time.
"""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, List  # noqa: UP035  (KFP reads List)

from kfp import dsl

from sluice.components.task import Task, component
from sluice.components.trial import STOPPED, loss_of
from sluice.infra.errors import InputError, SluiceError, StepFailed
from sluice.provenance.canonical import Json, canonical_json, digest_json, short
from sluice.provenance.steps import StepOutput

if TYPE_CHECKING:
    from sluice.training.sweep import SweepPlan


@component
def selection(dataset: dsl.Input[dsl.Dataset], base: str, plan: str, prompts: dsl.Output[dsl.Dataset]) -> str:
    """The validation split as questions to choose by. Opens the sweep's page and returns its key."""
    from sluice.components.sweep import open_page, selection_step
    from sluice.components.task import digest_of, publish, task
    from sluice.training.sweep import SweepPlan

    with task("selection") as running:
        given = digest_of(dataset)
        publish(prompts, selection_step(running, dataset=given), kind="selection")
        return open_page(running, SweepPlan.from_text(plan), dataset=given, base=base)


@component
def score(release: str, base: str, prompts: dsl.Input[dsl.Dataset], suite: str) -> str:
    """The gate's main metric of a finished trial on the selection split."""
    from sluice.components.sweep import score_step
    from sluice.components.task import digest_of, task

    with task("score") as running:
        return score_step(running, release=release, base=base, prompts=digest_of(prompts), suite=suite)


@component
def choose(
    dataset: dsl.Input[dsl.Dataset],
    base: str,
    plan: str,
    suite: str,
    losses: List[str],  # noqa: UP006
    adapters: List[str],  # noqa: UP006
    scores: List[str],  # noqa: UP006
    sweep: str,
    ranking: dsl.Output[dsl.Artifact],
) -> str:
    """Rank the trials, write the chosen recipe. Returns the chosen adapter's digest."""
    from sluice.components.sweep import choose_step
    from sluice.components.task import digest_of, publish, task
    from sluice.training.sweep import SweepPlan

    with task("choose") as running:
        made, adapter = choose_step(
            running,
            SweepPlan.from_text(plan),
            dataset=digest_of(dataset),
            base=base,
            suite=suite,
            losses=losses,
            adapters=adapters,
            scores=scores,
            sweep=sweep,
        )
        publish(ranking, made, kind="sweep")
    return adapter


@dataclass(frozen=True)
class Row:
    """One trial in the ranking: where it got to, with what loss, and what it scored if it got to the end."""

    number: int
    label: str
    overrides: Json
    steps: int
    validation_loss: float | None
    score: float | None
    adapter: str | None


def selection_step(running: Task, *, dataset: str) -> str:
    """Digest of the selection: prompts of the dataset's validation split, and the answers they should get."""

    from sluice.evaluation.items import ITEMS_FILE, Item, write_items

    def build(folder: Path) -> StepOutput:
        lines = running.workspace.file(dataset, "validation.jsonl").decode().split("\n")
        rows = [json.loads(line) for line in lines if line]
        if not rows:
            raise InputError("The dataset has no validation split to choose trials by.", hint="Raise validation_share.")
        items = []
        for row in rows:
            *asked, answer = row["messages"]
            items.append(Item(row["id"], asked[-1]["content"], answer["content"], tuple(asked)))
        write_items(folder / ITEMS_FILE, items)
        made = running.workspace.artifacts.put_directory(folder, "selection", {"dataset": dataset})
        return StepOutput({"selection": made.digest}, {"items": len(rows)})

    record = running.step(
        "selection", rooms=("components.sweep",), parameters={}, inputs={"dataset": dataset}, function=build
    )
    running.say(f"{record.output.values['items']} validation examples to choose by; the gate's holdout is not touched")
    return record.output.artifacts["selection"]


def open_page(running: Task, plan: "SweepPlan", *, dataset: str, base: str) -> str:
    """The key of the sweep's page in MLflow, under which its trials are shown; made when MLflow answers."""
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.run_page import DatasetReference, RunPage

    settings = running.workspace.settings
    key = digest_json({"sweep": plan.digest, "dataset": dataset, "base": base})
    try:
        registry = MlflowRegistry(settings.mlflow.tracking_uri)
        name = f"{settings.application} sweep of {Path(plan.recipe).stem} {short(key)}"
        page = RunPage.open(registry, "training", key, name)
        page.set_tags({"application": settings.application, "dataset": dataset, "sweep": f"{len(plan.trials)} trials"})
        page.log_parameters({"recipe": plan.recipe, "rungs": list(plan.rungs), "keep": plan.keep})
        page.link_inputs([DatasetReference("dataset", dataset)])
        if page.status != "RUNNING":
            page.set_status("RUNNING")
        running.state.values["sweep_run"] = page.link.url
    except SluiceError as error:
        print(f"MLflow does not show this sweep: {error.message}", flush=True)
    return key


def score_step(running: Task, *, release: str, base: str, prompts: str, suite: str) -> str:
    """The mean of the suite's main metric over the selection as text. A trial without any scored item has none."""
    from sluice.components.answers import answers_step
    from sluice.evaluation.answer_metrics import score_answers
    from sluice.evaluation.answers import read_answers
    from sluice.evaluation.items import ITEMS_FILE, read_items
    from sluice.evaluation.suite import find_suite
    from sluice.rag.embed import MiniLmEmbedder

    if release == STOPPED:
        running.say("stopped before its end: not scored")
        return STOPPED
    chosen = find_suite(suite)
    metric = chosen.policy.main_metric
    answers = answers_step(running, release=release, base=base, prompts=prompts, suite=suite)
    items = {item.id: item for item in read_items(running.workspace.folder(prompts) / ITEMS_FILE)}
    asked = [items[item] for item in chosen.select(items)]
    given = read_answers(running.workspace.folder(answers) / "answers.jsonl")
    found = score_answers(given, asked, [metric], embed=MiniLmEmbedder())
    values = [value for value in found.columns[metric].values.values() if value is not None]
    # As in the gate: more items without a score than the policy allows is no result.
    if len(asked) - len(values) > chosen.policy.error_budget * len(asked) or not values:
        running.say(f"only {len(values)} of {len(asked)} answers could be scored: no result")
        return "none"
    mean = sum(values) / len(values)
    running.state.values.update(metric=metric, score=mean, items=len(values))
    running.say(f"{metric} {mean:.3f} over {len(values)} validation examples")
    return repr(mean)


def choose_step(
    running: Task,
    plan: "SweepPlan",
    *,
    dataset: str,
    base: str,
    suite: str,
    losses: list[str],
    adapters: list[str],
    scores: list[str],
    sweep: str,
) -> tuple[str, str]:
    """Digests of the ranking and of the chosen adapter. `losses` rung by rung, each in the order of the grid.

    Raises `StepFailed` when no trial has a score.
    """
    from sluice.evaluation.suite import find_suite
    from sluice.training.recipe import load_recipe

    chosen_suite = find_suite(suite)
    metric = chosen_suite.catalogue[chosen_suite.policy.main_metric]
    rows = rank(plan, losses=losses, adapters=adapters, scores=scores, higher_is_better=metric.higher_is_better)
    best = rows[0]
    if best.score is None or best.adapter is None:
        raise StepFailed("No trial of the sweep could be scored.", hint="The log of the `score` tasks says why.")
    recipe = load_recipe(plan.recipe).with_overrides(best.overrides)
    table = ranking_markdown(plan, rows, metric.name)

    def write(folder: Path) -> StepOutput:
        import yaml

        files = {
            "ranking.json": canonical_json([vars(row) for row in rows]),
            "ranking.md": table.encode(),
            "recipe.yaml": yaml.safe_dump(recipe.to_json(), sort_keys=False).encode(),
        }
        made = running.workspace.artifacts.put_files(files, "sweep", {"dataset": dataset, "adapter": best.adapter})
        return StepOutput({"sweep": made.digest}, {"chosen": best.number, "score": best.score})

    record = running.step(
        "choose",
        rooms=("components.sweep", "components.trial", "training.sweep"),
        parameters={
            "plan": json.loads(plan.to_text()),
            "suite": chosen_suite.digest,
            "losses": losses,
            "scores": scores,
        },
        inputs={
            "dataset": dataset,
            "base": base,
            **{f"trial-{row.number}": row.adapter for row in rows if row.adapter},
        },
        function=write,
    )
    running.state.values.update(
        overrides=best.overrides, label=best.label, ranking=[vars(row) for row in rows], metric=metric.name
    )
    _show(running, plan, sweep, rows, metric.name, table, dataset=dataset, base=base)
    running.say(f"trial {best.number} ({best.label}): {metric.name} {best.score:.3f}")
    return record.output.artifacts["sweep"], best.adapter


def rank(
    plan: "SweepPlan", *, losses: list[str], adapters: list[str], scores: list[str], higher_is_better: bool
) -> list[Row]:
    """All trials, best first: by score, then by how far they got, then by validation loss, then as in the grid.

    A trial without a score never stands before one that has one.
    """
    rows = []
    for place, trial in enumerate(plan.trials):
        reached = [
            (step, loss_of(losses[rung * len(plan.trials) + place]))
            for rung, step in enumerate(plan.rungs)
            if losses[rung * len(plan.trials) + place] != STOPPED
        ]
        finished = adapters[place] != STOPPED
        step, loss = reached[-1] if reached else (0, None)
        rows.append(
            Row(
                trial.number,
                trial.label,
                dict(trial.overrides),
                plan.max_steps if finished else step,
                loss,
                loss_of(scores[place]),
                adapters[place] if finished else None,
            )
        )
    worst = float("inf")

    def order(row: Row) -> tuple[float, int, float, int]:
        by_score = worst if row.score is None else -row.score if higher_is_better else row.score
        return by_score, -row.steps, worst if row.validation_loss is None else row.validation_loss, row.number

    return sorted(rows, key=order)


def ranking_markdown(plan: "SweepPlan", rows: list[Row], metric: str) -> str:
    """The ranking as people read it."""
    from sluice.training.run_figures import loss_text

    lines = [f"| | trial | {metric} | steps | validation loss at the last rung |", "|---|---|---|---|---|"]
    for place, row in enumerate(rows, start=1):
        score_text = "" if row.score is None else f"{row.score:.3f}"
        loss = "" if row.validation_loss is None else loss_text(row.validation_loss)
        end = "" if row.adapter else " (stopped)"
        lines.append(f"| {place} | {row.label} | {score_text} | {row.steps}{end} | {loss} |")
    lines.append("")
    lines.append(
        f"{len(plan.trials)} trials of {plan.recipe}, judged at steps {', '.join(map(str, plan.rungs)) or 'none'}; at "
        f"each the better {plan.keep:.0%} went on. Scores are over the dataset's validation split: the gate's holdout "
        "was not asked."
    )
    return "\n".join(lines)


def _show(
    running: Task, plan: "SweepPlan", sweep: str, rows: list[Row], metric: str, table: str, *, dataset: str, base: str
) -> None:
    from sluice.components.train import step_arguments
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.run_page import NOTE_TAG, PARENT_TAG, MetricPoint, RunPage
    from sluice.training.recipe import load_recipe

    recipe = load_recipe(plan.recipe)
    try:
        registry = MlflowRegistry(running.workspace.settings.mlflow.tracking_uri)
        page = RunPage.find(registry, "training", sweep)
        if page is None:
            return
        for place, row in enumerate(rows, start=1):
            made = recipe.with_overrides(row.overrides)
            key, _ = running.key("train", **step_arguments(made, dataset=dataset, base=base))
            # A trial that was trained before this sweep has a page that knows of no parent.
            if row.adapter and (trial := RunPage.find(registry, "training", key.digest)):
                trial.set_tags({PARENT_TAG: page.run_id, "sweep": f"{place} of {len(rows)}: {row.label}"})
                if row.score is not None:
                    trial.log_points([MetricPoint(f"selection.{metric}", row.score, plan.max_steps)])
        page.log_points([MetricPoint(f"best.{metric}", rows[0].score or 0.0, 0)])
        page.set_tags({NOTE_TAG: table, "chosen": rows[0].label})
        page.set_status("FINISHED")
        running.state.values["sweep_run"] = page.link.url
    except SluiceError as error:
        print(f"MLflow does not show the ranking: {error.message}", flush=True)
