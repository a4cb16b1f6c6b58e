"""The index against a plain model: any chain, indexed in any pieces, by racing processes, through kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectStore
from sluice.provenance import lineage_segments
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import canonical_json, digest_bytes
from sluice.provenance.lineage import LineageIndex
from sluice.provenance.lineage_segments import MERGE_AT, PREFIX
from sluice.provenance.step_records import StepKey, StepOutput, StepRecord, record_key
from tests.support.directory_store import DirectoryStore

CODE = digest_bytes(b"code")


@dataclass
class Chain:
    """The same chain twice: in an object store, and as plain sets."""

    objects: DirectoryStore
    artifacts: ArtifactStore
    inputs: dict[str, set[str]] = field(default_factory=dict)
    """Artifacts that each artifact was made of."""
    named: dict[str, set[str]] = field(default_factory=dict)
    """Traces and scores that an artifact names, or the documents that it holds."""
    users: dict[str, set[str]] = field(default_factory=dict)
    retrieved: dict[str, set[str]] = field(default_factory=dict)

    def step(self, name: str, inputs: list[str], output: str) -> None:
        key = StepKey(name, CODE, {"n": len(self.inputs)}, {str(n): one for n, one in enumerate(inputs)})
        record = StepRecord(key, StepOutput({"out": output}), "", "", "host", CODE)
        self.objects.put(record_key(key.digest, 0), canonical_json(record.to_json()))
        self.inputs.setdefault(output, set()).update(inputs)

    def records(self, traces: list[tuple[str, str, list[str]]]) -> str:
        """(trace, user, retrieved documents) each; a chunk is named for its document here. User u9 judged them all."""
        lines = [
            {
                "id": trace,
                "user": user,
                "contexts": [{"id": f"c-{one}", "text": "…"} for one in documents],
                "scores": [{"id": f"s-{trace}", "source": "user", "author": "u9"}],
                "question": "?",
            }
            for trace, user, documents in traces
        ]
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        digest = self.artifacts.put_files({"records.jsonl": data}, "records").digest
        self.named[digest] = {name for trace, _, _ in traces for name in (trace, f"s-{trace}")}
        for trace, user, documents in traces:
            self.users.setdefault(user, set()).add(trace)
            self.users.setdefault("u9", set()).add(f"s-{trace}")
            for document in documents:
                self.retrieved.setdefault(document, set()).add(trace)
        self.step("harvest", [], digest)
        return digest

    def dataset(self, records: list[str], traces: list[str]) -> str:
        names = {"traces": traces, "scores": [f"s-{one}" for one in traces]}
        digest = self.artifacts.put_files({"lineage.json": json.dumps(names).encode()}, "dataset").digest
        self.named[digest] = {*traces, *names["scores"]}
        self.step("curate", records, digest)
        return digest

    def chunks(self, documents: list[str]) -> str:
        lines = [json.dumps({"id": f"c-{one}", "document_id": one}).encode() + b"\n" for one in documents]
        digest = self.artifacts.put_files({"chunks.jsonl": b"".join(lines)}, "index").digest
        self.named[digest] = set(documents)
        self.step("embed", [], digest)
        return digest

    def made(self, name: str, inputs: list[str]) -> str:
        digest = self.artifacts.put_files({"n": str(len(self.inputs)).encode()}, name).digest
        self.step(name, inputs, digest)
        return digest

    def expected(self, ids: set[str]) -> list[str]:
        """All artifacts that hold one of the ids, and what was made of those without another word on its sources."""
        found = {one for one, names in self.named.items() if names & ids}
        while True:
            more = {
                one
                for one, inputs in self.inputs.items()
                if one not in found and inputs & found and one not in self.named
            }
            if not more:
                return sorted(found)
            found |= more


TRACES = st.lists(
    st.tuples(
        st.sampled_from([f"t{n}" for n in range(8)]),
        st.sampled_from(["u1", "u2", "u3"]),
        st.lists(st.sampled_from(["d1", "d2", "d3"]), max_size=2),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda one: one[0],
)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_deleted_trace_user_and_document_is_found_in_every_artifact_that_used_it(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        objects = DirectoryStore(Path(folder) / "objects")
        chain = Chain(objects, ArtifactStore(objects, Path(folder) / "cache"))
        known: list[str] = []
        index: LineageIndex | None = None
        # The index sees the chain in any pieces: now and then, by the same process or by one that knows nothing.
        for _ in range(data.draw(st.integers(2, 9))):
            kind = data.draw(st.sampled_from(["records", "dataset", "index", "made"])) if known else "records"
            inputs = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)) if known else []
            if kind == "records":
                known.append(chain.records(data.draw(TRACES)))
            elif kind == "dataset":
                names = sorted({n for one in inputs for n in chain.named.get(one, ()) if n.startswith("t")})
                kept = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
                known.append(chain.dataset(inputs, kept))
            elif kind == "index":
                known.append(chain.chunks(data.draw(st.lists(st.sampled_from(["d1", "d2"]), min_size=1, unique=True))))
            else:
                known.append(chain.made(f"adapter{len(known)}", inputs))
            update = data.draw(st.sampled_from(["no", "same", "other"]))
            if update == "same" and index is not None:
                index.catch_up()
            elif update != "no":
                index = LineageIndex(objects, Path(folder) / data.draw(st.sampled_from(["here", "there"])))
        index = LineageIndex(objects, Path(folder) / "here")
        for identity in {name for names in chain.named.values() for name in names if name[0] in "ts"}:
            assert list(index.artifacts_with(identity)) == chain.expected({identity})
        for user, ids in chain.users.items():
            assert list(index.artifacts_with(user, "user")) == chain.expected(ids)
        cut = {one for names in chain.named.values() for one in names if one[0] == "d"}
        for document in {"d1", "d2", "d3"}:
            # A chunk's document is known from the chunks of an index; a passage of no known index has none.
            asked = chain.retrieved.get(document, set()) if document in cut else set()
            assert list(index.artifacts_with(document, "document")) == chain.expected({*asked, document})


@pytest.fixture
def chain(object_store: DirectoryStore, artifacts: ArtifactStore) -> Chain:
    return Chain(object_store, artifacts)


def segments(objects: ObjectStore) -> list[str]:
    return [info.key for info in objects.list(PREFIX)]


def test_small_segments_are_merged_and_nothing_is_lost(chain: Chain, tmp_path: Path) -> None:
    index = LineageIndex(chain.objects, tmp_path / "here")
    for number in range(3 * MERGE_AT):
        chain.records([(f"t{number}", "u1", [])])
        index.catch_up()
        assert len(segments(chain.objects)) < MERGE_AT
    elsewhere = LineageIndex(chain.objects, tmp_path / "there")
    for one in (index, elsewhere):
        assert list(one.artifacts_with("u1", "user")) == sorted(chain.named)


def test_a_segment_merged_away_under_a_reader_is_no_error(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain.records([("t1", "u1", [])])
    first = LineageIndex(chain.objects, tmp_path / "here")
    chain.records([("t2", "u1", [])])
    first.catch_up()
    listing = chain.objects.list
    listed = list(listing(PREFIX))
    monkeypatch.setattr(lineage_segments, "MERGE_AT", 2)
    first.catch_up()
    chain.records([("t3", "u1", [])])
    first.catch_up()
    stale = iter([listed])
    monkeypatch.setattr(
        chain.objects,
        "list",
        lambda prefix: next(stale, None) or listing(prefix) if prefix == PREFIX else listing(prefix),
    )
    assert len(LineageIndex(chain.objects, tmp_path / "there").artifacts_with("u1", "user")) == 3


def test_two_that_update_at_once_index_everything(chain: Chain, tmp_path: Path) -> None:
    for number in range(20):
        chain.records([(f"t{number}", "u1", ["d1"])])
    code = (
        "import sys; from pathlib import Path; from tests.support.directory_store import DirectoryStore; "
        "from sluice.provenance.lineage import LineageIndex; "
        "LineageIndex(DirectoryStore(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(chain.objects.root), str(tmp_path / name)])
        for name in ("a", "b", "b")
    ]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    index = LineageIndex(chain.objects, tmp_path / "c")
    assert list(index.artifacts_with("u1", "user")) == sorted(chain.named)
    # One fact is one fact, however often it was written.
    assert index.traces(next(iter(chain.named))) == ("t0",)


def test_killed_at_any_moment_the_next_one_goes_on(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        chain.records([(f"t{number}", "u1", [])])
    code = (
        "import sys, time; from pathlib import Path; from tests.support.directory_store import DirectoryStore; "
        "from sluice.provenance import lineage_facts; from sluice.provenance.lineage import LineageIndex; "
        "lineage_facts.FLUSH_ROWS = 1\n"
        "class Slow(DirectoryStore):\n"
        "    def put_file(self, key, path):\n"
        "        super().put_file(key, path); print('put', flush=True); time.sleep(0.2)\n"
        "LineageIndex(Slow(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code, str(chain.objects.root), str(tmp_path / "here")], stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    for _ in range(3):
        assert worker.stdout.readline() == b"put\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    assert 3 <= len(segments(chain.objects)) < 12
    index = LineageIndex(chain.objects, tmp_path / "here")
    assert list(index.artifacts_with("u1", "user")) == sorted(chain.named)


def test_a_damaged_segment_is_named_and_the_index_made_anew(chain: Chain, tmp_path: Path) -> None:
    chain.records([("t1", "u1", [])])
    index = LineageIndex(chain.objects, tmp_path / "here")
    (key,) = segments(chain.objects)
    chain.objects.put(key, b"something else")
    with pytest.raises(IntegrityError, match=key):
        LineageIndex(chain.objects, tmp_path / "there")
    index.rebuild()
    assert LineageIndex(chain.objects, tmp_path / "there").artifacts_with("t1") == tuple(chain.named)


def test_what_was_removed_since_is_still_known(chain: Chain, tmp_path: Path) -> None:
    records = chain.records([("t1", "u1", [])])
    LineageIndex(chain.objects, tmp_path / "here")
    shutil.rmtree(chain.objects.root / "manifests")
    tree = LineageIndex(chain.objects, tmp_path / "there").descendants("t1")
    assert [(child.kind, child.digest) for child in tree.children] == [("records", records)]
    assert tree.children[0].label.endswith("(removed since)")


def test_an_update_without_news_writes_nothing_and_is_quick(chain: Chain, tmp_path: Path) -> None:
    chain.records([("t1", "u1", [])])
    index = LineageIndex(chain.objects, tmp_path / "here")
    before = segments(chain.objects)
    started = time.monotonic()
    index.catch_up()
    assert time.monotonic() - started < 2
    assert segments(chain.objects) == before
