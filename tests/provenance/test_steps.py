"""Steps: computed once, resumed where they broke off, one winner in a race, never trusted without their statement."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sluice.infra.errors import InputError, IntegrityError, StepFailed
from sluice.infra.object_store import ObjectExists
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import canonical_json, digest_bytes
from sluice.provenance.steps import StepKey, StepOutput, StepRecord, StepRunner, read_records
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")
DATASET = digest_bytes(b"dataset")


def key_of(**parameters: object) -> StepKey:
    return StepKey("train", CODE, parameters, {"dataset": DATASET})


class Training:
    """A step function that counts its calls and stores one adapter."""

    def __init__(self, artifacts: ArtifactStore, content: bytes = b"weights") -> None:
        self.artifacts = artifacts
        self.content = content
        self.calls = 0

    def __call__(self, folder: Path) -> StepOutput:
        self.calls += 1
        manifest = self.artifacts.put_files({"weights": self.content}, "adapter")
        return StepOutput({"adapter": manifest.digest}, {"loss": 0.5})


def record_path(objects: DirectoryStore, key: StepKey, edition: str = "") -> Path:
    return objects.root / "steps" / f"{key.digest.removeprefix('sha256:')}{edition}.json"


def test_the_key_follows_everything_that_decides_the_result() -> None:
    base = key_of(seed=1)
    assert key_of(seed=1).digest == base.digest
    others = [
        key_of(seed=2),
        StepKey("tune", CODE, {"seed": 1}, {"dataset": DATASET}),
        StepKey("train", DATASET, {"seed": 1}, {"dataset": DATASET}),
        StepKey("train", CODE, {"seed": 1}, {"dataset": CODE}),
        StepKey("train", CODE, {"seed": 1}, {"other": DATASET}),
    ]
    assert len({key.digest for key in [base, *others]}) == 6


def test_a_key_without_a_canonical_form_is_refused() -> None:
    with pytest.raises(InputError, match="no canonical JSON form"):
        _ = key_of(rate=float("nan")).digest
    with pytest.raises(InputError, match="input dataset"):
        StepKey("train", CODE, {}, {"dataset": "latest"})
    with pytest.raises(InputError, match="code = 'main'"):
        StepKey("train", "main")
    with pytest.raises(InputError, match="needs a name"):
        StepKey("", CODE)


def test_a_finished_key_is_not_computed_again(runner: StepRunner, artifacts: ArtifactStore, tmp_path: Path) -> None:
    training = Training(artifacts)
    assert runner.find(key_of(seed=1)) is None
    first, hit = runner.run(key_of(seed=1), training)
    assert not hit
    again, hit = runner.run(key_of(seed=1), training)
    assert hit
    assert again == first == runner.find(key_of(seed=1))
    assert first.output.values == {"loss": 0.5}
    assert first.started < first.finished
    assert training.calls == 1
    runner.run(key_of(seed=2), training)
    assert training.calls == 2
    assert {record.key.parameters["seed"] for record in runner.records()} == {1, 2}
    assert [p.name for p in (tmp_path / "work").iterdir()] == [".locks"], "scratch folders are gone"


def test_the_statement_attests_the_record(
    runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore
) -> None:
    record, _ = runner.run(key_of(seed=1), Training(artifacts))
    assert object_store.head(f"attestations/sha256/{record.statement.removeprefix('sha256:')}.json") is not None
    statement = runner.verify(record)
    assert statement["subject"][0] == {
        "name": "adapter",
        "digest": {"sha256": record.output.artifacts["adapter"].removeprefix("sha256:")},
    }
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {"step": "train", "parameters": {"seed": 1}}
    assert {d["name"] for d in definition["resolvedDependencies"]} >= {"dataset", "code"}


def test_killed_between_artifact_and_record_it_resumes_with_its_partial_work(
    runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore
) -> None:
    seen: list[list[str]] = []

    def interrupted(folder: Path) -> StepOutput:
        seen.append(sorted(p.name for p in folder.iterdir()))
        checkpoint = folder / "checkpoint"
        done = int(checkpoint.read_text()) if checkpoint.exists() else 0
        output = Training(artifacts)(folder)
        if done < 2:
            checkpoint.write_text(str(done + 1))
            raise KeyboardInterrupt
        return output

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            runner.run(key_of(seed=1), interrupted)
        assert list(object_store.list("steps/")) == [], "no record without its step's end"
    record, hit = runner.run(key_of(seed=1), interrupted)
    assert not hit
    assert artifacts.exists(record.output.artifacts["adapter"])
    assert seen == [[], ["checkpoint"], ["checkpoint"]]


def test_killed_between_record_and_cleaning_up_the_next_run_hits_and_leaves_one_record(
    runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(artifacts)
    put = object_store.put

    def killed_after(key: str, data: bytes, *, if_absent: bool = False) -> None:
        put(key, data, if_absent=if_absent)
        if key.startswith("steps/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(object_store, "put", killed_after)
    with pytest.raises(KeyboardInterrupt):
        runner.run(key_of(seed=1), training)
    monkeypatch.setattr(object_store, "put", put)
    _, hit = runner.run(key_of(seed=1), training)
    assert hit
    assert training.calls == 1
    assert len(list(runner.records())) == 1


def test_an_output_that_was_not_stored_is_no_output(runner: StepRunner) -> None:
    with pytest.raises(StepFailed, match="artifact adapter = sha256:"):
        runner.run(key_of(seed=1), lambda _: StepOutput({"adapter": digest_bytes(b"nowhere")}))
    assert runner.find(key_of(seed=1)) is None
    with pytest.raises(InputError, match="output adapter of step train"):
        runner.run(key_of(seed=1), lambda _: StepOutput({"adapter": "latest"}))
    with pytest.raises(InputError, match="no canonical JSON form"):
        runner.run(key_of(seed=1), lambda _: StepOutput({}, {"loss": float("inf")}))


def test_a_hit_whose_outputs_are_gone_is_computed_again_with_a_message(
    runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore
) -> None:
    first, _ = runner.run(key_of(seed=1), Training(artifacts, b"old"))
    adapter = first.output.artifacts["adapter"]
    object_store.delete(f"manifests/sha256/{adapter.removeprefix('sha256:')}")
    assert runner.find(key_of(seed=1)) is None
    messages: list[str] = []
    second, hit = runner.run(key_of(seed=1), Training(artifacts, b"new"), lambda _d, _t, text: messages.append(text))
    assert not hit
    assert any(adapter in text and "computing it again" in text for text in messages)
    assert runner.find(key_of(seed=1)) == second
    assert list(read_records(object_store)) == [first, second], "the old record stays, in order"
    # The old artifact comes back: the first record holds again.
    Training(artifacts, b"old")(Path())
    assert runner.find(key_of(seed=1)) == first


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_race_has_one_winner_and_equal_results(
    object_store: DirectoryStore, artifacts: ArtifactStore, signer: Signer, tmp_path: Path, same_machine: bool
) -> None:
    racers = 8
    barrier = threading.Barrier(racers)
    calls: list[int] = []

    def race(number: int) -> tuple[StepRecord, bool]:
        work = tmp_path / ("one" if same_machine else f"machine-{number}")
        runner = StepRunner(object_store, artifacts, signer, work)

        def function(folder: Path) -> StepOutput:
            calls.append(number)
            (folder / "mine").write_text(str(number))
            time.sleep(0.05)
            assert (folder / "mine").read_text() == str(number), "nobody else writes here meanwhile"
            # Not deterministic on purpose: everybody has to end with the winner's result.
            manifest = artifacts.put_files({"weights": str(number).encode()}, "adapter")
            return StepOutput({"adapter": manifest.digest}, {"winner": number})

        barrier.wait()
        return runner.run(key_of(seed=1), function)

    with ThreadPoolExecutor(racers) as pool:
        results = list(pool.map(race, range(racers)))
    assert len({canonical_json(record.to_json()) for record, _ in results}) == 1
    assert sum(not hit for _, hit in results) == 1
    winner = next(number for number, (_, hit) in enumerate(results) if not hit)
    assert results[0][0].output.values == {"winner": winner}
    assert calls == [winner], "the others waited for it"
    assert len(list(object_store.list("steps/"))) == 1


def test_a_put_whose_answer_was_lost_is_still_ours(
    runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = object_store.put

    def lossy(key: str, data: bytes, *, if_absent: bool = False) -> None:
        put(key, data, if_absent=if_absent)
        if key.startswith("steps/"):
            raise ObjectExists("the client tried again and found the key taken")

    monkeypatch.setattr(object_store, "put", lossy)
    _, hit = runner.run(key_of(seed=1), Training(artifacts))
    assert not hit


def rename_step(raw: dict[str, dict[str, object]]) -> None:
    raw["key"]["name"] = "another"


def swap_output(raw: dict[str, dict[str, object]]) -> None:
    raw["output"]["values"] = {"loss": 0.1}


def drop_field(raw: dict[str, dict[str, object]]) -> None:
    del raw["output"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_step, "is that of another key"),
        (swap_output, "says something else than its statement"),
        (drop_field, "is not a step record"),
    ],
)
def test_a_changed_record_is_told(
    runner: StepRunner,
    artifacts: ArtifactStore,
    object_store: DirectoryStore,
    change: Callable[[dict[str, dict[str, object]]], None],
    message: str,
) -> None:
    key = key_of(seed=1)
    runner.run(key, Training(artifacts))
    path = record_path(object_store, key)
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_bytes(canonical_json(raw))
    with pytest.raises(IntegrityError, match=message):
        runner.run(key, Training(artifacts))


def test_a_changed_missing_or_foreign_statement_is_told(
    runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore, signer: Signer, tmp_path: Path
) -> None:
    record, _ = runner.run(key_of(seed=1), Training(artifacts))
    path = object_store.root / "attestations" / "sha256" / f"{record.statement.removeprefix('sha256:')}.json"
    other = Signer.load_or_create(tmp_path / "other.pem")
    stranger = StepRunner(object_store, artifacts, other, tmp_path / "work")
    with pytest.raises(IntegrityError, match="none of them trusted"):
        stranger.find(key_of(seed=1))
    friend = StepRunner(object_store, artifacts, other, tmp_path / "work", trusted_keys=[signer.public_key])
    assert friend.find(key_of(seed=1)) == record
    path.write_bytes(path.read_bytes().replace(b'"', b"'", 1))
    with pytest.raises(IntegrityError, match=r"statement .* is damaged"):
        runner.find(key_of(seed=1))
    path.unlink()
    with pytest.raises(IntegrityError, match=r"statement .* is gone"):
        runner.find(key_of(seed=1))
