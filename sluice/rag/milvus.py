"""The connection to Milvus, its errors in our words, and the names and schema that every index shares."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sluice.infra.errors import InputError, UnavailableError
from sluice.provenance.canonical import short

CONNECT_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 30.0
SEARCH_TIMEOUT_S = 5.0

DENSE, SPARSE = "dense", "sparse"
EXACT_ROWS = 20_000
"""Up to here the dense index is exact (FLAT): it needs no building and 20,000 rows of 384 are searched in
milliseconds. Above it AUTOINDEX lets the server choose (HNSW on a cluster)."""

# Milvus counts VARCHAR lengths in bytes.
MAX_DOCUMENT_ID, MAX_HEADING, MAX_TEXT = 1024, 1024, 65_535

_NOT_FOUND = frozenset({100, 1600})  # collection not found, alias not found
_NOT_LOADED = frozenset({101})
_APPLICATION = re.compile(r"[a-z][a-z0-9-]{1,40}")


class CollectionMissing(InputError):
    """No collection and no alias has this name."""


class CollectionReleased(UnavailableError):
    """The collection is there and not in memory: after a restart milvus-lite loads none by itself."""


def connect(uri: str, timeout_s: float = CONNECT_TIMEOUT_S) -> Any:
    """A `pymilvus.MilvusClient`: safe to share between threads, and reconnects after a restart of the server.

    Raises `UnavailableError` when nothing answers at `uri`, `InputError` for an empty one.
    """
    if not uri:
        raise InputError(
            f"vectors.uri = {uri!r} is not an address.", hint="Set SLUICE_VECTORS__URI, or run `sluice up`."
        )
    from pymilvus import MilvusClient

    # pymilvus logs each error with its whole stack before it raises it, also those we expect and handle.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL + 1)
    # gRPC remembers a dead server for all channels of the process and tries again ever more rarely, up to 2 minutes
    # apart: with a pool of its own and short pauses a client is back as soon as the server is.
    options = {
        "grpc.use_local_subchannel_pool": 1,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 1_000,
    }
    with explained(uri):
        return MilvusClient(uri=uri, timeout=timeout_s, grpc_options=options)


@contextmanager
def explained(uri: str, name: str = "") -> Iterator[None]:
    """Turn pymilvus' errors into ours, naming the server and the collection or alias."""
    from pymilvus.exceptions import MilvusException

    rpc_error: type[Exception] = importlib.import_module("grpc").RpcError
    try:
        yield
    except MilvusException as error:
        if error.code in _NOT_FOUND:
            raise CollectionMissing(
                f"Milvus at {uri} has no collection or alias {name!r}.", hint="`sluice run reembed` builds the index."
            ) from error
        if error.code in _NOT_LOADED:
            raise CollectionReleased(f"The collection {name!r} in Milvus at {uri} is not loaded.") from error
        raise UnavailableError(
            f"Milvus at {uri} failed{f' on {name!r}' if name else ''}: {error.message}.",
            hint="Is it running? `sluice status` tells, `sluice up` mends the local one.",
        ) from error
    except (rpc_error, OSError) as error:
        raise UnavailableError(
            f"Milvus at {uri} does not answer: {error}.",
            hint="Is it running? `sluice status` tells, `sluice up` mends the local one.",
        ) from error


def alias_name(application: str) -> str:
    """The alias that an application's queries go to. Milvus allows no hyphen; applications have no underscore."""
    if not _APPLICATION.fullmatch(application):
        raise InputError(
            f"application = {application!r} is not a name.", hint="Lower-case letters, digits and hyphens, 2 to 41."
        )
    return application.replace("-", "_")


def collection_name(application: str, index_digest: str) -> str:
    """The collection that holds an application's index with this digest: one collection a build."""
    return f"{alias_name(application)}_{short(index_digest)}"


def is_collection_of(application: str, collection: str) -> bool:
    """Whether the name is one that `collection_name` makes for this application."""
    return re.fullmatch(rf"{re.escape(alias_name(application))}_[0-9a-f]{{12}}", collection) is not None


def create_collection(client: Any, name: str, dimension: int) -> None:
    """Create an empty collection with the one schema of an index.

    Every row carries the index's digest: it is how a search result says which index it came from, and how a build
    recognises its own half-done work. (milvus-lite keeps neither description nor properties of a collection.)
    """
    from pymilvus import DataType, Function, FunctionType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("document_id", DataType.VARCHAR, max_length=MAX_DOCUMENT_ID)
    schema.add_field("heading", DataType.VARCHAR, max_length=MAX_HEADING)
    analyzer = {"tokenizer": "standard", "filter": ["lowercase"]}
    schema.add_field("text", DataType.VARCHAR, max_length=MAX_TEXT, enable_analyzer=True, analyzer_params=analyzer)
    schema.add_field("index_digest", DataType.VARCHAR, max_length=80)
    schema.add_field(DENSE, DataType.FLOAT_VECTOR, dim=dimension)
    schema.add_field(SPARSE, DataType.SPARSE_FLOAT_VECTOR)
    schema.add_function(
        Function(name="bm25", function_type=FunctionType.BM25, input_field_names=["text"], output_field_names=[SPARSE])
    )
    client.create_collection(name, schema=schema, consistency_level="Strong", timeout=CALL_TIMEOUT_S)


def create_indexes(client: Any, name: str, rows: int) -> None:
    """Create the indexes that are not there yet. Creating is only asking: wait with `build._wait_for_indexes`."""
    present = set(client.list_indexes(name))
    parameters = client.prepare_index_params()
    if DENSE not in present:
        kind = "FLAT" if rows <= EXACT_ROWS else "AUTOINDEX"
        parameters.add_index(DENSE, index_name=DENSE, index_type=kind, metric_type="COSINE")
    if SPARSE not in present:
        parameters.add_index(
            SPARSE,
            index_name=SPARSE,
            index_type="SPARSE_INVERTED_INDEX",
            metric_type="BM25",
            params={"bm25_k1": 1.2, "bm25_b": 0.75},
        )
    if {DENSE, SPARSE} - present:
        client.create_index(name, parameters, timeout=CALL_TIMEOUT_S)


def aliases_of(client: Any, collection: str) -> list[str]:
    """The aliases that point at a collection."""
    found = client.list_aliases(collection_name=collection, timeout=CALL_TIMEOUT_S)
    return sorted(found["aliases"])


def target_of(client: Any, alias: str) -> str | None:
    """The collection that an alias points at, or None when there is no such alias."""
    from pymilvus.exceptions import MilvusException

    try:
        return str(client.describe_alias(alias, timeout=SEARCH_TIMEOUT_S)["collection_name"])
    except MilvusException as error:
        if error.code in _NOT_FOUND:
            return None
        raise
