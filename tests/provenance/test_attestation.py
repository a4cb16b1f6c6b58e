"""Statements and envelopes: the schema holds, a wrong key or one changed bit is told."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance import environment
from sluice.provenance.attestation import (
    Execution,
    Signer,
    check_statement,
    statement,
    verify_envelope,
)
from sluice.provenance.canonical import Json, digest_bytes, digest_json

CODE, INPUT, OUTPUT, LOCK = (digest_bytes(name) for name in (b"code", b"input", b"output", b"lock"))


def make_statement() -> Json:
    return statement(
        step="train",
        step_key=digest_bytes(b"key"),
        code=CODE,
        parameters={"learning_rate": 1e-3, "steps": 25, "recipe": {"seed": 7}},
        inputs={"dataset": INPUT},
        artifacts={"adapter": OUTPUT},
        values={"loss": 0.5},
        execution=Execution("run-1", "2026-01-02T03:04:05.000001Z", "2026-01-02T03:05:05.000001Z", "node-1"),
        locks={"requirements/main.lock": LOCK},
    )


def test_a_statement_is_in_toto_v1_with_slsa_provenance_v1() -> None:
    made = check_statement(make_statement())
    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert made["predicateType"] == "https://slsa.dev/provenance/v1"
    assert made["subject"] == [
        {"name": "adapter", "digest": {"sha256": OUTPUT.removeprefix("sha256:")}},
        {"name": "values", "digest": {"sha256": digest_json({"loss": 0.5}).removeprefix("sha256:")}},
    ]
    definition, details = made["predicate"]["buildDefinition"], made["predicate"]["runDetails"]
    assert definition["externalParameters"] == {
        "step": "train",
        "parameters": {"learning_rate": 1e-3, "steps": 25, "recipe": {"seed": 7}},
    }
    assert definition["internalParameters"]["host"] == "node-1"
    assert definition["internalParameters"]["platform"]
    assert definition["internalParameters"]["seeds"] == {"recipe.seed": 7}
    hardware = definition["internalParameters"]["hardware"]
    assert hardware["processor"]
    assert hardware["cores"] >= 1
    assert hardware["memoryBytes"] > 2**28
    known = [d for d in definition["resolvedDependencies"] if d["name"] not in ("source", "image")]
    assert [(d["name"], "sha256:" + d["digest"]["sha256"]) for d in known] == [
        ("dataset", INPUT),
        ("code", CODE),
        ("requirements/main.lock", LOCK),
    ]
    assert details["metadata"] == {
        "invocationId": "run-1",
        "startedOn": "2026-01-02T03:04:05.000001Z",
        "finishedOn": "2026-01-02T03:05:05.000001Z",
    }
    assert details["builder"]["id"]
    assert details["builder"]["version"]["python"].startswith("3.")


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    environment.source_revision.cache_clear()
    yield monkeypatch
    environment.source_revision.cache_clear()


def test_a_container_says_its_image_and_its_revision(surroundings: pytest.MonkeyPatch) -> None:
    commit, image = "0123456789abcdef" * 2 + "01234567", "9" * 64
    surroundings.setenv("SLUICE_SOURCE_REVISION", f"{commit}-dirty")
    surroundings.setenv("SLUICE_IMAGE_DIGEST", f"registry.example/sluice@sha256:{image}")
    found = check_statement(make_statement())["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert found[-2:] == [
        {"name": "source", "digest": {"gitCommit": commit}, "annotations": {"dirty": True}},
        {"name": "image", "digest": {"sha256": image}},
    ]
    surroundings.setenv("SLUICE_IMAGE_DIGEST", "latest")
    with pytest.raises(InputError, match="SLUICE_IMAGE_DIGEST = 'latest'"):
        make_statement()
    environment.source_revision.cache_clear()
    surroundings.setenv("SLUICE_SOURCE_REVISION", "main")
    with pytest.raises(InputError, match="SLUICE_SOURCE_REVISION = 'main'"):
        make_statement()


def test_the_commit_and_its_changes_come_from_git(tmp_path: Path, surroundings: pytest.MonkeyPatch) -> None:
    surroundings.delenv("SLUICE_SOURCE_REVISION", raising=False)
    root = tmp_path / "repository" / "sluice"
    root.mkdir(parents=True)
    assert environment.source_revision(root) is None
    (root / "__init__.py").write_text("")

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "..")
    environment.source_revision.cache_clear()
    assert environment.source_revision(root) is None
    git("add", ".")
    git("commit", "-q", "-m", "first")
    environment.source_revision.cache_clear()
    assert environment.source_revision(root) == environment.Revision(git("rev-parse", "HEAD"), dirty=False)
    (root / "__init__.py").write_text("changed = 1")
    environment.source_revision.cache_clear()
    assert environment.source_revision(root) == environment.Revision(git("rev-parse", "HEAD"), dirty=True)


STRANGER = """
import json, sys
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.json_format import Parse
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

envelope = Envelope.from_dict(json.load(open(sys.argv[1])))
key = SSlibKey.from_crypto(load_pem_public_key(open(sys.argv[2], "rb").read()))
envelope.verify([key], 1)
statement = Statement.copy_from_pb(Parse(envelope.payload, Message()))
statement.validate()
assert "sluice" not in sys.modules
print(statement.pb.predicate_type, statement.pb.subject[0].digest["sha256"])
"""


def test_a_stranger_verifies_with_public_tools_and_the_public_key_alone(signer: Signer, tmp_path: Path) -> None:
    envelope, key = tmp_path / "envelope.json", tmp_path / "key.pub"
    signed = signer.sign(make_statement())
    envelope.write_text(json.dumps(signed))
    key.write_text(signer.public_key.pem)
    command = [sys.executable, "-c", STRANGER, str(envelope), str(key)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["https://slsa.dev/provenance/v1", OUTPUT.removeprefix("sha256:")]
    signed["payload"] = base64.b64encode(base64.b64decode(signed["payload"]).replace(b"node-1", b"node-2")).decode()
    envelope.write_text(json.dumps(signed))
    changed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "VerificationError" in changed.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"subject": []},
        {"subject": [{"name": "a"}]},
        {"predicateType": "https://slsa.dev/provenance/v0.2"},
        {"predicate": {}},
        {"predicate": {"buildDefinition": {"madeUp": 1}}},
        {"predicate": {"runDetails": {"metadata": {"startedOn": "yesterday"}}}},
        {"extra": 1},
    ],
)
def test_what_is_no_such_statement_is_refused(change: Json) -> None:
    with pytest.raises(IntegrityError, match="not an in-toto Statement"):
        check_statement({**make_statement(), **change})


def test_a_signed_statement_comes_back(signer: Signer) -> None:
    envelope = signer.sign(make_statement())
    assert verify_envelope(envelope, [signer.public_key]) == make_statement()
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    # Verified by hand, as the protocol says: the signature is over the pre-authentication encoding.
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    payload = base64.b64decode(envelope["payload"])
    key = load_pem_public_key(signer.public_key.pem.encode())
    assert isinstance(key, EllipticCurvePublicKey)
    key.verify(
        base64.b64decode(envelope["signatures"][0]["sig"]),
        b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload),
        ECDSA(SHA256()),
    )


def test_an_unknown_key_is_named(signer: Signer, tmp_path: Path) -> None:
    other = Signer.load_or_create(tmp_path / "other.pem")
    with pytest.raises(IntegrityError, match="none of them trusted") as raised:
        verify_envelope(other.sign({"a": 1}), [signer.public_key])
    assert other.public_key.key_id[:12] in str(raised.value)
    assert signer.public_key.key_id[:12] in raised.value.hint
    with pytest.raises(IntegrityError, match="none of them trusted"):
        verify_envelope(signer.sign({"a": 1}), [])
    assert verify_envelope(other.sign({"a": 1}), [signer.public_key, other.public_key]) == {"a": 1}


def test_a_key_id_borrowed_from_a_trusted_key_does_not_help(signer: Signer, tmp_path: Path) -> None:
    forged = Signer.load_or_create(tmp_path / "forger.pem").sign({"a": 1})
    forged["signatures"][0]["keyid"] = signer.public_key.key_id
    with pytest.raises(IntegrityError, match="does not hold"):
        verify_envelope(forged, [signer.public_key])


def test_a_signature_for_one_type_does_not_hold_for_another(signer: Signer) -> None:
    envelope = signer.sign({"a": 1}, "application/vnd.other+json")
    with pytest.raises(IntegrityError, match=r"holds 'application/vnd\.other\+json'"):
        verify_envelope(envelope, [signer.public_key])
    with pytest.raises(IntegrityError, match="does not hold"):
        verify_envelope({**envelope, "payloadType": "application/vnd.in-toto+json"}, [signer.public_key])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 10**6))
def test_any_flipped_bit_of_the_payload_or_signature_is_found(signer: Signer, bit: int) -> None:
    envelope = signer.sign(make_statement())
    for field in ("payload", "sig"):
        changed = json.loads(json.dumps(envelope))
        holder = changed if field == "payload" else changed["signatures"][0]
        raw = bytearray(base64.b64decode(holder[field]))
        raw[(bit // 8) % len(raw)] ^= 1 << (bit % 8)
        holder[field] = base64.b64encode(bytes(raw)).decode()
        with pytest.raises(IntegrityError, match="does not hold"):
            verify_envelope(changed, [signer.public_key])


@pytest.mark.parametrize("envelope", [{}, [], None, "x", {"payload": "%", "payloadType": 1, "signatures": [{}]}])
def test_what_is_no_envelope_is_told(signer: Signer, envelope: Json) -> None:
    with pytest.raises(IntegrityError, match="not a DSSE envelope"):
        verify_envelope(envelope, [signer.public_key])
