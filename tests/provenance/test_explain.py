"""Why a step ran: the nearest earlier one is found, and what differs is named down to the file."""

from __future__ import annotations

import pytest

from sluice.infra.errors import IntegrityError
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import Json, digest_bytes, digest_json
from sluice.provenance.explain import Difference, Explainer, compare_values
from sluice.provenance.steps import StepKey, StepOutput, StepRecord, StepRunner, code_key
from tests.support.directory_store import DirectoryStore

SOURCES: Json = {"files": {"training/train.py": "sha256:" + "1" * 64, "training/same.py": "x"}, "locks": {"main": None}}
CHANGED: Json = {"files": {"training/train.py": "sha256:" + "2" * 64, "training/same.py": "x"}, "locks": {"main": None}}


@pytest.fixture
def explainer(object_store: DirectoryStore, artifacts: ArtifactStore) -> Explainer:
    return Explainer(object_store, artifacts)


def ran(
    runner: StepRunner, sources: Json = SOURCES, *, parameters: Json = None, inputs: dict[str, str] | None = None
) -> StepRecord:
    chosen = {"recipe": {"rate": 0.1, "rank": 8}, "seed": 1, **(parameters or {})}
    made = StepKey("train", digest_json(sources), chosen, inputs or {})
    return runner.run(made, lambda _: StepOutput({}, {"n": 1}), sources=sources)[0]


def test_a_hit_says_when_it_was_computed(runner: StepRunner, explainer: Explainer) -> None:
    record = ran(runner)
    found = explainer.why(record.key, hit=True)
    assert (found.outcome, found.differences) == ("hit", ())
    assert found.sentence.startswith(f"the same key was computed before, on {record.host}, finished 20")


def test_the_first_of_its_name_has_nothing_to_be_compared_with(runner: StepRunner, explainer: Explainer) -> None:
    found = explainer.why(ran(runner).key, hit=False)
    assert (found.outcome, found.sentence, found.earlier) == ("computed", "no earlier step is called 'train'", None)


def test_the_file_the_parameter_and_the_data_that_changed_are_named(
    runner: StepRunner, explainer: Explainer, artifacts: ArtifactStore
) -> None:
    old = artifacts.put_files({"a.jsonl": b"1", "card.json": b"{}"}, "dataset", {"examples": 1})
    new = artifacts.put_files({"a.jsonl": b"12", "b.jsonl": b"", "card.json": b"{}"}, "dataset", {"examples": 2})
    ran(runner, parameters={"seed": 9}, inputs={"base": digest_bytes(b"elsewhere")})
    near = ran(runner, inputs={"dataset": old.digest})
    last = ran(runner, CHANGED, parameters={"recipe": {"rate": 0.2, "rank": 8}}, inputs={"dataset": new.digest})
    found = explainer.why(last.key, hit=False)
    assert found.earlier == near, "the nearest, not the latest of another kind"
    assert found.sentence == "code, parameter recipe.rate, input dataset differ"
    code, parameter, data = found.differences
    assert [(one.part, one.name, one.change) for one in code.inside] == [("file", "training/train.py", "changed")]
    assert (parameter.name, parameter.before, parameter.after) == ("recipe.rate", 0.1, 0.2)
    assert data.inside == (
        Difference("metadata", "examples", "changed", 1, 2),
        Difference("file", "a.jsonl", "changed", 1, 2),
        Difference("file", "b.jsonl", "added", None, 0),
    )


def test_a_step_that_never_ended_is_explained_too(runner: StepRunner, explainer: Explainer) -> None:
    done = ran(runner)
    key = StepKey("train", done.key.code, {**done.key.parameters, "seed": 2})
    found = explainer.why(key, hit=None)
    assert (found.outcome, found.record, found.sentence) == ("unfinished", None, "parameter seed differs")


def test_outputs_that_were_collected_are_the_reason(
    runner: StepRunner, explainer: Explainer, artifacts: ArtifactStore, object_store: DirectoryStore
) -> None:
    key = StepKey("train", digest_bytes(b"code"))
    contents = iter([b"1", b"2"])
    first, _ = runner.run(key, lambda _: StepOutput({"a": artifacts.put_files({"w": next(contents)}, "x").digest}))
    object_store.delete(f"manifests/sha256/{first.output.artifacts['a'].removeprefix('sha256:')}")
    runner.run(key, lambda _: StepOutput({"a": artifacts.put_files({"w": next(contents)}, "x").digest}))
    found = explainer.why(key, hit=False)
    assert "but an output of that was gone" in found.sentence
    assert found.earlier == first


def test_a_list_of_files_that_is_not_the_codes_is_told(
    runner: StepRunner, explainer: Explainer, object_store: DirectoryStore
) -> None:
    one, other = ran(runner), ran(runner, CHANGED)
    object_store.put(code_key(one.key.code), b"{}")
    with pytest.raises(IntegrityError, match="has another digest"):
        explainer.why(other.key, hit=False)
    object_store.delete(code_key(one.key.code))
    (code,) = explainer.why(other.key, hit=False).differences
    assert code.inside == (), "its files were not kept: the digests differ, and that is all one can say"


def test_values_are_compared_by_type_and_depth() -> None:
    before = {"a": 1, "b": {"c": [1], "d": 0}, "gone": None, "same": {"x": 1}}
    after = {"a": True, "b": {"c": [2], "d": 0}, "new": 3, "same": {"x": 1}}
    assert compare_values("parameter", before, after) == [
        Difference("parameter", "a", "changed", 1, True),
        Difference("parameter", "b.c", "changed", [1], [2]),
        Difference("parameter", "gone", "removed", None, None),
        Difference("parameter", "new", "added", None, 3),
    ]
