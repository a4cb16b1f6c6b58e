"""Reproduction: the recorded steps behind a version, computed again and compared digest by digest.

Each step gets the inputs that its record names, so that a difference belongs to the step that shows it. A step whose
bytes differ gets named reasons, and for weights and answers the measured difference.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sluice.components.lineage import open_lineage
from sluice.components.rerun import RERUNNABLE, Scratch, rerun, suite_of
from sluice.components.workspace import Workspace
from sluice.infra.errors import InputError, SluiceError
from sluice.infra.progress import Report, no_report
from sluice.provenance.attestation import host_name
from sluice.provenance.canonical import Json, hex_of, short
from sluice.provenance.code import lock_digest
from sluice.provenance.lineage import LineageIndex
from sluice.provenance.rerun import Rerun
from sluice.provenance.step_records import StepRecord, parse_record
from sluice.training.weights import TensorDifference, compare_weights

if TYPE_CHECKING:
    from sluice.evaluation.scores import Column

State = Literal["same", "differs", "not rerun"]

ACCOUNTS = {
    "training": "holds wall times and the log",
    "answers": "holds the times of each answer",
    "evaluation": "holds the times of each answer",
}
"""Kinds of artifacts that cannot be the same bytes twice, and why; what they say besides is compared."""
LOCK = "requirements/main.lock"


@dataclass(frozen=True)
class OutputComparison:
    """One output artifact of a step: its recorded digest and the one of the rerun. `note` says more, in words; an
    `account` is the same when what it says besides times is."""

    name: str
    recorded: str
    rerun: str
    same: bool
    account: bool = False
    note: str = ""


@dataclass(frozen=True)
class ScoreDifference:
    """A gate metric of the recorded answers and of the rerun's: means over the items."""

    metric: str
    recorded: float | None
    rerun: float | None


@dataclass(frozen=True)
class StepComparison:
    """What became of one recorded step. `reasons` say why bytes differ or why it was not run; `changes` what is not
    as it was when it was recorded, whether it mattered or not."""

    step: str
    key: str
    state: State
    seconds: float = 0.0
    outputs: tuple[OutputComparison, ...] = ()
    reasons: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    weights: tuple[TensorDifference, ...] = ()
    scores: tuple[ScoreDifference, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """The steps behind a version's digest, origins first."""

    digest: str
    steps: tuple[StepComparison, ...]

    @property
    def state(self) -> State:
        """`differs` when one step does, `not rerun` when none was."""
        states = {step.state for step in self.steps}
        return "differs" if "differs" in states else "same" if "same" in states else "not rerun"


@dataclass
class _Session:
    workspace: Workspace
    folder: Path
    suite: str
    report: Report
    instead: dict[str, str] = field(default_factory=dict)


def reproduce(
    workspace: Workspace,
    digest: str,
    *,
    steps: Collection[str] = (),
    suite: str = "",
    report: Report = no_report,
) -> Reproduction:
    """Run the recorded steps behind an artifact again, all or those that `steps` names, in a scratch folder.

    Nothing is recorded and nothing of the originals is written over. Raises `InputError` for an artifact that no step
    made and for an unknown step, `IntegrityError` when a record or its statement is damaged.
    """
    records = records_behind(workspace, open_lineage(workspace, report), digest)
    known = {record.key.name for record in records}
    if unknown := sorted(set(steps) - known):
        raise InputError(
            f"--steps {unknown[0]!r} is none of the steps behind {short(digest)}.",
            hint=f"There are: {', '.join(sorted(known))}.",
        )
    place = workspace.settings.home / "reproduce"
    place.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory(dir=place, prefix=f"{short(digest)}-") as scratch:
        session = _Session(workspace, Path(scratch), suite, report)
        for number, record in enumerate(records):
            if not steps or record.key.name in steps:
                report(number, len(records), f"running {record.key.name} again")
                found.append(_compare(session, record))
    return Reproduction(digest, tuple(found))


def records_behind(workspace: Workspace, index: LineageIndex, digest: str) -> list[StepRecord]:
    """The records of the steps that made an artifact and its inputs, origins first, then the evaluations of it; of
    each step the latest that made just this. Every record's statement is verified."""
    ordered: dict[str, StepRecord] = {}
    # (artifact, whether all behind it was looked at): a step comes after the steps that made its inputs.
    waiting = [(digest, False)]
    seen: set[str] = set()
    while waiting:
        artifact, opened = waiting.pop()
        for record in _made(workspace, index.makers(artifact), artifact):
            if opened:
                ordered.setdefault(record.key_digest, record)
            elif artifact not in seen:
                seen.add(artifact)
                waiting.append((artifact, True))
                waiting.extend((one, False) for one in record.key.inputs.values())
    if not ordered:
        raise InputError(
            f"No recorded step made {digest}.", hint="Was it imported from another site, or is it a base model?"
        )
    for record in _read(workspace, index.users(digest)):
        asked = _ASKED.get(record.key.name)
        if asked and record.key.inputs.get(asked) == digest:
            ordered.setdefault(record.key_digest, record)
    for record in ordered.values():
        workspace.steps.verify(record)
    return list(ordered.values())


def _made(workspace: Workspace, places: Collection[str], artifact: str) -> list[StepRecord]:
    records = [one for one in _read(workspace, places) if artifact in one.output.artifacts.values()]
    return sorted(records, key=lambda record: record.finished)[-1:]


def _read(workspace: Workspace, places: Collection[str]) -> list[StepRecord]:
    return [parse_record(place, workspace.objects.get(place)) for place in places]


def _compare(session: _Session, record: StepRecord) -> StepComparison:
    name, started = record.key.name, time.monotonic()
    told = StepComparison(name, record.key_digest, "not rerun")
    if name not in RERUNNABLE:
        return replace(told, reasons=("it acts on what is live, or unpacks what was installed",))
    instead = session.instead if name in _ASKED else {}
    try:
        scratch, again = rerun(session.workspace, record, session.folder, suite=session.suite, instead=instead)
    except SluiceError as error:
        return replace(told, seconds=_since(started), reasons=(str(error),))
    outputs = tuple(
        _compare_output(scratch, output, digest, again.output.artifacts[output])
        for output, digest in sorted(record.output.artifacts.items())
    )
    # Bytes decide; of an account, what it says besides times. What an account says follows from the bytes beside it.
    same = all(one.same for one in outputs)
    changes = _changes(session.workspace, record, again, scratch)
    weights: tuple[TensorDifference, ...] = ()
    scores: tuple[ScoreDifference, ...] = ()
    for one in outputs:
        if one.name == "adapter" and not one.same:
            session.instead[one.recorded] = one.rerun
            weights = compare_weights(scratch.folder(one.recorded), scratch.folder(one.rerun))
        if one.name == "answers":
            scores = _scores_of_answers(scratch, record, one, session.suite)
        if one.name in _PARTS:
            scores = _scores_within(scratch, one)
    notes = tuple(one.note for one in outputs if not one.same and one.name in _EXPLAINED)
    return replace(
        told,
        state="same" if same else "differs",
        seconds=_since(started),
        outputs=outputs,
        reasons=() if same else notes or changes or (_UNEXPLAINED.get(name, _UNKNOWN),),
        changes=changes,
        weights=weights,
        scores=scores,
    )


def _compare_output(scratch: Scratch, name: str, recorded: str, rerun: str) -> OutputComparison:
    told = OutputComparison(name, recorded, rerun, recorded == rerun)
    if told.same:
        return told
    if name == "training":
        one, other = (_figures(json.loads(scratch.file(digest, "training.json"))) for digest in (recorded, rerun))
        note = f"{'the same losses in every step' if one == other else 'other losses'}; {ACCOUNTS[name]}"
        return replace(told, same=one == other, account=True, note=note)
    if name == "answers":
        one, other = (_texts(scratch.folder(digest) / "answers.jsonl") for digest in (recorded, rerun))
        equal = sum(one[item] == other.get(item) for item in one)
        note = f"{equal} of {len(one)} answers are the same text; {ACCOUNTS[name]}"
        return replace(told, same=one == other, account=True, note=note)
    if name == "evaluation":
        found = [_side(scratch, side, recorded, rerun) for side in SIDES]
        note = "; ".join([*(note for _, note in found), ACCOUNTS[name]])
        return replace(told, same=all(same for same, _ in found), account=True, note=note)
    if name == "records":
        return replace(told, note=_traces_apart(scratch.folder(recorded), scratch.folder(rerun)))
    manifests = [scratch.artifacts.manifest(digest) for digest in (recorded, rerun)]
    files = [{entry.path: entry.digest for entry in manifest.files} for manifest in manifests]
    apart = [path for path in sorted({*files[0], *files[1]}) if files[0].get(path) != files[1].get(path)]
    return replace(told, note=f"{', '.join(apart)} differ" if apart else "the metadata differ")


def _figures(account: Mapping[str, Json]) -> Json:
    """What an account of training says besides times and machine."""
    curve = [(point["step"], point["loss"], point["learning_rate"]) for point in account["curve"]]
    return [account[name] for name in ("steps", "examples", "final_loss", "validation_loss")], curve


def _texts(path: Path) -> dict[str, Json]:
    from sluice.evaluation.answers import read_answers

    return {one.item_id: (one.answer, one.tool_calls, str(one.outcome)) for one in read_answers(path)}


def _side(scratch: Scratch, side: str, recorded: str, rerun: str) -> tuple[bool, str]:
    """Whether one release's answers and scores are the same in two evaluations, and a note on it."""
    from sluice.evaluation.scores import read_scores

    folders = [scratch.folder(digest) / side for digest in (recorded, rerun)]
    one, other = (_texts(folder / "answers.jsonl") for folder in folders)
    equal = sum(one[item] == other.get(item) for item in one)
    note = f"{equal} of {len(one)} answers of the {side} are the same text"
    if one != other:
        return False, note
    then, now = (read_scores(folder).columns for folder in folders)
    apart = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    return not apart, f"{note}, with other scores in {', '.join(apart)}" if apart else note


def _traces_apart(recorded: Path, rerun: Path) -> str:
    from sluice.curation.records import read_records

    then = {one.id: one for one in read_records(recorded / "records.jsonl")}
    now = {one.id: one for one in read_records(rerun / "records.jsonl")}
    changed = sum(then[one] != now[one] for one in then.keys() & now.keys())
    return (
        f"the trace store is not what it was: of {len(then)} traces {len(then.keys() - now.keys())} are gone and "
        f"{changed} changed, {len(now.keys() - then.keys())} are new"
    )


def _changes(workspace: Workspace, record: StepRecord, again: Rerun, scratch: Scratch) -> tuple[str, ...]:
    """What is not as the record and its verified statement say it was, in words."""
    predicate = workspace.steps.verify(record)["predicate"]
    definition = predicate["buildDefinition"]
    locks = [one["digest"]["sha256"] for one in definition["resolvedDependencies"] if one["name"] == LOCK]
    lock = lock_digest()
    found = []
    if locks and lock and locks[0] != hex_of(lock):
        found.append(f"the environment changed: {LOCK} was {locks[0][:12]}, is {short(lock)}")
    if record.key.code != again.key.code:
        found.append(f"the code changed: its digest was {short(record.key.code)}, is {short(again.key.code)}")
    pairs = {
        "platform": (definition["internalParameters"].get("platform"), platform.platform()),
        "Python": (predicate["runDetails"]["builder"].get("version", {}).get("python"), platform.python_version()),
        "machine": (record.host, host_name()),
    }
    if "training" in again.output.artifacts:
        accounts = (record.output.artifacts["training"], again.output.artifacts["training"])
        was, now = (json.loads(scratch.file(digest, "training.json"))["hardware"] for digest in accounts)
        pairs |= {f"hardware ({name})": (was.get(name), now.get(name)) for name in sorted({*was, *now})}
    found += [f"the {name} is another: was {was}, is {now}" for name, (was, now) in pairs.items() if was != now]
    if dict(again.key.inputs) != dict(record.key.inputs):
        found.append("it was given the adapter that was trained again")
    return tuple(found)


def _scores_of_answers(
    scratch: Scratch, record: StepRecord, answers: OutputComparison, suite: str
) -> tuple[ScoreDifference, ...]:
    from sluice.evaluation.answer_metrics import score_answers
    from sluice.evaluation.answers import read_answers
    from sluice.evaluation.items import ITEMS_FILE, read_items
    from sluice.evaluation.suite import find_suite
    from sluice.rag.embed import MiniLmEmbedder

    chosen = find_suite(suite or suite_of(record))
    items = {item.id: item for item in read_items(scratch.folder(record.key.inputs["prompts"]) / ITEMS_FILE)}
    asked = [items[item] for item in chosen.select(items)]
    embed = MiniLmEmbedder()
    both = [
        score_answers(given, asked, chosen.metrics, embed=embed).columns
        for given in (read_answers(scratch.folder(one) / "answers.jsonl") for one in (answers.recorded, answers.rerun))
    ]
    return tuple(_means(name, name, *both) for name in both[0])


def _scores_within(scratch: Scratch, output: OutputComparison) -> tuple[ScoreDifference, ...]:
    from sluice.evaluation.scores import read_scores

    found = []
    for part in _PARTS[output.name]:
        both = [read_scores(scratch.folder(one) / part).columns for one in (output.recorded, output.rerun)]
        found += [_means(f"{part} {name}".strip(), name, *both) for name in sorted({*both[0], *both[1]})]
    return tuple(found)


def _means(shown: str, name: str, recorded: Mapping[str, Column], rerun: Mapping[str, Column]) -> ScoreDifference:
    then, now = (_mean(one[name].values.values()) if name in one else None for one in (recorded, rerun))
    return ScoreDifference(shown, then, now)


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


SIDES = ("candidate", "champion")
_PARTS = {"evaluation": SIDES, "benchmark": ("",)}
"""Folders with scores in artifacts of these kinds."""
_ASKED = {"answers": "release", "benchmark": "release", "evaluate": "candidate"}
"""Steps that ask a release, and the input that names it."""
_EXPLAINED = ("records",)
_UNKNOWN = "the step is not deterministic: code, environment, inputs and machine are as recorded"
_UNEXPLAINED = {
    "train": "a non-deterministic kernel or order of summation: code, environment, inputs, seed and hardware are as "
    "recorded",
    **dict.fromkeys(
        _ASKED,
        "the server does not answer deterministically (batches that form by chance): releases, prompts and sampling "
        "are as recorded",
    ),
}
