"""What is said later on a version's page: one paragraph a subject, below the heading of its description."""

from __future__ import annotations

import re

from sluice.registry.description import LIMIT
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.versions import Version


def put_note(registry: MlflowRegistry, version: Version, subject: str, said: str) -> None:
    """Say `**<subject>: <said>`, in place of what was said of it before; nothing of it any more when `said` is empty.
    Again is harmless. A page without room for it, or without a description, stays as it is."""
    path, key = "model-versions/get", {"name": version.name, "version": str(version.number)}
    before = str(registry.get(path, **key)["model_version"].get("description", ""))
    note = re.compile(rf"\*\*{re.escape(subject)}: [^\n]*\n\n")
    heading, _, rest = note.sub("", before).partition("\n\n")
    text = "\n\n".join([heading, *([f"**{subject}: {said}"] if said else []), rest]) if heading else before
    if text != before and len(text) <= LIMIT:
        registry.patch("model-versions/update", **key, description=text)
