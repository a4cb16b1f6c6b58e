"""A sweep as a pipeline: its DAG is drawn for one grid. Data once; then each trial a task at each rung, side by side.

Trials that a rung stops keep their tasks, which end at once and say so: a DAG without branches is one that KFP runs the
same here and on a cluster (its local runner works through it one task at a time).
"""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from typing import Any

from kfp import dsl

from sluice.components.curate import curate
from sluice.components.dataset import dataset
from sluice.components.harvest import harvest
from sluice.components.holdout import holdout
from sluice.components.subjects import subjects
from sluice.components.sweep import choose, score, selection
from sluice.components.trial import finish_trial, rung, train_trial
from sluice.pipelines.tasks import named
from sluice.training.sweep import SweepPlan

POOL_LABEL, POOL = "sluice.dev/pool", "experiment"
"""Where a cluster runs trials: nodes with this label, cheap and away from what serves users."""


def sweep_pipeline(plan: SweepPlan) -> Any:
    """The KFP pipeline of this plan."""
    text = plan.to_text()

    @dsl.pipeline(name="sweep", description=f"{len(plan.trials)} trials of {plan.recipe}")  # type: ignore[untyped-decorator]
    def sweep(
        since: str = "",
        until: str = "",
        index: str = "",
        suite: str = "demo",
        holdout_size: int = 110,
        minimum_examples: int = 50,
        validation_share: float = 0.1,
    ) -> None:
        first = plan.trials[0]
        pinned = subjects(
            since=since,
            until=until,
            champion="",
            index=index,
            recipe=plan.recipe,
            overrides=first.overrides_text,
            suite=suite,
        )
        who = named(pinned, "subjects").outputs
        held = named(holdout(index=who["index"], size=holdout_size, suite=suite), "holdout").outputs
        records = named(harvest(since=who["since"], until=who["until"]), "harvest").outputs["records"]
        curated = curate(
            records=records,
            holdout=held["items"],
            index=who["index"],
            minimum=minimum_examples,
            validation_share=validation_share,
        )
        curated = named(curated, "curate").outputs["curated"]
        data = named(dataset(curated=curated, shuffle_labels=False), "dataset").outputs["dataset"]
        given = {"dataset": data, "base": who["base"]}
        chosen_by = named(selection(**given, plan=text), "selection").outputs
        alive: Any = ""
        losses: list[Any] = []
        for number, step in enumerate(plan.rungs, start=1):
            tasks = [
                _on_pool(
                    train_trial(**given, **_trial(plan, trial), step=step, alive=alive, sweep=chosen_by["Output"]),
                    f"{trial.name}-rung-{number}",
                )
                for trial in plan.trials
            ]
            found = [task.output for task in tasks]
            losses += found
            alive = named(rung(losses=found, step=step, keep=plan.keep), f"rung-{number}").output
        finals = [
            _on_pool(finish_trial(**given, **_trial(plan, trial), alive=alive), trial.name) for trial in plan.trials
        ]
        scores = [
            named(
                score(release=final.output, base=who["base"], prompts=chosen_by["prompts"], suite=suite),
                f"{trial.name}-score",
            )
            for trial, final in zip(plan.trials, finals, strict=True)
        ]
        ranked = choose(
            **given,
            plan=text,
            suite=suite,
            losses=losses,
            adapters=[final.output for final in finals],
            scores=[one.output for one in scores],
            sweep=chosen_by["Output"],
        )
        named(ranked, "choose")

    return sweep


def _trial(plan: SweepPlan, trial: Any) -> dict[str, Any]:
    return {"recipe": plan.recipe, "overrides": trial.overrides_text, "number": trial.number}


def _on_pool(task: Any, name: str) -> Any:
    # What kfp-kubernetes' add_node_selector writes; the local runner passes it over.
    task.platform_config.setdefault("kubernetes", {})["nodeSelector"] = {"labels": {POOL_LABEL: POOL}}
    return named(task, name)
