"""Keys: private, lasting, of a kind that signs everything; what is none is told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sluice.infra.errors import InputError, UnavailableError
from sluice.provenance.attestation import verify_envelope
from sluice.provenance.keys import Signer, read_public_key, read_trusted_keys, token_attributes

TOKEN = "pkcs11:token=sluice%20keys;id=%02?module-path=/usr/lib/softhsm/libsofthsm2.so"


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


def test_an_ed25519_key_of_an_older_installation_goes_on_signing(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path / "signer.pem"
    path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    signer = Signer.load_or_create(path)
    assert verify_envelope(signer.sign({"a": 1}), [read_public_key(tmp_path / "signer.pem.pub")]) == {"a": 1}


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private = rsa.generate_private_key(65537, 2048)
    path = tmp_path / "signer.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(InputError, match="neither an ECDSA key"):
        Signer.load_or_create(path)
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "rsa.pub").write_bytes(public)
    with pytest.raises(InputError, match=r"rsa\.pub is neither"):
        read_public_key(tmp_path / "rsa.pub")


def test_a_token_is_named_by_its_uri() -> None:
    assert token_attributes(TOKEN) == {
        "token": b"sluice keys",
        "id": b"\x02",
        "module-path": b"/usr/lib/softhsm/libsofthsm2.so",
    }
    for wrong in ("pkcs11:id=%02", "pkcs11:token=a", "/etc/key.pem", ""):
        with pytest.raises(InputError, match="names no key on a token"):
            token_attributes(wrong)


def test_a_token_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKCS11LIB", "")
    with pytest.raises(UnavailableError, match=r"signing\.pkcs11_uri = 'pkcs11:token=sluice"):
        Signer.from_token(TOKEN, "1234")
    with pytest.raises(InputError) as raised:
        token_attributes("pkcs11:token=a?pin-value=4321")
    assert "4321" not in str(raised.value)
