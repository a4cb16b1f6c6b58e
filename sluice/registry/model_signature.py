"""Signatures of models in the OpenSSF format (model signing 1.1), which public tools verify without Sluice.

    python -m model_signing verify key FOLDER --signature model.sig --public_key KEY.pub

A signature covers every file of the folder by its hash, in a Sigstore bundle. It is stored as an artifact of kind
`signature` and found from the model's digest: `signatures/<hex>.json` names it, written once; a second one (after a key
was revoked) lies beside it as `signatures/<hex>.1.json`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.infra.object_store import ObjectExists, ObjectMissing, ObjectStore
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import canonical_json, hex_of, require_digest
from sluice.provenance.keys import PublicKey, Signer

if TYPE_CHECKING:
    from sluice.infra.settings import SigningSettings

SIGNATURE_FILE = "model.sig"


@dataclass(frozen=True)
class ModelSignature:
    """A stored signature: artifact digest, the bundle's bytes, the model, when it was made, and the training's
    statement (digest of the stored envelope; empty for a model that was not trained here)."""

    digest: str
    data: bytes
    subject: str
    signed: str
    statement: str


def sign_model(folder: Path, signer: Signer, settings: SigningSettings | None = None) -> bytes:
    """The signature (JSON of a Sigstore bundle) over all files of `folder`.

    By the key file; or, as the settings say, by the token or through Sigstore (neither was ever run). Raises
    `InputError` for an Ed25519 key, which the format does not know, `UnavailableError` when signing does not work out.
    """
    config = _library().signing.Config().set_hashing_config(_hashing(folder))
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / SIGNATURE_FILE
        try:
            if settings is not None and settings.sigstore:
                config.use_sigstore_signer(use_ambient_credentials=True, trust_config=settings.sigstore_trust_config)
            elif signer.file is not None:
                _require_elliptic(signer.public_key, str(signer.file))
                config.use_elliptic_key_signer(private_key=signer.file)
            elif settings is not None and settings.pkcs11_uri:
                config.use_pkcs11_signer(pkcs11_uri=_with_pin(settings))
            config.sign(folder, target)
        except InputError:
            raise
        except Exception as error:
            # Token, network, identity provider: the library has no common class for what goes wrong.
            raise UnavailableError(f"The model {folder.name} cannot be signed: {error!r}.") from error
        return target.read_bytes()


def verify_model(
    folder: Path, signature: bytes, public_keys: Iterable[PublicKey], settings: SigningSettings | None = None
) -> None:
    """Nothing, when one of `public_keys` (or, with Sigstore in the settings, the identity there) signed this folder.

    Raises `IntegrityError` naming the file that is changed, missing or too many, or saying whose signature it is.
    """
    library = _library()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / SIGNATURE_FILE
        place.write_bytes(signature)
        config = library.verifying.Config().set_hashing_config(_hashing(folder))
        if settings is not None and settings.sigstore:
            if not (settings.sigstore_identity and settings.sigstore_issuer):
                raise InputError("Settings signing.sigstore_identity and sigstore_issuer say whose signature counts.")
            config.use_sigstore_verifier(
                identity=settings.sigstore_identity,
                oidc_issuer=settings.sigstore_issuer,
                trust_config=settings.sigstore_trust_config,
            )
        else:
            key = signer_of(signature, public_keys)
            public = Path(scratch) / "key.pub"
            public.write_text(key.pem)
            config.use_elliptic_key_verifier(public_key=public)
        try:
            config.verify(folder, place)
            _require_covered(folder, signature)
        except Exception as error:
            detail = str(error) or "the signature does not hold, it was changed"
            raise IntegrityError(f"The model {folder.name} is not what was signed: {detail}.") from error


def signer_of(signature: bytes, public_keys: Iterable[PublicKey]) -> PublicKey:
    """Which of the keys a signature says it is by; that it is, only verification shows. Raises `IntegrityError`."""
    keys = {hashlib.sha256(key.pem.encode()).hexdigest(): key for key in public_keys}
    try:
        bundle = json.loads(signature)
        hint = str(bundle["verificationMaterial"]["publicKey"]["hint"])
        # Some writers give the hash in base64, as the bundle's specification has it for bytes.
        found = keys.get(hint) or keys.get(base64.b64decode(hint, validate=False).hex())
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise IntegrityError(f"This is no signature of a model by a key: {error!r}.") from error
    if found is None:
        names = ", ".join(f"key {key.short}" for key in keys.values()) or "no key"
        raise IntegrityError(
            f"The model is signed by a key with the SHA-256 {hint[:12]}, none of those that are trusted.",
            hint=f"Trusted are {names}; add the signer's .pub file to keys/trusted to trust it.",
        )
    return found


def store_signature(
    objects: ObjectStore, artifacts: ArtifactStore, *, subject: str, data: bytes, signed: str, statement: str
) -> ModelSignature:
    """Keep a model's signature where `find_signatures` finds it. `signed` is an ISO 8601 time."""
    metadata = {"subject": require_digest(subject, "subject"), "signed": signed, "statement": statement}
    stored = artifacts.put_files({SIGNATURE_FILE: data}, "signature", metadata)
    edition = 0
    while True:
        try:
            objects.put(_place(subject, edition), canonical_json({"signature": stored.digest}), if_absent=True)
            return ModelSignature(stored.digest, data, subject, signed, statement)
        except ObjectExists:
            edition += 1


def find_signatures(objects: ObjectStore, artifacts: ArtifactStore, subject: str) -> Iterator[ModelSignature]:
    """The stored signatures of a model, the first one first. Raises `IntegrityError` for one of another model."""
    edition = 0
    while True:
        place = _place(subject, edition)
        try:
            digest = require_digest(str(json.loads(objects.get(place))["signature"]), place)
        except ObjectMissing:
            return
        except (ValueError, KeyError, TypeError, InputError) as error:
            raise IntegrityError(f"The object {place!r} names no signature: {error!r}.") from error
        edition += 1
        try:
            metadata = artifacts.manifest(digest).metadata
            data = artifacts.read_file(digest, SIGNATURE_FILE)
        except ObjectMissing:
            # Collected with its model, which was made again since: a later edition may be there.
            continue
        if metadata.get("subject") != subject:
            raise IntegrityError(f"The object {place!r} names the signature of {metadata.get('subject')}.")
        signed, statement = str(metadata.get("signed")), str(metadata.get("statement", ""))
        yield ModelSignature(digest, data, subject, signed, statement)


def _require_covered(folder: Path, signature: bytes) -> None:
    """A signer may leave files out; a file that nobody signed must not come along. Raises `ValueError` naming it."""
    payload = json.loads(base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"]))
    signed = {resource["name"] for resource in payload["predicate"]["resources"]}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in signed:
            raise ValueError(f"{name} is not covered by the signature")


def _place(subject: str, edition: int) -> str:
    return f"signatures/{hex_of(subject)}{f'.{edition}' if edition else ''}.json"


def _library() -> Any:
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise UnavailableError(
            f"The package model-signing cannot be imported: {error}.", hint="`make setup` installs what is locked."
        ) from error
    return model_signing


def _hashing(folder: Path) -> Any:
    # The library leaves .git and the like out by default. Here every file counts, and a link is refused.
    hashing = _library().hashing.Config()
    return hashing.set_ignored_paths(paths=[], ignore_git_paths=False).use_file_serialization(allow_symlinks=False)


def _require_elliptic(key: PublicKey, place: str) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if not isinstance(load_pem_public_key(key.pem.encode()), EllipticCurvePublicKey):
        raise InputError(
            f"The signing key {place} is an Ed25519 key, and signatures of models need an elliptic-curve key.",
            hint="`sluice keys rotate` makes one; the old key stays trusted.",
        )


def _with_pin(settings: SigningSettings) -> str:
    uri = settings.pkcs11_uri or ""
    if settings.pin is None:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}pin-value={settings.pin.get_secret_value()}"
