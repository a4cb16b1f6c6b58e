"""Lineage: from an answer's release back to the traces behind it, and from a trace forward to all that saw it.

The graph is made of step records (inputs -> step -> output artifacts) and of the traces and scores that artifacts name
in `lineage.json`: `{"traces": [ids], "scores": [ids]}`. An artifact of kind `records` that has no such file is read for
the `trace_id` of each line: what was harvested and later left out of a dataset is still stored there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sluice.infra.errors import IntegrityError
from sluice.infra.object_store import ObjectStore
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.step_records import StepRecord, read_records

LINEAGE_FILE = "lineage.json"
RECORDS_FILE = "records.jsonl"
UNKNOWN = "unknown origin"
_MANIFESTS = "manifests/sha256/"
_READERS = 16


@dataclass(frozen=True)
class Node:
    """A tree node. `kind` is the artifact's kind (`dataset`), or `step`, `trace`, `score`, `unknown`.

    `digest` is the artifact's or the step key's digest, or the trace or score id; empty for an unknown origin. Each
    thing is opened out once; where it comes again (also in a cycle) it has `repeated` set and no children.
    """

    kind: str
    label: str
    digest: str
    children: tuple[Node, ...] = ()
    repeated: bool = False

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


@dataclass(frozen=True)
class Sources:
    """The ids of traces and scores that an artifact holds content of."""

    traces: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()


@dataclass(frozen=True)
class LineageGraph:
    """All steps and artifacts of an object store, as one graph.

    `kinds` and `sources` are by artifact digest, `outputs` by step key; `makers` and `users` give the steps that made
    or used an artifact, `holders` the artifacts that name a trace or score, whose kind is in `named`.
    """

    steps: Mapping[str, StepRecord]
    kinds: Mapping[str, str]
    sources: Mapping[str, Sources]
    outputs: Mapping[str, tuple[str, ...]]
    makers: Mapping[str, tuple[str, ...]]
    users: Mapping[str, tuple[str, ...]]
    holders: Mapping[str, tuple[str, ...]]
    named: Mapping[str, str]

    @classmethod
    def load(cls, objects: ObjectStore, artifacts: ArtifactStore | None = None) -> LineageGraph:
        """Read every record and manifest. Raises `IntegrityError` when one is damaged."""
        # Files are read straight from the store here, so the cache's folder is never used.
        store = artifacts or ArtifactStore(objects, Path(os.devnull))
        digests = [f"sha256:{info.key.removeprefix(_MANIFESTS)}" for info in objects.list(_MANIFESTS)]
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            described = list(pool.map(lambda digest: _describe(store, digest), digests))
        kinds = {digest: kind for digest, (kind, _) in zip(digests, described, strict=True)}
        sources = {digest: found for digest, (_, found) in zip(digests, described, strict=True) if found}
        return cls.of(read_records(objects), kinds, sources)

    @classmethod
    def of(
        cls, records: Iterable[StepRecord], kinds: Mapping[str, str], sources: Mapping[str, Sources]
    ) -> LineageGraph:
        """The graph of these records. Two editions of one step key are one step with the outputs of both."""
        steps: dict[str, StepRecord] = {}
        makes: list[tuple[str, str]] = []
        uses: list[tuple[str, str]] = []
        for record in records:
            steps[record.key_digest] = record
            uses.extend((digest, record.key_digest) for digest in record.key.inputs.values())
            makes.extend((record.key_digest, digest) for digest in record.output.artifacts.values())
        traces = [(trace, digest) for digest, found in sources.items() for trace in found.traces]
        scores = [(score, digest) for digest, found in sources.items() for score in found.scores]
        return cls(
            steps,
            kinds,
            sources,
            outputs=_group(makes),
            makers=_group((digest, key) for key, digest in makes),
            users=_group(uses),
            holders=_group([*traces, *scores]),
            named={**{trace: "trace" for trace, _ in traces}, **{score: "score" for score, _ in scores}},
        )

    def ancestors(self, digest: str) -> Node:
        """What an artifact came from: its steps, their inputs, and so on, down to traces or an unknown origin."""
        return self._tree(digest, self._came_from, to_origin=True)

    def descendants(self, identity: str) -> Node:
        """What an artifact (digest), trace or score (id) went into: artifacts that hold it, steps that used those.

        From a trace or score it does not pass through an artifact that names its own sources and this one not among
        them: a dataset holds nothing of what curation left out.
        """
        holders = set(self.holders.get(identity, ()))

        def neighbours(one: str) -> list[str]:
            onward = self._went_into(one)
            return [o for o in onward if o in holders or o not in self.sources] if identity in self.named else onward

        return self._tree(identity, neighbours, to_origin=False)

    def traces(self, digest: str) -> tuple[str, ...]:
        """Ids of the traces behind an artifact, sorted: those that it, or else its nearest ancestors, name."""
        return self._nearest(digest, lambda found: found.traces)

    def scores(self, digest: str) -> tuple[str, ...]:
        """Ids of the scores behind an artifact, sorted; as `traces`."""
        return self._nearest(digest, lambda found: found.scores)

    def artifacts_with(self, identity: str) -> tuple[str, ...]:
        """Digests of all artifacts that hold a trace or score, or were made from one that does, sorted."""
        return tuple(sorted({n.digest for n in self.descendants(identity).walk() if n.digest in self.kinds}))

    def _nearest(self, digest: str, ids: Callable[[Sources], tuple[str, ...]]) -> tuple[str, ...]:
        found: set[str] = set()
        waiting, seen = [digest], {digest}
        while waiting:
            current = waiting.pop()
            named = self.sources.get(current)
            if named is not None:
                # A dataset names what it kept; what its records held besides is not behind it.
                found.update(ids(named))
                continue
            inputs = (one for key in self.makers.get(current, ()) for one in self.steps[key].key.inputs.values())
            for one in inputs:
                if one not in seen:
                    seen.add(one)
                    waiting.append(one)
        return tuple(sorted(found))

    def _came_from(self, identity: str) -> list[str]:
        if identity in self.steps:
            return sorted(set(self.steps[identity].key.inputs.values()))
        found = self.sources.get(identity, Sources())
        return [*self.makers.get(identity, ()), *found.traces, *found.scores]

    def _went_into(self, identity: str) -> list[str]:
        if identity in self.steps:
            return list(self.outputs.get(identity, ()))
        return [*self.holders.get(identity, ()), *self.users.get(identity, ())]

    def _tree(self, root: str, neighbours: Callable[[str], list[str]], *, to_origin: bool) -> Node:
        opened: set[str] = {root}
        # (identity, children so far, children to come): an explicit stack, as chains may be deeper than Python's.
        stack: list[tuple[str, list[Node], Iterator[str]]] = [(root, [], iter(neighbours(root)))]
        while True:
            identity, children, coming = stack[-1]
            following = next(coming, None)
            if following is None:
                if to_origin and not children and self._origin_is_unknown(identity):
                    children.append(Node("unknown", UNKNOWN, ""))
                stack.pop()
                node = Node(*self._name(identity), identity, tuple(children))
                if not stack:
                    return node
                stack[-1][1].append(node)
            elif following in opened:
                children.append(Node(*self._name(following), following, repeated=True))
            else:
                opened.add(following)
                stack.append((following, [], iter(neighbours(following))))

    def _origin_is_unknown(self, identity: str) -> bool:
        # A step without inputs (a harvest, an import) is an origin, and so is a trace; an artifact that no record
        # names as an output is not.
        return identity not in self.steps and identity not in self.named

    def _name(self, identity: str) -> tuple[str, str]:
        if identity in self.steps:
            return "step", self.steps[identity].key.name
        if identity in self.kinds:
            return self.kinds[identity], f"{self.kinds[identity]} {identity.removeprefix('sha256:')[:12]}"
        if identity in self.named:
            return self.named[identity], f"{self.named[identity]} {identity}"
        return "unknown", f"{identity} (not stored here)"


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """Second elements by first, sorted, each once."""
    grouped: dict[str, set[str]] = {}
    for first, second in pairs:
        grouped.setdefault(first, set()).add(second)
    return {first: tuple(sorted(seconds)) for first, seconds in grouped.items()}


def _describe(store: ArtifactStore, digest: str) -> tuple[str, Sources | None]:
    """The kind of an artifact and the sources it names, if it names any."""
    manifest = store.manifest(digest)
    files = {entry.path for entry in manifest.files}
    try:
        if LINEAGE_FILE in files:
            raw = json.loads(store.read_file(digest, LINEAGE_FILE))
            return manifest.kind, Sources(
                tuple(map(str, raw.get("traces", ()))), tuple(map(str, raw.get("scores", ())))
            )
        if manifest.kind == "records" and RECORDS_FILE in files:
            lines = store.read_file(digest, RECORDS_FILE).splitlines()
            named = (json.loads(line).get("trace_id") for line in lines if line.strip())
            return manifest.kind, Sources(tuple(dict.fromkeys(str(trace) for trace in named if trace)))
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"The {manifest.kind} {digest} does not say where it comes from: {error!r}.") from error
    return manifest.kind, None
