"""Lineage: one query in both directions, over records that exist, are missing or form a cycle."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import pytest

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectStore
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import canonical_json, digest_bytes
from sluice.provenance.lineage import LineageIndex, Node
from sluice.provenance.step_records import StepRecord, record_key
from sluice.provenance.steps import StepKey, StepOutput, StepRunner
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")


class Chain:
    """harvest -> records -> curate -> dataset -> train (with a base model) -> adapter -> evaluate -> report."""

    def __init__(self, runner: StepRunner, artifacts: ArtifactStore) -> None:
        self.base = artifacts.put_files({"model": b"base"}, "base-model").digest
        lines = "\n".join(json.dumps({"trace_id": f"t{n}"}) for n in range(4)).encode()
        self.records = artifacts.put_files({"records.jsonl": lines + b"\n"}, "records").digest
        lineage = json.dumps({"traces": ["t1", "t2"], "scores": ["s1"]}).encode()
        self.dataset = artifacts.put_files({"train.jsonl": b"{}", "lineage.json": lineage}, "dataset").digest
        self.adapter = artifacts.put_files({"adapter": b"x"}, "adapter").digest
        self.report = artifacts.put_files({"report.json": b"{}"}, "report").digest
        self.harvest = self.run(runner, "harvest", {}, "records", self.records)
        self.curate = self.run(runner, "curate", {"records": self.records}, "dataset", self.dataset)
        inputs = {"dataset": self.dataset, "base": self.base}
        self.train = self.run(runner, "train", inputs, "adapter", self.adapter)
        # The base model goes in here too: a diamond, so the tree meets it twice.
        self.evaluate = self.run(
            runner, "evaluate", {"adapter": self.adapter, "base": self.base}, "report", self.report
        )

    @staticmethod
    def run(runner: StepRunner, name: str, inputs: dict[str, str], output: str, digest: str) -> StepRecord:
        return runner.run(StepKey(name, CODE, {}, inputs), lambda _: StepOutput({output: digest}))[0]


@pytest.fixture
def chain(runner: StepRunner, artifacts: ArtifactStore) -> Chain:
    return Chain(runner, artifacts)


def index_of(objects: ObjectStore) -> LineageIndex:
    """The index as a machine sees it that has no copy of it yet."""
    return LineageIndex(objects, Path(tempfile.mkdtemp(prefix="lineage-")))


@pytest.fixture
def graph(chain: Chain, object_store: DirectoryStore) -> LineageIndex:
    return index_of(object_store)


def outline(node: Node) -> dict[str, object]:
    """Labels of artifacts by kind, steps by name, as nested dictionaries."""
    name = node.label if node.kind in ("step", "trace", "score", "unknown") else node.kind
    return {name + ("*" if node.repeated else ""): [outline(child) for child in node.children]}


def test_ancestors_lead_to_traces_and_to_an_unknown_origin(graph: LineageIndex, chain: Chain) -> None:
    tree = graph.ancestors(chain.adapter)
    assert tree.kind == "adapter"
    assert tree.digest == chain.adapter
    assert tree.label == f"adapter {chain.adapter.removeprefix('sha256:')[:12]}"
    (step,) = tree.children
    assert (step.kind, step.label, step.digest) == ("step", "train", chain.train.key_digest)
    inputs = {child.kind: child for child in step.children}
    assert outline(inputs["base-model"]) == {"base-model": [{"unknown origin": []}]}
    assert outline(inputs["dataset"]) == {
        "dataset": [
            {
                "curate": [
                    {
                        "records": [
                            {"harvest": []},
                            {"trace t0": []},
                            {"trace t1": []},
                            {"trace t2": []},
                            {"trace t3": []},
                        ]
                    }
                ]
            },
            {"trace t1*": []},
            {"trace t2*": []},
            {"score s1": []},
        ]
    }


def test_a_thing_met_twice_is_opened_once(graph: LineageIndex, chain: Chain) -> None:
    nodes = [node for node in graph.ancestors(chain.report).walk() if node.digest == chain.base]
    assert sorted(node.repeated for node in nodes) == [False, True]


def test_the_traces_behind_a_release_are_those_its_dataset_kept(graph: LineageIndex, chain: Chain) -> None:
    assert graph.traces(chain.adapter) == ("t1", "t2")
    assert graph.traces(chain.report) == ("t1", "t2")
    assert graph.scores(chain.adapter) == ("s1",)
    assert graph.traces(chain.records) == ("t0", "t1", "t2", "t3")
    assert graph.traces(chain.base) == ()


def test_a_trace_is_found_in_every_artifact_that_used_it(graph: LineageIndex, chain: Chain) -> None:
    everything = sorted([chain.records, chain.dataset, chain.adapter, chain.report])
    assert list(graph.artifacts_with("t1")) == everything
    tree = graph.descendants("t1")
    assert (tree.kind, tree.label, tree.digest) == ("trace", "trace t1", "t1")
    assert {child.kind for child in tree.children} == {"records", "dataset"}
    # Harvested, then left out of the dataset: still stored in the records, and in nothing made after.
    assert graph.artifacts_with("t0") == (chain.records,)
    assert list(graph.artifacts_with("s1")) == sorted([chain.dataset, chain.adapter, chain.report])
    assert graph.artifacts_with("nobody") == ()


def test_descendants_of_an_artifact(graph: LineageIndex, chain: Chain) -> None:
    assert outline(graph.descendants(chain.dataset)) == {
        "dataset": [{"train": [{"adapter": [{"evaluate": [{"report": []}]}]}]}]
    }
    assert outline(graph.descendants(chain.report)) == {"report": []}


def test_what_nobody_knows_is_said_to_be_unknown(graph: LineageIndex) -> None:
    stranger = digest_bytes(b"stranger")
    tree = graph.ancestors(stranger)
    assert tree.kind == "unknown"
    assert stranger in tree.label
    assert [child.label for child in tree.children] == ["unknown origin"]
    assert graph.descendants("t99") == Node("unknown", "t99 (not stored here)", "t99")


def test_missing_records_and_manifests_leave_the_rest(chain: Chain, object_store: DirectoryStore) -> None:
    object_store.delete(f"steps/{chain.curate.key_digest.removeprefix('sha256:')}.json")
    object_store.delete(f"manifests/sha256/{chain.base.removeprefix('sha256:')}")
    graph = index_of(object_store)
    dataset = next(node for node in graph.ancestors(chain.adapter).walk() if node.digest == chain.dataset)
    assert [child.label for child in dataset.children] == ["trace t1", "trace t2", "score s1"]
    base = next(node for node in graph.ancestors(chain.adapter).walk() if node.digest == chain.base)
    assert base.kind == "unknown"
    assert chain.adapter in graph.artifacts_with("t1")


def test_a_cycle_ends(runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore) -> None:
    one = artifacts.put_files({"a": b"1"}, "dataset").digest
    two = artifacts.put_files({"a": b"2"}, "dataset").digest
    # A step that changes nothing has its input as output; two steps may undo each other.
    Chain.run(runner, "forth", {"in": one}, "out", two)
    Chain.run(runner, "back", {"in": two}, "out", one)
    Chain.run(runner, "same", {"in": one}, "out", one)
    graph = index_of(object_store)
    for tree in (graph.ancestors(one), graph.descendants(one)):
        assert sum(node.repeated for node in tree.walk()) == 2
        assert {node.label for node in tree.walk() if node.kind == "step"} == {"forth", "back", "same"}


def test_a_chain_deeper_than_the_interpreters_stack(object_store: DirectoryStore) -> None:
    digests = [digest_bytes(str(number).encode()) for number in range(700)]
    for one, other in itertools.pairwise(digests):
        record = StepRecord(StepKey("s", CODE, {}, {"in": one}), StepOutput({"out": other}), "", "", "", CODE)
        object_store.put(record_key(record.key_digest, 0), canonical_json(record.to_json()))
    graph = index_of(object_store)
    assert sum(1 for _ in graph.ancestors(digests[-1]).walk()) == 2 * len(digests)
    assert sum(1 for _ in graph.descendants(digests[0]).walk()) == 2 * len(digests) - 1


def test_two_editions_of_a_step_are_one_step(
    chain: Chain, runner: StepRunner, artifacts: ArtifactStore, object_store: DirectoryStore
) -> None:
    object_store.delete(f"manifests/sha256/{chain.adapter.removeprefix('sha256:')}")
    other = artifacts.put_files({"adapter": b"y"}, "adapter").digest
    Chain.run(runner, "train", {"dataset": chain.dataset, "base": chain.base}, "adapter", other)
    graph = index_of(object_store)
    assert graph.traces(other) == graph.traces(chain.adapter) == ("t1", "t2")
    made = {node.kind: node.digest for node in graph.descendants(chain.dataset).walk() if node.digest == other}
    assert made == {"adapter": other}
    assert len(graph.makers(other)) == 2


def test_a_lineage_file_that_cannot_be_read_is_told(artifacts: ArtifactStore, object_store: DirectoryStore) -> None:
    bad = artifacts.put_files({"lineage.json": b"[1]"}, "dataset").digest
    with pytest.raises(IntegrityError, match=f"The dataset {bad} does not say where it comes from"):
        index_of(object_store)
