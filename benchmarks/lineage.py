"""How long a question of lineage takes when the store holds ten million source rows.

    .venv/bin/python benchmarks/lineage.py [--traces 1640000] [--out FILE.json]

Builds an object store in a temporary folder: harvests of 8,000 traces (a user, two retrieved passages, for every
second trace a score), from each a dataset of 6,000 traces and 3,000 scores, an adapter, answers and a report, an index
of 20,000 chunks. Then it makes the lineage index of it once, and asks a fresh process: what lies behind an adapter,
and what saw a trace, a user, a document. Times are medians over different subjects, in the order measured; `open` is a
new process that catches up (it lists the store and finds nothing new). On a machine that does other work too, CPU
seconds (of all threads) say more than times; what compares between machines are the ratios to reading the store anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import canonical_json, digest_bytes
from sluice.provenance.lineage import LineageIndex
from sluice.provenance.lineage_segments import read
from sluice.provenance.step_records import StepKey, StepOutput, StepRecord, record_key
from tests.support.directory_store import DirectoryStore

HARVEST, KEPT, CHUNKS, DOCUMENTS = 8_000, 6_000, 20_000, 2_000
USERS = 50_000
"""About 32 traces each, in as many harvests, at the default size."""
CODE = digest_bytes(b"code")
SUBJECTS = 15


def build(objects: DirectoryStore, artifacts: ArtifactStore, folder: Path, harvests: int) -> list[str]:
    """Fill the store; digests of the adapters."""
    import duckdb

    connection = duckdb.connect(config={"memory_limit": "512MB"})
    chunks = folder / "chunks"
    chunks.mkdir()
    connection.execute(
        f"COPY (SELECT md5('c' || i) AS id, 'doc/' || (i % {DOCUMENTS}) AS document_id FROM range({CHUNKS}) t(i)) "
        f"TO '{chunks}/chunks.jsonl' (FORMAT json)"
    )
    index = artifacts.put_directory(chunks, "index").digest
    adapters = []
    for harvest in range(harvests):
        trace = f"md5('t' || ({harvest} * {HARVEST} + i))"
        records, dataset = folder / f"records{harvest}", folder / f"dataset{harvest}"
        records.mkdir()
        dataset.mkdir()
        connection.execute(
            f"COPY (SELECT {trace} AS id, 'user-' || (hash(i, {harvest}) % {USERS}) AS \"user\", "
            f"[{{id: md5('c' || (hash(i, 1, {harvest}) % {CHUNKS}))}}, "
            f" {{id: md5('c' || (hash(i, 2, {harvest}) % {CHUNKS}))}}] AS contexts, "
            f"CASE WHEN i % 2 = 0 THEN [{{id: 'a-' || {trace}, source: 'user', "
            f"author: 'user-' || (hash(i, {harvest}) % {USERS})}}] ELSE [] END AS scores, 'What is it?' AS question "
            f"FROM range({HARVEST}) t(i)) TO '{records}/records.jsonl' (FORMAT json)"
        )
        connection.execute(
            f"COPY (SELECT list({trace}) AS traces, list('a-' || {trace}) FILTER (i % 2 = 0) AS scores "
            f"FROM range({KEPT}) t(i)) TO '{dataset}/lineage.json' (FORMAT json)"
        )
        made = {
            "records": artifacts.put_directory(records, "records").digest,
            "dataset": artifacts.put_directory(dataset, "dataset").digest,
        }
        for kind in ("adapter", "answers", "report"):
            made[kind] = artifacts.put_files({kind: str(harvest).encode()}, kind).digest
        steps: list[tuple[str, dict[str, str], str]] = [
            ("harvest", {}, "records"),
            ("curate", {"records": made["records"], "index": index}, "dataset"),
            ("train", {"dataset": made["dataset"]}, "adapter"),
            ("evaluate", {"release": made["adapter"]}, "answers"),
            ("gate", {"answers": made["answers"], "dataset": made["dataset"]}, "report"),
        ]
        for name, inputs, output in steps:
            key = StepKey(name, CODE, {"harvest": harvest}, inputs)
            record = StepRecord(key, StepOutput({output: made[output]}), "", "", "host", CODE)
            objects.put(record_key(key.digest, 0), canonical_json(record.to_json()))
        adapters.append(made["adapter"])
        for path in (records / "records.jsonl", dataset / "lineage.json"):
            path.unlink()
    return adapters


def ask(root: Path, cache: Path, adapters: list[str]) -> dict[str, Any]:
    """Medians in seconds of a process that has only the local copy of the index."""
    objects = DirectoryStore(root)
    started = time.monotonic()
    index = LineageIndex(objects, cache)
    found: dict[str, Any] = {
        "open_s": round(time.monotonic() - started, 3),
        "open_cpu_s": round(time.process_time(), 3),
    }
    draw = random.Random(7)
    traces = [index.traces(one)[draw.randrange(KEPT)] for one in draw.sample(adapters, min(SUBJECTS, len(adapters)))]
    questions: dict[str, tuple[list[str], Callable[[str], Any]]] = {
        "forward_adapter": (draw.sample(adapters, min(SUBJECTS, len(adapters))), lambda one: index.ancestors(one, 6)),
        "forward_adapter_all_traces": (draw.sample(adapters, min(SUBJECTS, len(adapters))), index.ancestors),
        "reverse_trace": (traces, lambda one: index.descendants(one, "trace")),
        "reverse_user": (
            [f"user-{draw.randrange(USERS)}" for _ in range(SUBJECTS)],
            lambda one: index.descendants(one, "user"),
        ),
        "reverse_document": (
            [f"doc/{draw.randrange(DOCUMENTS)}" for _ in range(SUBJECTS)],
            lambda one: index.descendants(one, "document"),
        ),
    }
    for name, (subjects, question) in questions.items():
        taken, worked, nodes = [], [], []
        for subject in subjects:
            started, cpu = time.monotonic(), time.process_time()
            tree = question(subject)
            taken.append(time.monotonic() - started)
            worked.append(time.process_time() - cpu)
            nodes.append(sum(1 for _ in tree.walk()))
        assert min(nodes) > 1, f"{name} found nothing"
        found[name] = {
            "median_s": round(statistics.median(taken), 3),
            "slowest_s": round(max(taken), 3),
            "median_cpu_s": round(statistics.median(worked), 3),
            "nodes": round(statistics.median(nodes)),
        }
    found["peak_memory_MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return found


def make(root: Path, cache: Path) -> dict[str, Any]:
    """Make the index anew; what it holds and cost."""
    import duckdb

    started = time.monotonic()
    LineageIndex(DirectoryStore(root), cache)
    seconds = time.monotonic() - started
    rows = dict(
        duckdb.execute(
            f"SELECT relation, count(*) FROM {read(sorted(cache.glob('*.parquet')))} "
            "WHERE relation IN ('trace', 'score', 'user', 'chunk', 'document') GROUP BY 1"
        ).fetchall()
    )
    return {
        "seconds": round(seconds, 1),
        "source_rows": sum(rows.values()),
        "by_relation": rows,
        "segments": len(list(cache.glob("*.parquet"))),
        "megabytes": round(sum(path.stat().st_size for path in cache.glob("*.parquet")) / 1e6, 1),
        "peak_memory_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def machine() -> dict[str, Any]:
    """Where and when this ran."""
    import duckdb

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    with Path("/proc/cpuinfo").open() as stream:
        model = next((line.partition(":")[2].strip() for line in stream if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "processor": model,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "duckdb": duckdb.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=1_640_000, help="traces; about 6.1 source rows each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lineage.json"))
    chosen = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "traces": chosen.traces}
    with tempfile.TemporaryDirectory(prefix="sluice-lineage-") as name:
        folder = Path(name)
        root, cache = folder / "objects", folder / "index"
        objects = DirectoryStore(root)
        started = time.monotonic()
        adapters = build(objects, ArtifactStore(objects, folder / "cache"), folder, max(1, chosen.traces // HARVEST))
        print(f"store of {len(adapters)} harvests built in {time.monotonic() - started:.0f} s", file=sys.stderr)
        # Each in a process of its own: so that memory is its own, and nothing is warm but the system's file cache.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            result["make"] = pool.apply(make, (root, cache))
            result["ask"] = pool.apply(ask, (root, cache, adapters))
    anew = result["make"]["seconds"]
    result["times_faster_than_reading_anew"] = {
        name: round(anew / max(value["median_s"], 1e-3))
        for name, value in result["ask"].items()
        if "median_s" in str(value)
    }
    text = json.dumps(result, indent=2)
    print(text)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
