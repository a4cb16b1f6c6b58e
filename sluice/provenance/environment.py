"""What a step ran on and with: the machine and the source revision, for its statement. Read in milliseconds."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import sluice
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, require_digest

IMAGE_DIGEST_VARIABLE = "SLUICE_IMAGE_DIGEST"
REVISION_VARIABLE = "SLUICE_SOURCE_REVISION"
"""A container has no repository: whoever builds the image sets the revision, whoever starts it the image's digest."""

_REVISION = re.compile(r"^[0-9a-f]{40}([0-9a-f]{24})?$")


@dataclass(frozen=True)
class Revision:
    """A git commit, and whether the tree held changes that it does not (None: nobody can tell any more)."""

    commit: str
    dirty: bool | None


@lru_cache(maxsize=1)
def machine() -> Json:
    """Processor, cores this process may use, memory in bytes, NVIDIA devices and their driver."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, Json] = {
        "processor": _first(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo")) or platform.processor(),
        "architecture": platform.machine(),
        "cores": cores,
        "memoryBytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    # The driver's own files: no library is loaded, no device is touched.
    devices = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    if devices:
        found["accelerators"] = [_first(r"Model:\s*(.+)", device) or "unknown" for device in devices]
        found["acceleratorDriver"] = _first(r"Kernel Module.*?\s(\d[\d.]+)", Path("/proc/driver/nvidia/version")) or ""
    return found


@lru_cache(maxsize=1)
def source_revision(root: Path = Path(sluice.__file__).parent) -> Revision | None:
    """The commit of the sources: from `SLUICE_SOURCE_REVISION`, else from git; None when neither knows.

    Raises `InputError` when the variable holds no commit.
    """
    given = os.environ.get(REVISION_VARIABLE, "")
    if given:
        commit, _, mark = given.partition("-")
        if not _REVISION.match(commit) or mark not in ("", "dirty"):
            raise InputError(f"{REVISION_VARIABLE} = {given!r} is no git commit (40 or 64 hex digits, then -dirty).")
        return Revision(commit, mark == "dirty")
    head = _git(root, "rev-parse", "HEAD")
    if head is None or not _REVISION.match(head):
        return None
    # An installed package inside somebody's repository is not a revision of that repository.
    if not _git(root, "ls-files", "__init__.py"):
        return None
    changed = _git(root, "status", "--porcelain", "--", ".", "../requirements")
    return Revision(head, None if changed is None else bool(changed))


def image_digest() -> str | None:
    """Digest of the container's image, when whoever started it says so in `SLUICE_IMAGE_DIGEST`."""
    given = os.environ.get(IMAGE_DIGEST_VARIABLE, "")
    return require_digest(given.rpartition("@")[2], IMAGE_DIGEST_VARIABLE) if given else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            # Another repository's variables (in a git hook) would answer for this one.
            env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _first(pattern: str, path: Path) -> str | None:
    try:
        found = re.search(pattern, path.read_text(errors="replace"))
    except OSError:
        return None
    return " ".join(found[1].split()) if found else None
