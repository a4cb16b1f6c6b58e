"""Signed statements: in-toto Statement v1 with a SLSA provenance v1 predicate, in a DSSE envelope signed by Ed25519.

Sources: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance,
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md (what is signed is the pre-authentication encoding of
payload type and payload, so a signature for one type never holds for another).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.canonical import Json, canonical_json, digest_json, hex_of

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:sluice:step:v1"
BUILDER = "urn:sluice:step-runner:v1"
IN_TOTO_PAYLOAD = "application/vnd.in-toto+json"


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key: PEM text, and its id as in the envelope's `keyid`."""

    key_id: str
    pem: str


class Signer:
    """Signs envelopes with one private key, which lives in a file that only its owner can read."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
        from securesystemslib.signer import CryptoSigner

        self._signer = CryptoSigner(private_key)
        pem = private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        self.public_key = PublicKey(str(self._signer.public_key.keyid), pem)

    @classmethod
    def load_or_create(cls, path: Path) -> Signer:
        """The signer of the PEM file `path`, made on first use with mode 0600; its public half lies in `<path>.pub`.

        Two processes that race end with the same key. Raises `InputError` for a file that is no Ed25519 key or that
        others than its owner and group may read (a Kubernetes secret is given to a pod by its group).
        """
        if not path.exists():
            _create_key(path)
        if path.stat().st_mode & 0o007:
            raise InputError(f"The signing key {path} can be read by others.", hint=f"chmod 600 {path}")
        signer = cls(_read_private_key(path))
        public = path.with_name(path.name + ".pub")
        if not public.exists():
            # A mounted secret is read-only; whoever made that key has handed out its public half.
            with contextlib.suppress(OSError):
                _write_atomically(public, signer.public_key.pem.encode(), 0o644)
        return signer

    def sign(self, statement: Json, payload_type: str = IN_TOTO_PAYLOAD) -> Json:
        """The DSSE envelope, as JSON, over the statement's canonical bytes."""
        from securesystemslib.dsse import Envelope

        envelope = Envelope(canonical_json(statement), payload_type, {})
        envelope.sign(self._signer)
        return envelope.to_dict()


def read_public_key(path: Path) -> PublicKey:
    """The public key in a PEM file. Raises `InputError` when it holds none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    try:
        data = path.read_bytes()
        key = load_pem_public_key(data)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"The public key {path} cannot be read: {error}.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"The public key {path} is not an Ed25519 key.")
    return PublicKey(str(SSlibKey.from_crypto(key).keyid), data.decode())


def read_trusted_keys(folder: Path) -> tuple[PublicKey, ...]:
    """The trusted set: every `*.pub` file of a folder, in name order; empty when the folder is not there."""
    return tuple(read_public_key(path) for path in sorted(folder.glob("*.pub")))


def verify_envelope(envelope: Json, public_keys: Iterable[PublicKey], payload_type: str = IN_TOTO_PAYLOAD) -> Json:
    """The statement inside, after its signature by one of `public_keys` was verified.

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
    try:
        parsed.verify(keys, threshold=1)
        return json.loads(parsed.payload)
    except VerificationError as error:
        raise IntegrityError(f"The signature by {_key_names(found)} does not hold: the payload was changed.") from error
    except ValueError as error:
        raise IntegrityError(f"The envelope's payload is not JSON: {error}.") from error


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

    Subjects are the output artifacts and `values`: a step that ends in plain values attests those.
    """
    subjects = [_resource(name, digest) for name, digest in sorted(artifacts.items())]
    subjects.append(_resource("values", digest_json(dict(values))))
    dependencies = [_resource(name, digest) for name, digest in sorted(inputs.items())]
    dependencies.append(_resource("code", code))
    dependencies.extend(_resource(name, digest) for name, digest in sorted(locks.items()))
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"step": step, "parameters": dict(parameters)},
                "internalParameters": {"stepKey": step_key, "host": execution.host, "platform": platform.platform()},
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
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

    try:
        Statement.copy_from_pb(ParseDict(value, StatementMessage())).validate()
        if value["predicateType"] != PREDICATE_TYPE:
            raise ValueError(f"its predicate is {value['predicateType']!r}, not {PREDICATE_TYPE!r}")
        ParseDict(value["predicate"], Provenance())
    except (ParseError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"This is not an in-toto Statement v1 with SLSA provenance v1: {error}.") from error
    return value


def _resource(name: str, digest: str) -> Json:
    return {"name": name, "digest": {"sha256": hex_of(digest)}}


def _key_names(key_ids: Iterable[str]) -> str:
    return ", ".join(f"key {key_id[:12]}" for key_id in key_ids) or "no key"


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"The signing key {path} cannot be read: {error}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"The signing key {path} is not an Ed25519 key.")
    return key


def _create_key(path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path.parent.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write_atomically(path, pem, 0o600)


def _write_atomically(path: Path, data: bytes, mode: int) -> None:
    """Create `path` whole or not at all; the first of two racing writers wins and the other keeps its content."""
    handle, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(staging, path)
        except FileExistsError:
            pass
    finally:
        os.unlink(staging)
