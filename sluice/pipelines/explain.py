"""`why` and `diff` over runs: which step a word names, and where two runs first parted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sluice.components.task import TaskState
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError
from sluice.pipelines.runs import Run, find_run, list_runs
from sluice.provenance.canonical import Json
from sluice.provenance.explain import Difference, Explainer, Why, compare_values
from sluice.provenance.step_records import StepKey

_DIGEST = re.compile(r"^(?:sha256:)?([0-9a-f]{8,64})$")


@dataclass(frozen=True)
class TaskDifference:
    """What differs in one task of two runs; `step` is the step's name, empty for the run's or task's own values."""

    task: str
    step: str
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class RunDifference:
    """Two runs compared in the order of their DAG. `first` is the first difference that follows from no other one."""

    before: str
    after: str
    first: TaskDifference | None
    tasks: tuple[TaskDifference, ...]


def explain_step(workspace: Workspace, subject: str) -> list[Why]:
    """Why each step that `subject` names ran: RUN/TASK, a key digest (or its first 8 digits), a task or a step name.

    A name alone means the newest run that has such a task or step, else the last record of that name. Raises
    `InputError` when nothing has that name.
    """
    explainer = Explainer(workspace.objects, workspace.artifacts)
    run_name, separator, task_name = subject.partition("/")
    if separator and (found := [run for run in list_runs(workspace.settings) if run.id.endswith(run_name)]):
        subject, runs = task_name, found[:1]
    elif separator and run_name == "last":
        subject, runs = task_name, [find_run(workspace.settings, "last")]
    else:
        runs = list_runs(workspace.settings)
    if match := _DIGEST.match(subject):
        return [_by_digest(explainer, workspace, match[1])]
    for run in runs:
        tasks = run.tasks()
        steps = [*tasks[subject].steps] if subject in tasks else []
        steps += [s for state in tasks.values() for s in state.steps if s["key"]["name"] == subject and s not in steps]
        if steps:
            return [explainer.why(_key(step), hit=step["hit"]) for step in steps]
        if subject in tasks and separator:
            raise InputError(
                f"Task {subject!r} of run {run.id} came to no step: it has no key.",
                hint="A task that only pins values or talks to a server is not recorded as a step.",
            )
    records = [record for record in explainer.records() if record.key.name == subject]
    if not records:
        names = sorted({record.key.name for record in explainer.records()})
        raise InputError(
            f"STEP = {subject!r} names no step, task or key.", hint=f"Steps here: {', '.join(names) or 'none yet'}."
        )
    return [explainer.why(records[-1].key, hit=None)]


def compare_runs(workspace: Workspace, before: str, after: str) -> RunDifference:
    """Where two runs of one pipeline differ, in the order of the DAG. Raises `InputError` for two pipelines."""
    one, other = find_run(workspace.settings, before), find_run(workspace.settings, after)
    if one.pipeline != other.pipeline:
        raise InputError(f"{one.id} and {other.id} are runs of two pipelines: they have no steps in common.")
    explainer = Explainer(workspace.objects, workspace.artifacts)
    found: list[TaskDifference] = []
    parameters = compare_values("parameter", one.parameters, other.parameters)
    if parameters:
        found.append(TaskDifference("", "", tuple(parameters)))
    states = one.tasks(), other.tasks()
    makers: dict[tuple[str, str], str] = {}
    _remember(makers, "the run's parameters", one.parameters, other.parameters)
    for task in _order(one, other):
        pair = states[0].get(task), states[1].get(task)
        for difference in _compare_tasks(explainer, task, *pair):
            told = tuple(_explained(item, makers) for item in difference.differences)
            found.append(replace(difference, differences=told))
        if pair[0] is not None and pair[1] is not None:
            _remember(makers, task, pair[0].outputs, pair[1].outputs)
            _remember(makers, task, pair[0].values, pair[1].values)
    return RunDifference(one.id, other.id, _first(found), tuple(found))


def _compare_tasks(
    explainer: Explainer, task: str, before: TaskState | None, after: TaskState | None
) -> Iterator[TaskDifference]:
    if before is None or after is None:
        if before is not after:
            change = Difference("task", task, "removed" if before else "added", before and "ran", after and "ran")
            yield TaskDifference(task, "", (change,))
        return
    if not before.steps or not after.steps:
        differences = compare_values("value", before.values, after.values)
        differences += explainer.compare_inputs(before.outputs, after.outputs, "output")
        if differences:
            yield TaskDifference(task, "", tuple(differences))
        return
    pairs = zip(before.steps, after.steps, strict=False)
    same = True
    for one, other in pairs:
        if one["digest"] != other["digest"]:
            same = False
            yield TaskDifference(task, other["key"]["name"], tuple(explainer.compare_keys(_key(one), _key(other))))
    if len(before.steps) != len(after.steps):
        same = False
        names = [[step["key"]["name"] for step in state.steps] for state in (before, after)]
        yield TaskDifference(task, "", (Difference("steps", "", "changed", names[0], names[1]),))
    if same and before.outputs != after.outputs:
        # One key, two results: recorded in two object stores, or computed again after its outputs were collected.
        outputs = explainer.compare_inputs(before.outputs, after.outputs, "output")
        yield TaskDifference(task, "", tuple(outputs))


def _remember(
    makers: dict[tuple[str, str], str], task: str, before: Mapping[str, Json], after: Mapping[str, Json]
) -> None:
    """Note what differs in a task's results: who gets one as input differs because of it."""
    for one in compare_values("value", before, after):
        # Digests, times, names: a number that is the same by chance says nothing about where it comes from.
        if isinstance(one.before, str) and isinstance(one.after, str):
            makers.setdefault((one.before, one.after), task)


def _explained(difference: Difference, makers: dict[tuple[str, str], str]) -> Difference:
    if not isinstance(difference.before, str) or not isinstance(difference.after, str):
        return difference
    return replace(difference, follows=makers.get((difference.before, difference.after), ""))


def _first(found: Sequence[TaskDifference]) -> TaskDifference | None:
    for one in found:
        own = tuple(item for item in one.differences if not item.follows)
        if own:
            return replace(one, differences=own[:1])
    return None


def _order(one: Run, other: Run) -> list[str]:
    """Names of the tasks of both runs, in the order of the DAG."""
    names: list[str] = []
    for run in (one, other):
        try:
            names += [row["name"] for row in json.loads((run.folder / "dag.json").read_text())]
        except (OSError, ValueError):
            pass
        names += sorted(run.tasks(), key=lambda name, run=run: run.tasks()[name].started)  # type: ignore[misc]
    return list(dict.fromkeys(names))


def _by_digest(explainer: Explainer, workspace: Workspace, prefix: str) -> Why:
    keys = {record.key_digest: record.key for record in explainer.records()}
    for run in list_runs(workspace.settings):
        keys.update({step["digest"]: _key(step) for state in run.tasks().values() for step in state.steps})
    found = [key for digest, key in keys.items() if digest.removeprefix("sha256:").startswith(prefix)]
    if len(found) != 1:
        problem = f"{len(found)} steps" if found else "no step"
        raise InputError(f"STEP = {prefix!r} is the key of {problem}.", hint="`sluice why STEP` shows a step's key.")
    return explainer.why(found[0], hit=None)


def _key(step: dict[str, Json]) -> StepKey:
    key = step["key"]
    return StepKey(key["name"], key["code"], key["parameters"], key["inputs"])
