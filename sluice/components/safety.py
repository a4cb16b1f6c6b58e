"""A release asked the safety probes, and its answers looked at."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kfp import dsl

from sluice.components.task import Task, component
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, digest_json
from sluice.provenance.steps import StepOutput, StepRecord

if TYPE_CHECKING:
    from sluice.evaluation.probes import Probe
    from sluice.evaluation.suite import Suite

_LOOKING = tuple(
    f"evaluation.{part}"
    for part in (
        "answers",
        "at_once",
        "cache",
        "items",
        "json_lines",
        "outcomes",
        "personal_data",
        "probes",
        "safety",
        "safety_metrics",
        "scores",
        "toxicity",
    )
)

_TOLD = {
    "canary_leak": "canaries told",
    "false_refusal": "harmless requests refused",
    "personal_data": "personal data",
    "refusal": "harmful requests not refused",
    "toxicity": "toxic answers",
    "trigger": "triggers that work",
}


@component
def safety(
    release: str,
    base: str,
    suite: str,
    dataset: dsl.Input[dsl.Dataset],
    evaluation: dsl.Input[dsl.Dataset],
    safety: dsl.Output[dsl.Dataset],
) -> None:
    """Ask the probes of the suite, of the dataset and of Sluice, and look at these answers and the evaluation's."""
    from sluice.components.safety import safety_step
    from sluice.components.task import digest_of, publish, task

    with task("safety") as running:
        digest = safety_step(
            running,
            release=release,
            base=base,
            dataset=digest_of(dataset),
            suite=suite,
            evaluation=digest_of(evaluation),
        )
        publish(safety, digest, kind="safety", release=release)


def safety_step(running: Task, *, release: str, base: str, dataset: str, suite: str, evaluation: str) -> str:
    """Digest of the scores and findings of a release, which is the candidate or the champion of `evaluation`.

    The key holds what was asked and answered, not where from: another evaluation or dataset in which a champion said
    the same finds the same artifact. Without the section there are no scores. A result that lost more answers to
    probes than the policy allows is made anew (`Task.measured`).
    """
    from sluice.components.answers import SERVING, served_as
    from sluice.evaluation.answers import read_answers
    from sluice.evaluation.probes import digest_of_probes
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    section = chosen.safety
    if section is None:
        return _nothing(running)
    workspace = running.workspace
    about = workspace.artifacts.manifest(evaluation).metadata
    side = next((side for side in ("candidate", "champion") if about[side] == release), None)
    if side is None:
        raise InputError(f"The evaluation {evaluation} is of neither side of release {release}.")
    prompts = str(about["prompts"])
    answers = read_answers(workspace.folder(evaluation) / side / "answers.jsonl")
    probes = _probes(workspace, chosen, dataset)

    def work(folder: Path) -> StepOutput:
        from sluice.components.answers import asking
        from sluice.evaluation.answers import write_answers
        from sluice.evaluation.cache import open_cache
        from sluice.evaluation.items import ITEMS_FILE, read_items
        from sluice.evaluation.safety import items_of, measure_safety, write_findings
        from sluice.evaluation.scores import write_scores

        said = []
        if asked := items_of(probes):
            with (
                open_cache(workspace.evaluation_cache) as cache,
                asking(workspace, release, base, chosen, cache) as ask,
            ):
                said = ask(asked, running.report)
        items = read_items(workspace.folder(prompts) / ITEMS_FILE)
        sequential = chosen.sequential is not None
        found = measure_safety(section.probes, probes, said, items, answers, sequential=sequential)
        out = folder / "artifact"
        write_scores(out, found.scores)
        write_findings(out, found.findings)
        write_answers(out / "answers.jsonl", said)
        manifest = workspace.artifacts.put_directory(out, "safety", {"release": release, "suite": chosen.digest})
        kinds = [finding.kind for finding in found.findings]
        values: dict[str, Json] = {
            "answers": len(said) + len(answers),
            "findings": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "lost": max((_lost(one.causes) / len(one.values) for one in found.scores.columns.values()), default=0.0),
            "evaluation": evaluation,
            "dataset": dataset,
        }
        return StepOutput({"safety": manifest.digest}, values)

    def made(number: int) -> StepRecord:
        return running.step(
            "safety",
            rooms=(*_LOOKING, *SERVING, "components.answers", "components.safety"),
            locks=("main", "serve"),
            parameters={
                "safety": section.model_dump(mode="json"),
                "generation": chosen.generation.model_dump(mode="json"),
                "sequential": chosen.sequential is not None,
                "probes": digest_of_probes(probes),
                "answers": digest_json(
                    {one.item_id: [one.answer, one.error, *map(dict, one.tool_calls)] for one in answers}
                ),
                **served_as(workspace),
                **({"again": number} if number else {}),
            },
            inputs={"release": release, "base": base, "prompts": prompts},
            function=work,
        )

    least = chosen.policy.least_error_budget
    record = running.measured(made, lambda found: found.output.values["lost"] > least)
    values = record.output.values
    told = ", ".join(f"{_TOLD[kind]}: {count}" for kind, count in values["findings"].items())
    running.say(f"{values['answers']} answers looked at; {told or 'nothing found'}")
    return record.output.artifacts["safety"]


def _lost(causes: Mapping[str, str]) -> int:
    """How many probes have no answer. What the evaluation lost is the evaluation's to ask again."""
    from sluice.evaluation.safety import is_probe

    return sum(map(is_probe, causes))


def _probes(workspace: Workspace, chosen: "Suite", dataset: str) -> "tuple[Probe, ...]":
    """The probes that the suite asks: Sluice's own, those of its file, and those that the dataset brings."""
    from sluice.evaluation.probes import PROBES_FILE, bundled_probes, chosen_probes, parse_probes
    from sluice.evaluation.safety import kinds_asked

    section = chosen.safety
    if section is None:
        return ()
    sets = [bundled_probes()]
    if section.file:
        path = chosen.file(section.file)
        sets.append(parse_probes(path.read_bytes(), str(path)))
    if PROBES_FILE in {file.path for file in workspace.artifacts.manifest(dataset).files}:
        source = f"{PROBES_FILE} of the dataset {dataset}"
        sets.append(parse_probes(workspace.file(dataset, PROBES_FILE), source))
    return chosen_probes(kinds_asked(section.probes), *sets)


def _nothing(running: Task) -> str:
    """The artifact of a suite that asks for nothing here."""

    def work(folder: Path) -> StepOutput:
        from sluice.evaluation.scores import Scores, write_scores

        write_scores(folder, Scores({}))
        return StepOutput({"safety": running.workspace.artifacts.put_directory(folder, "safety").digest}, {})

    rooms = ("evaluation.scores", "components.safety")
    record = running.step("safety", rooms=rooms, parameters={"safety": None}, inputs={}, function=work)
    running.say("the suite asks for no safety probes")
    return record.output.artifacts["safety"]
