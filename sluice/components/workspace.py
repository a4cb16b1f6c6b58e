"""The installation as a component sees it: settings, stores, keys and ledger, wired once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.object_store import S3ObjectStore
from sluice.infra.settings import Settings, load_settings
from sluice.infra.transfer import Transfers
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.key_changes import trust_of
from sluice.provenance.keys import Signer
from sluice.provenance.ledger import Ledger
from sluice.provenance.steps import StepRunner
from sluice.provenance.trust import Trust, TrustPolicy, load_policy


@dataclass(frozen=True)
class Workspace:
    """Everything a step needs beside its inputs. Parts are made on first use: a command that needs none pays none."""

    SHOWN: ClassVar[bool] = True
    """Whether what is computed here is shown in MLflow."""

    settings: Settings

    @cached_property
    def objects(self) -> S3ObjectStore:
        if self.settings.profile == "local" and self.settings.object_store.endpoint_url is None:
            raise UnavailableError("The local object store has no address yet.", hint="Start the parts: `sluice up`.")
        return S3ObjectStore(self.settings.object_store, Transfers(journal=self.settings.home / "transfers"))

    @cached_property
    def artifacts(self) -> ArtifactStore:
        return ArtifactStore(self.objects, self.settings.home / "artifacts")

    @cached_property
    def signer(self) -> Signer:
        signing = self.settings.signing
        if signing.pkcs11_uri:
            return Signer.from_token(signing.pkcs11_uri, signing.pin.get_secret_value() if signing.pin else "")
        return Signer.load_or_create(self.settings.home / (signing.key_file or "keys/signing.pem"))

    @property
    def trusted(self) -> Path:
        """Folder of the public keys that are trusted besides the installation's own."""
        return self.settings.home / "keys" / "trusted"

    @cached_property
    def policy(self) -> TrustPolicy:
        file = self.settings.home / (self.settings.signing.trust_policy or "trust.yaml")
        if self.settings.signing.trust_policy and not file.is_file():
            raise InputError(f"Setting signing.trust_policy = {str(file)!r} is no file.")
        return load_policy(file, self.signer.public_key, self.trusted)

    @cached_property
    def trust(self) -> Trust:
        """Whose signatures count, as the ledger said when this was first asked for: a task is not changed midway."""
        return trust_of(self.policy, self.ledger, self.artifacts)

    @property
    def evaluation_cache(self) -> Path:
        """What models and judges answered once, by digest: not asked again anywhere in this home."""
        return self.settings.home / "evaluation" / "cache.sqlite"

    @cached_property
    def steps(self) -> StepRunner:
        return StepRunner(
            self.objects, self.artifacts, self.signer, self.settings.home / "work", trust=lambda: self.trust
        )

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.objects, self.settings.application, self.signer, policy=self.policy)

    def file(self, digest: str, path: str) -> bytes:
        """The verified bytes of one file of an artifact."""
        return self.artifacts.read_file(digest, path)

    def folder(self, digest: str) -> Path:
        """A verified local copy of an artifact; read only."""
        return self.artifacts.fetch(digest)


def open_workspace(settings: Settings | None = None) -> Workspace:
    """The workspace of these settings, or of the settings in force."""
    return Workspace(settings or load_settings())
