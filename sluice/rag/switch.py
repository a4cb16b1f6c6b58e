"""Which index an application's queries go to: switch, rollback, and dropping what nobody needs.

The history lives in Milvus itself as aliases: `<alias>_back_1` points at the index before the current one, and so on.
So a rollback needs nothing but Milvus, and an old index that may be needed again is guarded like the current one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sluice.infra.errors import ConflictError, GateRefused, InputError
from sluice.rag import milvus
from sluice.rag.gate import GateResult
from sluice.rag.milvus import CALL_TIMEOUT_S

KEEP = 3
"""Earlier indexes that stay loaded for a rollback."""


@dataclass(frozen=True)
class AliasState:
    """Where an alias points (None: nowhere yet), and the earlier collections, latest first."""

    alias: str
    collection: str | None
    history: tuple[str, ...]


def alias_state(uri: str, application: str) -> AliasState:
    """The application's alias and its history."""
    client = milvus.connect(uri)
    alias = milvus.alias_name(application)
    with milvus.explained(uri, alias):
        return _state(client, alias)


def switch(
    uri: str,
    application: str,
    collection: str,
    gate: GateResult,
    *,
    expected: str | None,
    keep: int = KEEP,
) -> AliasState:
    """Point the application's alias at `collection`. The same switch twice is success.

    `expected` is the collection that the gate compared with (None: there was none). Raises `GateRefused` unless `gate`
    passed this very index, `ConflictError` when the alias points elsewhere by now, `CollectionMissing` when there is
    no such collection.
    """
    client = milvus.connect(uri)
    alias = milvus.alias_name(application)
    with milvus.explained(uri, collection):
        client.load_collection(collection, timeout=CALL_TIMEOUT_S)
        found = client.query(collection, filter="", output_fields=["index_digest"], limit=1, timeout=CALL_TIMEOUT_S)
        digest = found[0]["index_digest"] if found else None
        if gate.verdict != "pass" or gate.candidate != digest:
            raise GateRefused(
                f"The gate has not passed {collection}: {gate.verdict} for {gate.candidate}.",
                hint=" ".join(f"{reason}." for reason in gate.reasons),
            )
        state = _state(client, alias)
        if state.collection == collection:
            return state
        if state.collection != expected:
            raise ConflictError(
                f"The alias {alias} points at {state.collection}, not at {expected} as when the gate compared.",
                hint="Run the gate again.",
            )
        # History first: a kill in between leaves the current index twice in reach, never out of reach, and running
        # again writes the same history.
        earlier = [one for one in (state.collection, *state.history) if one not in (None, collection)]
        _set_history(client, alias, [one for one in dict.fromkeys(earlier) if one is not None][:keep])
        _point(client, alias, collection)
        return _state(client, alias)


def rollback(uri: str, application: str, *, away_from: str) -> AliasState:
    """Point the alias back at the index before `away_from`. When it does not point there any more, nothing changes.

    Raises `ConflictError` when there is no earlier index.
    """
    client = milvus.connect(uri)
    alias = milvus.alias_name(application)
    with milvus.explained(uri, alias):
        state = _state(client, alias)
        if state.collection != away_from:
            return state
        earlier = [one for one in state.history if one != away_from]
        if not earlier:
            raise ConflictError(
                f"The alias {alias} has no earlier index to go back to.", hint="Build one with `sluice run reembed`."
            )
        client.load_collection(earlier[0], timeout=CALL_TIMEOUT_S)
        _point(client, alias, earlier[0])
        _set_history(client, alias, earlier[1:])
        return _state(client, alias)


def drop_collection(uri: str, application: str, collection: str) -> None:
    """Drop one of the application's collections. Raises `GateRefused` while an alias points at it.

    Milvus itself would drop it together with the alias, and every query would fail from then on.
    """
    if not milvus.is_collection_of(application, collection):
        raise InputError(f"collection = {collection!r} is not an index of {application!r}.")
    client = milvus.connect(uri)
    with milvus.explained(uri, collection):
        if not client.has_collection(collection, timeout=CALL_TIMEOUT_S):
            return
        aliases = milvus.aliases_of(client, collection)
        if aliases:
            raise GateRefused(
                f"The collection {collection} is in use by the alias {', '.join(aliases)}.",
                hint="Switch to another index first.",
            )
        client.drop_collection(collection, timeout=CALL_TIMEOUT_S)


def retire(uri: str, application: str, *, protect: Collection[str] = ()) -> list[str]:
    """Drop the application's collections that no alias points at, except those in `protect` (builds in progress).

    Returns the names that were dropped.
    """
    client = milvus.connect(uri)
    with milvus.explained(uri, application):
        candidates = [
            name
            for name in sorted(client.list_collections(timeout=CALL_TIMEOUT_S))
            if milvus.is_collection_of(application, name)
            and name not in protect
            and not milvus.aliases_of(client, name)
        ]
    for name in candidates:
        drop_collection(uri, application, name)
    return candidates


def _state(client: Any, alias: str) -> AliasState:
    history: list[str] = []
    # A kill may leave a gap in the numbers, so look at every name instead of stopping at the first that is free.
    for name in _history_aliases(client, alias):
        target = milvus.target_of(client, name)
        if target is not None and target not in history:
            history.append(target)
    return AliasState(alias, milvus.target_of(client, alias), tuple(history))


def _history_aliases(client: Any, alias: str) -> list[str]:
    prefix = f"{alias}_back_"
    names = client.list_aliases(timeout=CALL_TIMEOUT_S)["aliases"]
    numbered = [name for name in names if name.startswith(prefix) and name.removeprefix(prefix).isdigit()]
    return sorted(numbered, key=lambda name: int(name.removeprefix(prefix)))


def _set_history(client: Any, alias: str, collections: list[str]) -> None:
    # The oldest first: at each moment every collection that stays has at least one alias that guards it.
    for number in range(len(collections), 0, -1):
        _point(client, f"{alias}_back_{number}", collections[number - 1])
    kept = {f"{alias}_back_{number}" for number in range(1, len(collections) + 1)}
    for name in _history_aliases(client, alias):
        if name not in kept:
            client.drop_alias(name, timeout=CALL_TIMEOUT_S)


def _point(client: Any, alias: str, collection: str) -> None:
    current = milvus.target_of(client, alias)
    if current is None:
        client.create_alias(collection, alias, timeout=CALL_TIMEOUT_S)
    elif current != collection:
        client.alter_alias(collection, alias, timeout=CALL_TIMEOUT_S)
