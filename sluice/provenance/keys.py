"""Keys: the private one that signs (a file, or a token behind PKCS#11), and the public ones that others check with.

New keys are ECDSA P-256, so that one key signs statements, ledger entries and models (model-signing takes elliptic
curves only). Ed25519 keys of older installations go on signing statements and entries.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote_to_bytes

from sluice.infra.errors import InputError, UnavailableError
from sluice.provenance.canonical import Json, canonical_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from securesystemslib.signer import Signer as SecureSystemsSigner

    PrivateKey = EllipticCurvePrivateKey | Ed25519PrivateKey
    AnyPublicKey = EllipticCurvePublicKey | Ed25519PublicKey

IN_TOTO_PAYLOAD = "application/vnd.in-toto+json"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
"""What both securesystemslib and model-signing sign with."""


@dataclass(frozen=True)
class PublicKey:
    """A public key: PEM text, and its id as in the envelope's `keyid`."""

    key_id: str
    pem: str

    @property
    def short(self) -> str:
        """The first 12 digits of the id: for screens and file names."""
        return self.key_id[:12]


class Signer:
    """Signs envelopes with one private key. `file` is where it lies; None for a key that never leaves its token."""

    def __init__(self, signer: SecureSystemsSigner, public_key: PublicKey, file: Path | None = None) -> None:
        self._signer = signer
        self.public_key = public_key
        self.file = file

    @classmethod
    def load_or_create(cls, path: Path) -> Signer:
        """The signer of the PEM file `path`, made on first use with mode 0600; its public half lies in `<path>.pub`.

        Two processes that race end with the same key. Raises `InputError` for a file that is no such key or that
        others than its owner and group may read (a Kubernetes secret is given to a pod by its group).
        """
        from securesystemslib.signer import CryptoSigner

        if not path.exists():
            create_key(path)
        if path.stat().st_mode & 0o007:
            raise InputError(f"The signing key {path} can be read by others.", hint=f"chmod 600 {path}")
        private_key = _read_private_key(path)
        signer = cls(CryptoSigner(private_key), _public_key(private_key.public_key()), path)
        public = path.with_name(path.name + ".pub")
        if not public.exists():
            # A mounted secret is read-only; whoever made that key has handed out its public half.
            with contextlib.suppress(OSError):
                write_once(public, signer.public_key.pem.encode(), 0o644)
        return signer

    @classmethod
    def from_token(cls, uri: str, pin: str) -> Signer:
        """The signer of an elliptic-curve key on a PKCS#11 token, named by an RFC 7512 URI with `token` and `id`.

        Raises `UnavailableError` when the token, its module or the package for it is not there. Written against the
        library's documented interface; no token has signed with it yet.
        """
        from securesystemslib.exceptions import UnsupportedLibraryError
        from securesystemslib.signer import HSMSigner

        attributes = token_attributes(uri)
        module = attributes.get("module-path")
        if module:
            os.environ["PYKCS11LIB"] = module.decode()
        number = int.from_bytes(attributes["id"], "big")
        try:
            place, key = HSMSigner.import_(number, attributes["token"].decode(), lambda _: pin)
            signer = HSMSigner.from_priv_key_uri(place, key, lambda _: pin)
        except (UnsupportedLibraryError, ValueError, OSError) as error:
            raise UnavailableError(
                f"The signing key signing.pkcs11_uri = {_public_part(uri)!r} cannot be used: {error}.",
                hint="Install python-pkcs11, name the token's module (module-path=...), and set SLUICE_SIGNING__PIN.",
            ) from error
        return cls(signer, PublicKey(str(key.keyid), str(key.keyval["public"])))

    def sign(self, statement: Json, payload_type: str = IN_TOTO_PAYLOAD) -> Json:
        """The DSSE envelope, as JSON, over the statement's canonical bytes."""
        from securesystemslib.dsse import Envelope

        envelope = Envelope(canonical_json(statement), payload_type, {})
        envelope.sign(self._signer)
        return envelope.to_dict()


def token_attributes(uri: str) -> dict[str, bytes]:
    """The parts of an RFC 7512 URI, decoded. Raises `InputError` when it names no token or no key id."""
    scheme, _, rest = uri.partition(":")
    path, _, query = rest.partition("?")
    found = {name: unquote_to_bytes(value) for name, _, value in (part.partition("=") for part in path.split(";"))}
    found |= {name: value.encode() for name, value in parse_qsl(query)}
    if scheme != "pkcs11" or not found.get("token") or not found.get("id"):
        raise InputError(
            f"Setting signing.pkcs11_uri = {_public_part(uri)!r} names no key on a token.",
            hint="For example pkcs11:token=sluice;id=%02?module-path=/usr/lib/softhsm/libsofthsm2.so",
        )
    return found


def _public_part(uri: str) -> str:
    """The URI without its query, where somebody may have put the PIN."""
    return uri.partition("?")[0]


def read_public_key(path: Path) -> PublicKey:
    """The public key in a PEM file. Raises `InputError` when it holds none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"The public key {path} cannot be read: {error}.") from error
    return parse_public_key(data, str(path))


def parse_public_key(data: bytes, source: str) -> PublicKey:
    """The public key in PEM text; `source` stands in the message. Raises `InputError`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"The public key {source} cannot be read: {error}.") from error
    if isinstance(key, Ed25519PublicKey) or (isinstance(key, EllipticCurvePublicKey) and key.curve.name in CURVES):
        return _public_key(key)
    raise InputError(f"The public key {source} is neither an ECDSA key ({', '.join(CURVES)}) nor an Ed25519 key.")


def read_trusted_keys(folder: Path) -> tuple[PublicKey, ...]:
    """Every `*.pub` file of a folder, in name order; empty when the folder is not there."""
    return tuple(read_public_key(path) for path in sorted(folder.glob("*.pub")))


def create_key(path: Path) -> None:
    """Make a new private key, readable by its owner only. A file that is there already stays."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path.parent.mkdir(parents=True, exist_ok=True)
    private_key = ec.generate_private_key(ec.SECP256R1())
    write_once(path, private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)


def write_once(path: Path, data: bytes, mode: int) -> None:
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


def _public_key(key: AnyPublicKey) -> PublicKey:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from securesystemslib.signer import SSlibKey

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return PublicKey(str(SSlibKey.from_crypto(key).keyid), pem)


def _read_private_key(path: Path) -> PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"The signing key {path} cannot be read: {error}.") from error
    if isinstance(key, Ed25519PrivateKey) or (isinstance(key, EllipticCurvePrivateKey) and key.curve.name in CURVES):
        return key
    raise InputError(f"The signing key {path} is neither an ECDSA key ({', '.join(CURVES)}) nor an Ed25519 key.")
