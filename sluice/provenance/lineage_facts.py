"""What the objects of the chain say about origins, as rows: the facts that the lineage index is made of.

A fact is four strings (relation, subject, object, detail), and always "subject flows into object" but for the last two:

| relation   | subject        | object          | detail                                            |
|------------|----------------|-----------------|---------------------------------------------------|
| `input`    | artifact       | step key        | the input's name                                  |
| `output`   | step key       | artifact        | the output's name                                 |
| `trace`    | trace id       | artifact        | that names it                                     |
| `score`    | score id       | artifact        | that names it                                     |
| `user`     | user id        | trace, score id | who asked, who judged                             |
| `chunk`    | chunk id       | trace id        | the passage was in the trace's prompt             |
| `document` | document id    | chunk id, artifact | `chunk` or `artifact`: what it was cut into, what holds it |
| `holds`    | artifact       | trace, score id | `trace` or `score`: the first two, by artifact    |
| `artifact` | artifact       | its kind        | JSON: size, counts of what it names               |
| `step`     | step key       | object's key    | JSON: name, times, host, code, revision           |

Artifacts name sources in `lineage.json` (`{"traces": [ids], "scores": [ids]}`); an artifact of kind `records` without
one in `records.jsonl` (a line a trace); documents lie in `documents.jsonl` and `chunks.jsonl`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectMissing, ObjectStore
from sluice.infra.progress import Report
from sluice.provenance.canonical import Json, digest_bytes, digest_file, hex_of
from sluice.provenance.manifest import Manifest, parse_manifest
from sluice.provenance.step_records import StepRecord, parse_record

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MANIFESTS, STEPS = "manifests/sha256/", "steps/"
LINEAGE_FILE, RECORDS_FILE, DOCUMENTS_FILE, CHUNKS_FILE = (
    "lineage.json",
    "records.jsonl",
    "documents.jsonl",
    "chunks.jsonl",
)
COLUMNS = "relation VARCHAR, subject VARCHAR, object VARCHAR, detail VARCHAR"
FLUSH_ROWS = 4_000_000
"""Rows staged before a segment is written: bounds the memory, and what a kill can undo."""
_BATCH = 256
_READERS = 16
_LINE_BYTES = 64 * 2**20

# Fields that are not asked for are passed over; what a line lacks is NULL.
_READ = {
    LINEAGE_FILE: "{traces: 'VARCHAR[]', scores: 'VARCHAR[]'}",
    RECORDS_FILE: "{id: 'VARCHAR', trace_id: 'VARCHAR', \"user\": 'VARCHAR', contexts: 'STRUCT(id VARCHAR)[]', "
    "scores: 'STRUCT(id VARCHAR, source VARCHAR, author VARCHAR)[]'}",
    DOCUMENTS_FILE: "{id: 'VARCHAR'}",
    CHUNKS_FILE: "{id: 'VARCHAR', document_id: 'VARCHAR'}",
}
_FACTS = {
    LINEAGE_FILE: """
        SELECT 'trace', unnest(traces), $artifact, '' FROM source UNION ALL
        SELECT 'score', unnest(scores), $artifact, '' FROM source""",
    RECORDS_FILE: """
        SELECT 'trace', coalesce(id, trace_id), $artifact, '' FROM source UNION ALL
        SELECT 'score', unnest(scores).id, $artifact, '' FROM source UNION ALL
        SELECT 'user', "user", coalesce(id, trace_id), '' FROM source UNION ALL
        SELECT 'user', one.author, one.id, '' FROM (SELECT unnest(scores) AS one FROM source)
            WHERE one.source = 'user' UNION ALL
        SELECT 'chunk', one.id, trace, '' FROM
            (SELECT unnest(contexts) AS one, coalesce(id, trace_id) AS trace FROM source)""",
    DOCUMENTS_FILE: "SELECT 'document', id, $artifact, 'artifact' FROM source",
    CHUNKS_FILE: """
        SELECT 'document', document_id, $artifact, 'artifact' FROM source UNION ALL
        SELECT 'document', document_id, id, 'chunk' FROM source""",
}


def stage(
    connection: DuckDBPyConnection, objects: ObjectStore, keys: Iterable[str], scratch: Path, report: Report
) -> Iterator[int]:
    """Read these objects (manifests and step records) into the table `staged`; yields the number of rows whenever
    they should be written, and at the end. The caller empties the table.

    Raises `IntegrityError` naming an object that is damaged; one that was removed meanwhile is passed over.
    """
    done = rows = 0
    wanted = list(keys)
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        for start in range(0, len(wanted), _BATCH):
            batch = wanted[start : start + _BATCH]
            found: list[tuple[str, str, str, str]] = []
            for key, data in zip(batch, pool.map(lambda key: _get(objects, key), batch), strict=True):
                done += 1
                if data is None:
                    continue
                if key.startswith(STEPS):
                    found.extend(_step_facts(objects, key, parse_record(key, data)))
                    continue
                digest = f"sha256:{key.removeprefix(MANIFESTS)}"
                if digest_bytes(data) != digest:
                    raise IntegrityError(f"The manifest stored for {digest} has the digest {digest_bytes(data)}.")
                counts = _stage_sources(connection, objects, digest, manifest := parse_manifest(data), scratch)
                rows += sum(counts.values())
                detail = {"size": manifest.size, **counts}
                found.append(("artifact", digest, manifest.kind, json.dumps(detail)))
                if rows >= FLUSH_ROWS:
                    _insert(connection, found)
                    found = []
                    yield rows
                    rows = 0
                report(done, len(wanted), "reading what is new into the lineage index")
            _insert(connection, found)
            rows += len(found)
    yield rows


def _get(objects: ObjectStore, key: str) -> bytes | None:
    try:
        return objects.get(key)
    except ObjectMissing:
        return None


def _insert(connection: DuckDBPyConnection, rows: list[tuple[str, str, str, str]]) -> None:
    if rows:
        columns = [list(column) for column in zip(*rows, strict=True)]
        connection.execute("INSERT INTO staged SELECT unnest(?), unnest(?), unnest(?), unnest(?)", columns)


def _step_facts(objects: ObjectStore, place: str, record: StepRecord) -> Iterator[tuple[str, str, str, str]]:
    key = record.key_digest
    detail = {
        "name": record.key.name,
        "started": record.started,
        "finished": record.finished,
        "host": record.host,
        "code": record.key.code,
        "revision": _revision(_get(objects, f"attestations/sha256/{hex_of(record.statement)}.json")),
    }
    yield ("step", key, place, json.dumps(detail))
    for name, digest in record.key.inputs.items():
        yield ("input", digest, key, name)
    for name, digest in record.output.artifacts.items():
        yield ("output", key, digest, name)


def _revision(envelope: bytes | None) -> str:
    """The source revision that a statement names, for people to read; `StepRunner.verify` checks statements."""
    try:
        payload = json.loads(base64.b64decode(json.loads(envelope or b"")["payload"]))
        resolved: list[Json] = payload["predicate"]["buildDefinition"]["resolvedDependencies"]
        return next((str(one["digest"]["gitCommit"]) for one in resolved if "gitCommit" in one["digest"]), "")
    except (ValueError, KeyError, TypeError):
        return ""


def _stage_sources(
    connection: DuckDBPyConnection, objects: ObjectStore, digest: str, manifest: Manifest, scratch: Path
) -> dict[str, int]:
    """Stage what an artifact's files name; how many of each kind that it could name."""
    files = {entry.path: entry for entry in manifest.files}
    counts: dict[str, int] = {}
    wanted = [name for name in (LINEAGE_FILE, DOCUMENTS_FILE, CHUNKS_FILE) if name in files]
    if manifest.kind == "records" and LINEAGE_FILE not in files and RECORDS_FILE in files:
        wanted.append(RECORDS_FILE)
    for name in wanted:
        path = scratch / name
        objects.get_file(f"blobs/sha256/{hex_of(files[name].digest)}", path)
        if digest_file(path) != files[name].digest:
            raise IntegrityError(f"{name} of artifact {digest} is damaged: its digest is {digest_file(path)}.")
        _read_facts(connection, digest, manifest.kind, name, path)
        path.unlink()
        (traces, scores, documents) = connection.execute(
            "SELECT count(*) FILTER (relation = 'trace'), count(*) FILTER (relation = 'score'), "
            "count(*) FILTER (relation = 'document' AND detail = 'artifact') FROM fresh"
        ).fetchall()[0]
        if name in (LINEAGE_FILE, RECORDS_FILE):
            counts |= {"traces": traces, "scores": scores}
        else:
            counts["documents"] = max(documents, counts.get("documents", 0))
        connection.execute(
            "INSERT INTO staged SELECT * FROM fresh UNION ALL "
            "SELECT 'holds', object, subject, relation FROM fresh WHERE relation IN ('trace', 'score')"
        )
    return counts


def _read_facts(connection: DuckDBPyConnection, digest: str, kind: str, name: str, path: Path) -> None:
    """The table `fresh`: the facts of one file, each once."""
    import duckdb

    layout = "unstructured" if name == LINEAGE_FILE else "newline_delimited"
    # One file is one JSON object here, so the longest object allowed is the file itself.
    longest = max(_LINE_BYTES, path.stat().st_size + 1) if name == LINEAGE_FILE else _LINE_BYTES
    try:
        connection.execute(
            f"CREATE OR REPLACE TEMP TABLE fresh AS WITH source AS (SELECT * FROM read_json($path, "
            f"format = '{layout}', columns = {_READ[name]}, maximum_object_size = {longest})), "
            f"found(relation, subject, object, detail) AS ({_FACTS[name]}) "
            "SELECT DISTINCT * FROM found WHERE coalesce(subject, '') <> '' AND coalesce(object, '') <> ''",
            {"path": str(path), "artifact": digest},
        )
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(f"The {kind} {digest} does not say where it comes from: {name}: {reason}.") from error
