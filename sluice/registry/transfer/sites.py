"""Sites: who one is to others, whose keys one trusts, and where a site's servers are.

Trust is a folder: `<home>/keys/sites/<site>/*.pub`. A snapshot that says it is from site `a` has to be signed by a key
of that folder, so the name of a site means what the receiver says it means. Servers are named in a YAML file that holds
no secret, only the names of environment variables and files that do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from sluice.infra.errors import InputError, IntegrityError
from sluice.infra.home import writing
from sluice.infra.object_store import S3ObjectStore
from sluice.infra.settings import ObjectStoreSettings
from sluice.provenance.keys import PublicKey, Signer, read_public_key, read_trusted_keys
from sluice.provenance.trust import TrustedSigner, TrustPolicy, load_policy
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.transfer.snapshot import SITE_NAME, Snapshot, open_snapshot


@dataclass(frozen=True)
class TrustedSite:
    """A site whose snapshots are believed when one of its keys signed them."""

    name: str
    keys: tuple[PublicKey, ...]


def trusted_sites(home: Path) -> list[TrustedSite]:
    """Sites that this installation trusts, by name."""
    folder = home / "keys" / "sites"
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [TrustedSite(path.name, read_trusted_keys(path)) for path in found]


def trust_site(home: Path, name: str, key_file: Path) -> TrustedSite:
    """Believe what this key signs in the name of this site from now on. Raises `InputError`."""
    if not re.match(SITE_NAME, name):
        raise InputError(f"NAME = {name!r} is no name of a site.", hint="Small letters, digits and - (at most 41).")
    key = read_public_key(key_file)
    for site in trusted_sites(home):
        if site.name != name and any(known.key_id == key.key_id for known in site.keys):
            raise InputError(f"The key {key.key_id[:12]} is that of site {site.name!r} already.")
    folder = home / "keys" / "sites" / name
    with writing(home):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key.key_id[:16]}.pub").write_text(key.pem)
    return TrustedSite(name, read_trusted_keys(folder))


def site_of(envelope: bytes, sites: list[TrustedSite], place: str) -> tuple[Snapshot, TrustedSite]:
    """The snapshot in an envelope, and the trusted site that signed it.

    Raises `IntegrityError` when nobody trusted signed it, or another site than the one it names.
    """
    snapshot = open_snapshot(envelope, [key for site in sites for key in site.keys], place)
    for site in sites:
        if site.name == snapshot.site:
            open_snapshot(envelope, site.keys, place)
            return snapshot, site
    raise IntegrityError(
        f"{place} says it is from site {snapshot.site!r}, and is signed by a key of another one.",
        hint=f"`sluice sites trust {snapshot.site} KEY.pub` trusts that site, if its people gave you the key.",
    )


class StoreConfig(BaseModel):
    """An S3 endpoint; keys come from the environment variables or files that are named here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint_url: str | None = None
    region: str = "us-east-1"
    bucket: str = "sluice"
    access_key_env: str | None = None
    secret_key_env: str | None = None
    access_key_file: Path | None = None
    secret_key_file: Path | None = None


class MlflowConfig(BaseModel):
    """An MLflow server; its credentials as for the object store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tracking_uri: str
    username_env: str | None = None
    password_env: str | None = None
    token_env: str | None = None


class SiteConfig(BaseModel):
    """One site. `public_keys` signed its snapshots; `signing_key` is needed only where snapshots are made or noted, and
    `trust_policy` (its trust.yaml) with it where that site has one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    application: str = "assistant"
    object_store: StoreConfig
    mlflow: MlflowConfig
    public_keys: tuple[Path, ...] = Field(min_length=1)
    signing_key: Path | None = None
    trust_policy: Path | None = None
    accept_decisions_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A site's servers and keys, opened. `signer` is None where this process may not sign for it; `policy` says what
    its keys may sign in its ledger."""

    name: str
    application: str
    objects: S3ObjectStore
    registry: MlflowRegistry
    keys: tuple[PublicKey, ...]
    signer: Signer | None
    policy: TrustPolicy | None
    accept_decisions_of: tuple[str, ...]


def read_sites(path: Path) -> dict[str, SiteConfig]:
    """The sites of a YAML file by name. Raises `InputError` that names the field."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"The file of sites {str(path)!r} cannot be read: {error}.", hint="docs/sites.md shows one."
        ) from error
    sites = raw.get("sites") if isinstance(raw, dict) else None
    if not isinstance(sites, dict) or not sites:
        raise InputError(f"The file {str(path)!r} has no mapping `sites`.", hint="docs/sites.md shows one.")
    found = {}
    for name, content in sites.items():
        if not re.match(SITE_NAME, str(name)):
            raise InputError(f"sites.{name} in {path}: small letters, digits and - only (at most 41).")
        try:
            found[str(name)] = SiteConfig.model_validate(content)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(str(part) for part in ("sites", name, *problem["loc"]))
            hint = "Secrets stand in environment variables or files." if "key" in field else "docs/sites.md shows one."
            raise InputError(f"{field} in {path}: {problem['msg']}.", hint=hint) from error
    return found


def open_site(name: str, sites: Mapping[str, SiteConfig], folder: Path) -> Site:
    """A site of the file, opened; relative paths are below `folder`. Raises `InputError` naming what is missing."""
    if name not in sites:
        raise InputError(f"There is no site {name!r}.", hint=f"The file names {', '.join(sorted(sites))}.")
    config = sites[name]
    store, mlflow = config.object_store, config.mlflow
    secret = _secret(f"sites.{name}.object_store.secret_key", store.secret_key_env, store.secret_key_file, folder)
    objects = S3ObjectStore(
        ObjectStoreSettings(
            endpoint_url=store.endpoint_url,
            region=store.region,
            bucket=store.bucket,
            access_key=_secret(
                f"sites.{name}.object_store.access_key", store.access_key_env, store.access_key_file, folder
            ),
            secret_key=SecretStr(secret) if secret is not None else None,
        )
    )
    where = f"sites.{name}.mlflow"
    registry = MlflowRegistry(
        mlflow.tracking_uri,
        username=_secret(f"{where}.username", mlflow.username_env, None, folder),
        password=_secret(f"{where}.password", mlflow.password_env, None, folder),
        token=_secret(f"{where}.token", mlflow.token_env, None, folder),
    )
    keys = tuple(read_public_key(folder / path.expanduser()) for path in config.public_keys)
    signer = None
    if config.signing_key is not None:
        signing_key = folder / config.signing_key.expanduser()
        if not signing_key.is_file():
            raise InputError(f"sites.{name}.signing_key = {str(signing_key)!r} does not exist.")
        signer = Signer.load_or_create(signing_key)
        if signer.public_key.key_id not in {key.key_id for key in keys}:
            raise InputError(f"sites.{name}.signing_key is not the private half of one of its public_keys.")
    policy = _policy(name, config, keys, signer, folder)
    return Site(name, config.application, objects, registry, keys, signer, policy, config.accept_decisions_of)


def _policy(
    name: str, config: SiteConfig, keys: tuple[PublicKey, ...], signer: Signer | None, folder: Path
) -> TrustPolicy | None:
    """What that site's own installation goes by: an entry that it refuses would stand in the way of all later ones."""
    if signer is None:
        return None
    own = signer.public_key
    others = [key for key in keys if key.key_id != own.key_id]
    if config.trust_policy is None:
        return TrustPolicy.of((own, *others))
    file = folder / config.trust_policy.expanduser()
    if not file.is_file():
        raise InputError(f"sites.{name}.trust_policy = {str(file)!r} does not exist.")
    policy = load_policy(file, own, file.parent / "keys" / "trusted")
    known = {one.key.key_id for one in policy.signers}
    named = tuple(TrustedSigner(key.short, key) for key in others if key.key_id not in known)
    return replace(policy, signers=(*policy.signers, *named))


def _secret(field: str, variable: str | None, file: Path | None, folder: Path) -> str | None:
    if variable is not None:
        value = os.environ.get(variable)
        if not value:
            raise InputError(f"{field}: the environment variable {variable} is not set.")
        return value
    if file is not None:
        try:
            return (folder / file.expanduser()).read_text().strip()
        except OSError as error:
            raise InputError(f"{field}: the file {str(file)!r} cannot be read: {error.strerror}.") from error
    return None
