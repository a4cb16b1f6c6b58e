"""Signed statements: in-toto Statement v1 with a SLSA provenance v1 predicate, in a signed DSSE envelope.

Sources: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance,
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md (what is signed is the pre-authentication encoding of
payload type and payload, so a signature for one type never holds for another).
"""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from sluice.infra.errors import IntegrityError
from sluice.provenance.canonical import Json, digest_json, hex_of
from sluice.provenance.environment import image_digest, machine, source_revision
from sluice.provenance.keys import IN_TOTO_PAYLOAD, PublicKey, Signer

__all__ = [
    "IN_TOTO_PAYLOAD",
    "Execution",
    "PublicKey",
    "Signer",
    "attestation_key",
    "check_statement",
    "host_name",
    "statement",
    "verify_envelope",
    "verify_signatures",
]

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:sluice:step:v1"
BUILDER = "urn:sluice:step-runner:v1"


def attestation_key(digest: str) -> str:
    """Where the object store keeps the envelope of this digest."""
    return f"attestations/sha256/{hex_of(digest)}.json"


def verify_envelope(envelope: Json, public_keys: Iterable[PublicKey], payload_type: str = IN_TOTO_PAYLOAD) -> Json:
    """The statement inside, after its signature by one of `public_keys` was verified. Raises as `verify_signatures`."""
    return verify_signatures(envelope, public_keys, payload_type)[0]


def verify_signatures(
    envelope: Json, public_keys: Iterable[PublicKey], payload_type: str = IN_TOTO_PAYLOAD
) -> tuple[Json, tuple[str, ...]]:
    """The statement inside, and the ids of those of `public_keys` whose signature on it holds (at least one).

    Raises `IntegrityError` that says which: not an envelope, another payload type, an unknown key, changed content.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    trusted = tuple(public_keys)
    try:
        # The parser rewrites the signatures of the mapping it is given.
        parsed = Envelope.from_dict(copy.deepcopy(envelope))
    except Exception as error:
        # Base64, hexadecimal, missing fields, wrong types: the parser has no common class for what it refuses.
        raise IntegrityError(f"This is not a DSSE envelope: {error!r}.") from error
    if parsed.payload_type != payload_type:
        raise IntegrityError(f"The envelope holds {parsed.payload_type!r}, where {payload_type!r} is expected.")
    found = sorted(parsed.signatures)
    if not set(found) & {key.key_id for key in trusted}:
        raise IntegrityError(
            f"The envelope is signed by {_key_names(found)}, none of them trusted.",
            hint=f"Trusted are {_key_names(key.key_id for key in trusted)}; add the signer's .pub file to trust it.",
        )
    keys = [SSlibKey.from_crypto(load_pem_public_key(key.pem.encode()), key.key_id) for key in trusted]
    accepted: list[str] = []
    for key in keys:
        # One at a time: the library stops at the first that holds, and policy may want another one.
        if key.keyid in parsed.signatures:
            with contextlib.suppress(VerificationError):
                accepted.extend(parsed.verify([key], threshold=1))
    if not accepted:
        raise IntegrityError(f"The signature by {_key_names(found)} does not hold: the payload was changed.")
    try:
        payload = json.loads(parsed.payload)
    except ValueError as error:
        raise IntegrityError(f"The envelope's payload is not JSON: {error}.") from error
    return payload, tuple(dict.fromkeys(accepted))


@dataclass(frozen=True)
class Execution:
    """One run of a step: its unique id, ISO 8601 UTC times and the host's name."""

    invocation: str
    started: str
    finished: str
    host: str


def host_name() -> str:
    """The name of this machine, as statements and records give it."""
    return socket.gethostname()


def statement(
    *,
    step: str,
    step_key: str,
    code: str,
    parameters: Mapping[str, Json],
    inputs: Mapping[str, str],
    artifacts: Mapping[str, str],
    values: Mapping[str, Json],
    execution: Execution,
    locks: Mapping[str, str],
) -> Json:
    """The Statement of a finished step. Mappings of digests are by name; `locks` are lock files by path.

    Subjects are the output artifacts and `values`: a step that ends in plain values attests those. Resolved
    dependencies are the inputs, the code (by content, and by commit where one is known), the lock files and the
    container's image; the internal parameters hold what may make a rerun differ: hardware and seeds.
    """
    subjects = [_resource(name, digest) for name, digest in sorted(artifacts.items())]
    subjects.append(_resource("values", digest_json(dict(values))))
    dependencies = [_resource(name, digest) for name, digest in sorted(inputs.items())]
    dependencies.append(_resource("code", code))
    dependencies.extend(_resource(name, digest) for name, digest in sorted(locks.items()))
    dependencies.extend(_surroundings())
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"step": step, "parameters": dict(parameters)},
                "internalParameters": {
                    "stepKey": step_key,
                    "host": execution.host,
                    "platform": platform.platform(),
                    "hardware": machine(),
                    "seeds": dict(_seeds(parameters)),
                },
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"python": sys.version.split()[0]}},
                "metadata": {
                    "invocationId": execution.invocation,
                    "startedOn": execution.started,
                    "finishedOn": execution.finished,
                },
            },
        },
    }


def check_statement(value: Json) -> Json:
    """`value` itself when it is an in-toto Statement v1 with SLSA provenance v1; else `IntegrityError`."""
    from google.protobuf.json_format import ParseDict, ParseError
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

    try:
        Statement.copy_from_pb(ParseDict(value, StatementMessage())).validate()
        if value["predicateType"] != PREDICATE_TYPE:
            raise ValueError(f"its predicate is {value['predicateType']!r}, not {PREDICATE_TYPE!r}")
        provenance = ParseDict(value["predicate"], Provenance())
        if not provenance.build_definition.build_type or not provenance.run_details.builder.id:
            raise ValueError("its predicate names no build type or no builder")
        for dependency in provenance.build_definition.resolved_dependencies:
            ResourceDescriptor.copy_from_pb(dependency).validate()
    except (ParseError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"This is not an in-toto Statement v1 with SLSA provenance v1: {error}.") from error
    return value


def _resource(name: str, digest: str) -> Json:
    return {"name": name, "digest": {"sha256": hex_of(digest)}}


def _surroundings() -> Iterator[Json]:
    """What a step ran with beside its inputs and locks: the sources' commit and the container's image."""
    revision = source_revision()
    if revision is not None:
        notes = {} if revision.dirty is None else {"annotations": {"dirty": revision.dirty}}
        yield {"name": "source", "digest": {"gitCommit": revision.commit}, **notes}
    image = image_digest()
    if image is not None:
        yield _resource("image", image)


def _seeds(parameters: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, Json]]:
    """Every parameter called `seed`, by its dotted place."""
    for name, value in sorted(parameters.items()):
        if isinstance(value, Mapping):
            yield from _seeds(value, f"{prefix}{name}.")
        elif name == "seed" or name.endswith("_seed"):
            yield prefix + name, value


def _key_names(key_ids: Iterable[str]) -> str:
    return ", ".join(f"key {key_id[:12]}" for key_id in key_ids) or "no key"
