"""Signatures of models: the public tool verifies them, and every changed, missing or added file is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.keys import Signer
from sluice.registry.model_signature import (
    find_signatures,
    sign_model,
    signer_of,
    store_signature,
    verify_model,
)
from tests.support.directory_store import DirectoryStore

SUBJECT, OTHER = digest_bytes(b"adapter"), digest_bytes(b"other")


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.load_or_create(tmp_path_factory.mktemp("keys") / "signing.pem")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_the_public_command_verifies_with_the_public_key_alone(model: Path, signer: Signer, tmp_path: Path) -> None:
    (tmp_path / "model.sig").write_bytes(sign_model(model, signer))
    (tmp_path / "key.pub").write_text(signer.public_key.pem)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(model)]
    command += ["--signature", str(tmp_path / "model.sig"), "--public_key", str(tmp_path / "key.pub")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stdout.lower()
    (model / "adapter_config.json").write_text("{ }")
    assert subprocess.run(command, capture_output=True, check=False, cwd=tmp_path).returncode != 0


def test_what_differs_is_named(model: Path, signer: Signer) -> None:
    signature = sign_model(model, signer)
    verify_model(model, signature, [signer.public_key])
    moved = model.rename(model.with_name("elsewhere"))
    verify_model(moved, signature, [signer.public_key])
    (moved / "chat_template.jinja").write_text("evil")
    with pytest.raises(IntegrityError, match=r"elsewhere is not what was signed.*chat_template\.jinja"):
        verify_model(moved, signature, [signer.public_key])
    (moved / "chat_template.jinja").rename(moved / ".gitattributes")
    with pytest.raises(IntegrityError, match=r"\.gitattributes"):
        verify_model(moved, signature, [signer.public_key])
    (moved / ".gitattributes").unlink()
    data = bytearray((moved / "adapter_model.safetensors").read_bytes())
    data[3000] ^= 1
    (moved / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        verify_model(moved, signature, [signer.public_key])
    (moved / "adapter_model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"Missing files.*adapter_model\.safetensors"):
        verify_model(moved, signature, [signer.public_key])


def test_a_file_that_the_signer_left_out_is_named(model: Path, signer: Signer, tmp_path: Path) -> None:
    from model_signing import hashing, signing

    (model / "extra.py").write_text("import os")
    ignoring = hashing.Config().set_ignored_paths(paths=["extra.py"])  # type: ignore[no-untyped-call]
    config = signing.Config().set_hashing_config(ignoring)  # type: ignore[no-untyped-call]
    assert signer.file is not None
    config.use_elliptic_key_signer(private_key=signer.file).sign(model, tmp_path / "partial.sig")
    with pytest.raises(IntegrityError, match=r"extra\.py is not covered"):
        verify_model(model, (tmp_path / "partial.sig").read_bytes(), [signer.public_key])


def test_another_key_or_another_signature_is_told(model: Path, signer: Signer, tmp_path: Path) -> None:
    other = Signer.load_or_create(tmp_path / "other.pem")
    signature = sign_model(model, other)
    with pytest.raises(IntegrityError, match="none of those that are trusted") as raised:
        verify_model(model, signature, [signer.public_key])
    assert signer.public_key.short in raised.value.hint
    assert signer_of(signature, [signer.public_key, other.public_key]) == other.public_key
    # The name of a trusted key on somebody else's signature.
    ours = sign_model(model, signer)
    hint = ours.split(b'"hint":')[1].split(b'"')[1]
    forged = signature.replace(signature.split(b'"hint":')[1].split(b'"')[1], hint)
    with pytest.raises(IntegrityError, match="is not what was signed"):
        verify_model(model, forged, [signer.public_key])
    for broken in (b"", b"{}", b"[]", ours[:-40]):
        with pytest.raises(IntegrityError):
            verify_model(model, broken, [signer.public_key])


def test_an_ed25519_key_is_sent_to_rotation(model: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path / "old.pem"
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(InputError, match="Ed25519") as raised:
        sign_model(model, Signer.load_or_create(path))
    assert "sluice keys rotate" in raised.value.hint


def test_signatures_are_found_from_the_model(object_store: DirectoryStore, artifacts: ArtifactStore) -> None:
    assert list(find_signatures(object_store, artifacts, SUBJECT)) == []
    for number in range(2):
        store_signature(
            object_store,
            artifacts,
            subject=SUBJECT,
            data=b"s%d" % number,
            signed="2026-01-01T00:00:00Z",
            statement=OTHER,
        )
    assert [one.data for one in find_signatures(object_store, artifacts, SUBJECT)] == [b"s0", b"s1"]
    taken = object_store.get(f"signatures/{SUBJECT.removeprefix('sha256:')}.json")
    object_store.put(f"signatures/{OTHER.removeprefix('sha256:')}.json", taken)
    with pytest.raises(IntegrityError, match="names the signature of"):
        list(find_signatures(object_store, artifacts, OTHER))


def test_a_signature_that_was_collected_gives_way_to_a_later_one(
    object_store: DirectoryStore, artifacts: ArtifactStore
) -> None:
    about = {"subject": SUBJECT, "signed": "2026-01-01T00:00:00Z", "statement": ""}
    first = store_signature(object_store, artifacts, data=b"first", **about)
    object_store.delete(f"manifests/sha256/{first.digest.removeprefix('sha256:')}")
    assert list(find_signatures(object_store, artifacts, SUBJECT)) == []
    second = store_signature(object_store, artifacts, data=b"second", **about)
    assert [one.data for one in find_signatures(object_store, artifacts, SUBJECT)] == [second.data]
