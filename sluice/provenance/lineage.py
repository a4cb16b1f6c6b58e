"""Lineage: from an answer's release back to the traces behind it, and from a trace, user or document forward to all
that saw it.

`LineageIndex` answers by SQL over facts that were read once from the object store (`lineage_facts`) and are kept as
Parquet segments (`lineage_segments`). Each query first catches up with what is new. The index is a view: the records
and manifests are the truth, and it can be made anew from them at any time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.object_store import ObjectStore
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json
from sluice.provenance.lineage_facts import COLUMNS, MANIFESTS, STEPS, stage
from sluice.provenance.lineage_segments import Segments, place_of, read

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

UNKNOWN = "unknown origin"
SOURCES = ("trace", "score", "user", "document")
_MEMORY = "512MB"
_FEW = 200


@dataclass(frozen=True)
class Node:
    """A tree node. `kind` is the artifact's kind (`dataset`), or `step`, `trace`, `score`, `user`, `document`,
    `unknown`.

    `digest` is the artifact's or the step key's digest, or the id of trace, score, user or document; empty for an
    unknown origin. Each thing is opened out once; where it comes again (also in a cycle) it has `repeated` set and no
    children. `more` counts the children that were left out, `detail` says what people may want to know besides.
    """

    kind: str
    label: str
    digest: str
    children: tuple[Node, ...] = ()
    repeated: bool = False
    more: int = 0
    detail: Mapping[str, str] = field(default_factory=dict)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


class LineageIndex:
    """The lineage of one object store. `folder` keeps local copies of the index; not for use by two threads at once.

    Every reading method answers from what `catch_up` saw last; opening the index catches up.
    """

    def __init__(self, objects: ObjectStore, folder: Path, report: Report = no_report) -> None:
        self._objects = objects
        self._segments = Segments(objects, folder)
        self._folder = folder
        self.catch_up(report)

    def catch_up(self, report: Report = no_report) -> None:
        """Read what was stored since into new segments. Killed in between, the next one goes on from there.

        Raises `IntegrityError` when a new record or manifest is damaged.
        """
        listed = [info.key for prefix in (STEPS, MANIFESTS) for info in self._objects.list(prefix)]
        paths = self._segments.fetch()
        self._open(paths)
        self._query("CREATE OR REPLACE TABLE listed AS SELECT unnest(?) AS key", [listed])
        new = self._column(
            "SELECT key FROM listed WHERE key NOT IN (SELECT object FROM facts WHERE relation = 'step') AND key NOT IN "
            f"(SELECT '{MANIFESTS}' || subject[8:] FROM facts WHERE relation = 'artifact') ORDER BY key"
        )
        if new:
            self._query(f"CREATE OR REPLACE TABLE staged ({COLUMNS})")
            with tempfile.TemporaryDirectory() as scratch:
                for rows in stage(self._connection, self._objects, new, Path(scratch), report):
                    if rows:
                        paths.append(self._segments.write(self._connection, "SELECT * FROM staged"))
                        self._query("DELETE FROM staged")
            self._query("DROP TABLE staged")
            self._open(self._segments.merge(self._connection, paths))

    def rebuild(self, report: Report = no_report) -> None:
        """Drop the index and read everything again."""
        self._segments.drop()
        self.catch_up(report)

    def ancestors(self, digest: str, limit: int = 0) -> Node:
        """What an artifact came from: its steps, their inputs, and so on, down to traces or an unknown origin.

        At most `limit` traces and scores are named under each artifact; 0 for all.
        """
        edges = self._edges("SELECT dst AS here, src AS there FROM edges", [digest])
        nodes = self._described({digest, *edges, *(one for onward in edges.values() for one in onward)})
        named = {one: self._sources(one, nodes[one], limit) for one in nodes if nodes[one].kind != "step"}
        for one, found in named.items():
            edges[one] = [*edges.get(one, ()), *(source.digest for source in found)]
            nodes.update({source.digest: source for source in found})
            nodes[one] = replace(nodes[one], more=_count(nodes[one]) - len(found))
        return _tree(digest, nodes, edges, lambda node: node.kind not in ("step", *SOURCES) and not node.more)

    def descendants(self, identity: str, kind: str = "") -> Node:
        """What an artifact (digest), trace, score, user or document (id) went into: artifacts that hold it, steps that
        used those. `kind` says which of these it is, where an id could be more than one.

        From a source it does not pass through an artifact that names its own sources and this one not among them: a
        dataset holds nothing of what curation left out.
        """
        kind = kind or next(iter(self.kinds_of(identity)), "")
        if kind not in SOURCES:
            edges = self._edges("SELECT src AS here, dst AS there FROM edges", [identity])
            starts: list[str] = []
        else:
            starts = self._holders(identity, kind)
            self._query("CREATE OR REPLACE TEMP TABLE holders AS SELECT unnest(?) AS id", [starts])
            edges = self._edges(
                "SELECT src AS here, dst AS there FROM edges WHERE dst IN (SELECT id FROM holders) "
                "OR dst NOT IN (SELECT id FROM sourced)",
                starts,
            )
        nodes = self._described({*starts, *edges, *(one for onward in edges.values() for one in onward)})
        root = nodes.get(identity)
        if root is None and kind in SOURCES:
            root = Node(kind, f"{kind} {identity}", identity)
            edges[identity] = starts
        nodes[identity] = root or self._described({identity})[identity]
        return _tree(identity, nodes, edges, lambda _: False)

    def kinds_of(self, identity: str) -> tuple[str, ...]:
        """Which sources (trace, score, user, document) have this id; in that order."""
        found = self._column(
            "SELECT DISTINCT relation FROM facts WHERE relation IN ('trace', 'score', 'user', 'document') "
            f"AND place = {place_of(identity)} AND subject = ?",
            [identity],
        )
        return tuple(kind for kind in SOURCES if kind in found)

    def traces(self, digest: str) -> tuple[str, ...]:
        """Ids of the traces behind an artifact, sorted: those that it, or else its nearest ancestors, name."""
        return self._nearest(digest, "trace")

    def scores(self, digest: str) -> tuple[str, ...]:
        """Ids of the scores behind an artifact, sorted; as `traces`."""
        return self._nearest(digest, "score")

    def artifacts_with(self, identity: str, kind: str = "") -> tuple[str, ...]:
        """Digests of all artifacts that hold a source, or were made from one that does, sorted."""
        plain = {"step", "unknown", *SOURCES}
        return tuple(sorted({n.digest for n in self.descendants(identity, kind).walk() if n.kind not in plain}))

    def makers(self, digest: str) -> tuple[str, ...]:
        """Where the records of the steps that made an artifact lie: the object keys of all editions, sorted."""
        return self._records("SELECT src FROM edges WHERE dst = ?", digest)

    def users(self, digest: str) -> tuple[str, ...]:
        """Where the records of the steps that used an artifact lie; as `makers`."""
        return self._records("SELECT dst FROM edges WHERE src = ?", digest)

    def _records(self, steps: str, digest: str) -> tuple[str, ...]:
        found = "SELECT DISTINCT object FROM facts WHERE relation = 'step' AND object IN (SELECT key FROM listed)"
        return tuple(self._column(f"{found} AND subject IN ({steps}) ORDER BY object", [digest]))

    @cached_property
    def _connection(self) -> DuckDBPyConnection:
        import duckdb

        self._folder.mkdir(parents=True, exist_ok=True)
        return duckdb.connect(
            config={
                "memory_limit": _MEMORY,
                "temp_directory": str(self._folder / "spill"),
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "enable_object_cache": True,
            }
        )

    def _open(self, paths: list[Path]) -> None:
        """The view `facts`, and of it as tables what every walk needs: the edges, and which artifacts name sources."""
        self._query(f"CREATE OR REPLACE TABLE none (place UBIGINT, {COLUMNS})")
        self._query(f"CREATE OR REPLACE VIEW facts AS SELECT * FROM {read(paths) if paths else 'none'}")
        self._copies = len(paths)
        self._query(
            "CREATE OR REPLACE TABLE edges AS SELECT DISTINCT subject AS src, object AS dst FROM facts "
            "WHERE relation IN ('input', 'output')"
        )
        self._query(
            "CREATE OR REPLACE TABLE sourced AS SELECT DISTINCT subject AS id FROM facts WHERE relation = 'artifact' "
            "AND (detail LIKE '%\"traces\"%' OR detail LIKE '%\"scores\"%' OR detail LIKE '%\"documents\"%')"
        )

    def _edges(self, steps: str, starts: list[str]) -> dict[str, list[str]]:
        """All that can be reached from `starts` by `steps` (columns here, there), as neighbours in order."""
        self._query(f"CREATE OR REPLACE TEMP TABLE ways AS {steps}")
        self._query(
            "CREATE OR REPLACE TEMP TABLE reached AS WITH RECURSIVE reach(id) AS (SELECT unnest(?) UNION "
            "SELECT there FROM reach JOIN ways ON here = id) SELECT id FROM reach",
            [starts],
        )
        found: dict[str, list[str]] = {}
        rows = "SELECT here, there FROM ways WHERE here IN (SELECT id FROM reached) ORDER BY here, there"
        for here, there in self._query(rows).fetchall():
            found.setdefault(here, []).append(there)
        return found

    def _holders(self, identity: str, kind: str) -> list[str]:
        """Artifacts that hold content of a source, sorted."""
        here = f"place = {place_of(identity)} AND subject = ?"
        held = "SELECT NULL WHERE ? IS NULL"
        if kind in ("trace", "score"):
            ids = "SELECT ?::VARCHAR"
        elif kind == "user":
            ids = f"SELECT object FROM facts WHERE relation = 'user' AND {here}"
        else:
            chunks = f"SELECT object FROM facts WHERE relation = 'document' AND detail = 'chunk' AND {here}"
            self._query(f"CREATE OR REPLACE TEMP TABLE chunks AS {chunks}", [identity])
            ids = (
                "SELECT object FROM facts WHERE relation = 'chunk' AND subject IN (SELECT * FROM chunks) "
                f"AND place IN ({self._places('chunks')}) AND ? IS NOT NULL"
            )
            held = f"SELECT object FROM facts WHERE relation = 'document' AND detail = 'artifact' AND {here}"
        self._query(f"CREATE OR REPLACE TEMP TABLE ids AS SELECT DISTINCT * FROM ({ids})", [identity])
        # Of many subjects only the places are compared: 64 bits of a digest may name an artifact too many (one time
        # in a billion questions), and never leave one out.
        return self._column(
            "SELECT DISTINCT object FROM facts WHERE relation IN ('trace', 'score') "
            f"AND place IN ({self._places('ids')}) UNION ({held}) ORDER BY 1",
            [identity],
        )

    def _places(self, table: str) -> str:
        """Where the subjects in the one column of a table lie, for an IN: as numbers while they are few, so that row
        groups without one are passed over."""
        if self._query(f"SELECT count(*) FROM {table}").fetchall()[0][0] > _FEW:
            return f"SELECT md5_number_lower(COLUMNS(*)) FROM {table}"
        return ", ".join(str(place_of(one)) for one in self._column(f"SELECT * FROM {table}")) or "NULL"

    def _sources(self, digest: str, node: Node, limit: int) -> list[Node]:
        """The traces, then the scores that an artifact names, the first `limit` of both."""
        found: list[Node] = []
        for kind in ("trace", "score"):
            room = limit - len(found) if limit else 10**12
            if room > 0 and f"{kind}s" in node.detail:
                # A fact may lie in several segments; no more often than there are segments.
                rows = self._column(
                    f"SELECT object FROM facts WHERE relation = 'holds' AND place = {place_of(digest)} "
                    "AND subject = ? AND detail = ? "
                    f"ORDER BY object LIMIT {room * self._copies}",
                    [digest, kind],
                )
                found.extend(Node(kind, f"{kind} {one}", one) for one in list(dict.fromkeys(rows))[:room])
        return found

    def _nearest(self, digest: str, kind: str) -> tuple[str, ...]:
        # A dataset names what it kept; what its records held besides is not behind it.
        self._query(
            "CREATE OR REPLACE TEMP TABLE naming AS SELECT DISTINCT subject AS id FROM facts WHERE relation = "
            "'artifact' AND (detail LIKE '%\"traces\"%' OR detail LIKE '%\"scores\"%')"
        )
        return tuple(
            self._column(
                "WITH RECURSIVE back(id) AS (SELECT ? UNION SELECT src FROM back JOIN edges ON dst = id "
                "WHERE id NOT IN (SELECT id FROM naming)) "
                "SELECT DISTINCT object FROM facts WHERE relation = 'holds' AND detail = ? "
                "AND subject IN (SELECT id FROM back) ORDER BY object",
                [digest, kind],
            )
        )

    def _described(self, identities: set[str]) -> dict[str, Node]:
        """A node without children for each."""
        found = {one: Node("unknown", f"{one} (not stored here)", one) for one in identities}
        self._query("CREATE OR REPLACE TEMP TABLE asked AS SELECT unnest(?) AS id", [sorted(identities)])
        rows = self._query(
            "SELECT relation, subject, object, detail FROM facts WHERE relation IN ('step', 'artifact') "
            "AND subject IN (SELECT id FROM asked) ORDER BY object"
        ).fetchall()
        here = set(self._column(f"SELECT 'sha256:' || key[{len(MANIFESTS) + 1}:] FROM listed WHERE key[1] = 'm'"))
        for relation, identity, name, text in rows:
            detail = {key: str(value) for key, value in json.loads(text).items() if value}
            if relation == "step":
                found[identity] = Node("step", detail.pop("name"), identity, detail=detail)
            else:
                gone = "" if identity in here else " (removed since)"
                found[identity] = Node(name, f"{name} {identity[7:19]}{gone}", identity, detail=detail)
        return found

    def _query(self, text: str, values: list[Json] | None = None) -> DuckDBPyConnection:
        return self._connection.execute(text, values)

    def _column(self, text: str, values: list[Json] | None = None) -> list[str]:
        return [str(row[0]) for row in self._query(text, values).fetchall()]


def _count(node: Node) -> int:
    return int(node.detail.get("traces", 0)) + int(node.detail.get("scores", 0))


def _tree(
    root: str, nodes: Mapping[str, Node], edges: Mapping[str, list[str]], unknown_origin: Callable[[Node], bool]
) -> Node:
    """The tree below `root`; a leaf of which `unknown_origin` holds gets a child that says so."""
    opened: set[str] = {root}
    # (identity, children so far, children to come): an explicit stack, as chains may be deeper than Python's.
    stack: list[tuple[str, list[Node], Iterator[str]]] = [(root, [], iter(edges.get(root, ())))]
    while True:
        identity, children, coming = stack[-1]
        following = next(coming, None)
        if following is None:
            # A step without inputs (a harvest, an import) is an origin, and so is a trace; an artifact that no record
            # names as an output is not.
            if not children and unknown_origin(nodes[identity]):
                children.append(Node("unknown", UNKNOWN, ""))
            stack.pop()
            node = replace(nodes[identity], children=tuple(children))
            if not stack:
                return node
            stack[-1][1].append(node)
        elif following in opened:
            children.append(replace(nodes[following], repeated=True, more=0))
        else:
            opened.add(following)
            stack.append((following, [], iter(edges.get(following, ()))))
