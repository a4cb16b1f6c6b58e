"""Secrets come from the environment, from files that only their owner reads, or from the cluster's secrets; no value
that we know as one may travel as a parameter, which ends in logs, records and MLflow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from sluice.infra.errors import InputError
from sluice.infra.settings import Settings

_NAMES = re.compile(r"(SECRET|PASSWORD|TOKEN|PRIVATE_KEY|API_KEY|_PIN$)", re.IGNORECASE)
_OWNERS = ("SLUICE_", "AWS_", "MLFLOW_", "LANGFUSE_")
_LEAST = 8
"""Shorter values are no secrets that could be told from plain words."""


def known_secrets(settings: Settings) -> dict[str, str]:
    """The secrets that this process knows, by where they come from."""
    found = {
        f"environment variable {name}": value
        for name, value in os.environ.items()
        if name.startswith(_OWNERS) and _NAMES.search(name)
    }
    if settings.object_store.secret_key is not None:
        found["setting object_store.secret_key"] = settings.object_store.secret_key.get_secret_value()
    if settings.mlflow.webhook_secret is not None:
        found["setting mlflow.webhook_secret"] = settings.mlflow.webhook_secret.get_secret_value()
    if settings.signing.pin is not None:
        found["setting signing.pin"] = settings.signing.pin.get_secret_value()
    for name in ("url", "secret", "authorization"):
        if (value := getattr(settings.events, name)) is not None:
            found[f"setting events.{name}"] = value.get_secret_value()
    return {source: value for source, value in found.items() if len(value) >= _LEAST}


def refuse_secrets(settings: Settings, texts: Iterable[str]) -> None:
    """Refuse parameters that hold a secret. Raises `InputError` that names the parameter and never the value."""
    known = known_secrets(settings)
    for text in texts:
        name = text.partition("=")[0]
        source = next((source for source, value in known.items() if value in text), None)
        if source is None and "PRIVATE KEY-----" in text:
            source = "a private key"
        if source is not None:
            shown = "a parameter" if "=" not in text or (source in known and known[source] in name) else name
            raise InputError(
                f"--param {shown} holds a secret ({source}): parameters end in logs, records and MLflow.",
                hint="Steps find secrets in their environment, in files or in the cluster's secrets.",
            )
