"""A small file replaced whole: a reader sees the old content or the new, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path

from sluice.infra.errors import UnavailableError


def replace_file(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write `text` beside `path`, flush it to disk and rename it over `path`. Raises `UnavailableError`."""
    staging = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise UnavailableError(
            f"The file {str(path)!r} cannot be written: {error.strerror or error}.",
            hint="Free some space, or make its folder writable.",
        ) from error
