"""Files in the folder that holds an installation's state (`settings.home`): written whole, for their owner only."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sluice.infra.errors import UnavailableError

_LEAST_FREE = 64 * 2**20


def write_private(path: Path, content: str) -> None:
    """Write a file for its owner only; a reader sees the old content or the new one, never half of it."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    staging.unlink(missing_ok=True)
    handle = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(path)


def publish_once(staging: Path, path: Path) -> bool:
    """Give a finished file its name unless the name is taken; True when it was free. `staging` is gone afterwards."""
    try:
        os.link(staging, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links. Losing the race here is possible, losing the file is not.
        if path.exists():
            return False
        staging.replace(path)
        return True
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def writing(home: Path) -> Iterator[None]:
    """Turn what the file system refuses into a sentence. Raises `UnavailableError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(home) from error
        raise UnavailableError(
            f"The folder home = {str(home)!r} cannot be written: {error.strerror or error} ({error.filename}).",
            hint="Give this user the right to write there, or set SLUICE_HOME to another folder.",
        ) from error


def require_free_disk(home: Path) -> None:
    """Refuse to start on a full disk, where every part would fail in a way of its own. Raises `UnavailableError`."""
    folder = home
    while not folder.exists():
        folder = folder.parent
    if shutil.disk_usage(folder).free < _LEAST_FREE:
        raise disk_full(home)


def disk_full(home: Path) -> UnavailableError:
    return UnavailableError(
        f"The disk of home = {str(home)!r} is full.",
        hint="Free some space there (`sluice doctor` says how much is needed), or set SLUICE_HOME to another disk.",
    )
