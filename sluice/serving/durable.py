"""A small file replaced whole: a reader sees the old content or the new, also after a power cut.

For the few writes that must succeed on a full disk too, `reserve` keeps space aside.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from sluice.infra.errors import UnavailableError

_RESERVED = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT)


def replace_file(path: Path, text: str, *, mode: int = 0o644, reserved: bool = False) -> None:
    """Write `text` beside `path`, flush it to disk and rename it over `path`. Raises `UnavailableError`.

    `reserved`: on a full disk, use what `reserve` kept aside.
    """
    staging = path.parent / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(staging, text, mode, os.O_CREAT | os.O_TRUNC)
        except OSError as error:
            staging.unlink(missing_ok=True)
            if not reserved or error.errno not in _FULL or not _spare(path).exists():
                raise
            # Written over blocks that are ours already; its end is cut off, so it stays short of nothing.
            staging = _spare(path)
            _write(staging, text, mode, 0)
        staging.replace(path)
    except OSError as error:
        if staging != _spare(path):
            staging.unlink(missing_ok=True)
        raise UnavailableError(
            f"The file {str(path)!r} cannot be written: {error.strerror or error}.",
            hint="Free some space, or make its folder writable.",
        ) from error


def reserve(path: Path) -> None:
    """Keep 64 KiB of the disk aside for one `replace_file` of `path`. Without space: nothing is kept, and no error,
    since this must not stop the change that was just made."""
    spare = _spare(path)
    if spare.exists():
        return
    with suppress(OSError):
        descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, _RESERVED)
        except OSError:
            spare.unlink()
            raise
        finally:
            os.close(descriptor)


def _spare(path: Path) -> Path:
    return path.parent / f".{path.name}.spare"


def _write(file: Path, text: str, mode: int, flags: int) -> None:
    data = text.encode()
    descriptor = os.open(file, os.O_WRONLY | flags, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        stream.truncate(len(data))
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
