"""Retraining: from production traces to a candidate that waits for approval. Nothing waits in a pod for a person."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from kfp import dsl

from sluice.components.benchmark import benchmark
from sluice.components.calibrate import calibrate
from sluice.components.curate import curate
from sluice.components.dataset import dataset
from sluice.components.evaluate import evaluate
from sluice.components.gate import gate
from sluice.components.harvest import harvest
from sluice.components.holdout import holdout
from sluice.components.register import register
from sluice.components.safety import safety
from sluice.components.speed import speed
from sluice.components.subjects import subjects
from sluice.components.train import train
from sluice.pipelines.tasks import named


@dsl.pipeline(name="retrain", description="harvest, curate, dataset, train, evaluate, gate, register")  # type: ignore[untyped-decorator]
def retrain(
    since: str = "",
    until: str = "",
    champion: str = "",
    index: str = "",
    recipe: str = "demo",
    overrides: str = "",
    suite: str = "demo",
    holdout_size: int = 110,
    minimum_examples: int = 50,
    validation_share: float = 0.1,
    shuffle_labels: bool = False,
    canaries: int = 0,
) -> None:
    pinned = subjects(
        since=since, until=until, champion=champion, index=index, recipe=recipe, overrides=overrides, suite=suite
    )
    who = named(pinned, "subjects").outputs
    held = named(holdout(index=who["index"], size=holdout_size, suite=suite), "holdout").outputs
    records = named(harvest(since=who["since"], until=who["until"]), "harvest").outputs["records"]
    curated = named(
        curate(
            records=records,
            holdout=held["items"],
            index=who["index"],
            minimum=minimum_examples,
            validation_share=validation_share,
        ),
        "curate",
    ).outputs["curated"]
    data = named(dataset(curated=curated, shuffle_labels=shuffle_labels, canaries=canaries), "dataset").outputs[
        "dataset"
    ]
    trained = named(train(dataset=data, base=who["base"], recipe=recipe, overrides=overrides), "train").outputs
    base = who["base"]
    both = {"candidate": trained["Output"], "champion": who["champion"]}
    calibration = named(calibrate(suite=suite), "calibrate").outputs["Output"]
    asked = {**both, "base": base, "prompts": held["prompts"], "suite": suite}
    answered = named(evaluate(**asked, calibration=calibration), "evaluate").outputs["evaluation"]
    measured = {}
    for side, release in both.items():
        known = benchmark(release=release, base=base, suite=suite)
        measured[f"benchmark_{side}"] = named(known, f"benchmark-{side}").outputs["scores"]
        probed = safety(release=release, base=base, suite=suite, dataset=data, evaluation=answered)
        measured[f"safety_{side}"] = named(probed, f"safety-{side}").outputs["safety"]
    measured["speed"] = named(speed(**asked), "speed").outputs["speed"]
    decided = named(
        gate(
            **both,
            index=who["index"],
            suite=suite,
            calibration=calibration,
            items=held["items"],
            prompts=held["prompts"],
            dataset=data,
            training=trained["training"],
            evaluation=answered,
            **measured,
        ),
        "gate",
    ).outputs
    version = register(
        adapter=trained["adapter"],
        training=trained["training"],
        dataset=data,
        decision=decided["decision"],
        report=decided["report"],
    )
    named(version, "register")
