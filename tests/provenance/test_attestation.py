"""Statements and envelopes: the schema holds, a wrong key or one changed bit is told."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.attestation import (
    Execution,
    Signer,
    check_statement,
    read_public_key,
    read_trusted_keys,
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
        parameters={"learning_rate": 1e-3, "steps": 25},
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
        "parameters": {"learning_rate": 1e-3, "steps": 25},
    }
    assert definition["internalParameters"]["host"] == "node-1"
    assert definition["internalParameters"]["platform"]
    assert [(d["name"], "sha256:" + d["digest"]["sha256"]) for d in definition["resolvedDependencies"]] == [
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
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    payload = base64.b64decode(envelope["payload"])
    key = load_pem_public_key(signer.public_key.pem.encode())
    assert isinstance(key, Ed25519PublicKey)
    key.verify(
        base64.b64decode(envelope["signatures"][0]["sig"]),
        b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload),
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


def test_the_key_file_is_private_and_lasting(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signer.pem"
    first = Signer.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Signer.load_or_create(path).public_key == first.public_key
    assert read_public_key(tmp_path / "keys" / "signer.pem.pub") == first.public_key
    assert read_trusted_keys(tmp_path / "keys") == (first.public_key,)
    assert read_trusted_keys(tmp_path / "nowhere") == ()


def test_racing_first_uses_end_with_one_key(tmp_path: Path) -> None:
    path = tmp_path / "signer.pem"
    with ThreadPoolExecutor(8) as pool:
        signers = list(pool.map(lambda _: Signer.load_or_create(path), range(16)))
    assert len({signer.public_key.key_id for signer in signers}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["signer.pem", "signer.pem.pub"]


def test_a_key_that_others_may_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "signer.pem"
    Signer.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(InputError, match="can be read by others"):
        Signer.load_or_create(path)
    path.chmod(0o600)
    path.write_text("not a key")
    with pytest.raises(InputError, match="cannot be read"):
        Signer.load_or_create(path)
    (tmp_path / "bad.pub").write_text("not a key")
    with pytest.raises(InputError, match=r"bad\.pub cannot be read"):
        read_public_key(tmp_path / "bad.pub")
