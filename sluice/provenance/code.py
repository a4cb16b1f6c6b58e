"""The code digest: which sources, and which locked libraries, a step ran with. Part of every step's key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import sluice
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, digest_bytes, digest_json

SOURCES = Path(sluice.__file__).parent
_PASSED_OVER = {"__pycache__"}


def code_digest(*packages: str, locks: tuple[str, ...] = ("main",), root: Path = SOURCES) -> str:
    """Digest of `code_sources`: the files of parts of Sluice, and the locks of the environments that run them."""
    return digest_json(code_sources(*packages, locks=locks, root=root))


def code_sources(*packages: str, locks: tuple[str, ...] = ("main",), root: Path = SOURCES) -> Json:
    """Digests of the files of parts of Sluice, by path, and of lock files, by name: `{"files": {}, "locks": {}}`.

    `packages` are names below `sluice`: a room (`"training"`) or one module of it (`"training.recipes"`). `locks`
    name files in `requirements/` beside the package (`"main"` is `requirements/main.lock`): a step that runs vLLM
    adds `"serve"`. A lock that is not there counts as absent, which is another digest than any lock. Every file of a
    room counts, templates too; byte code does not. Raises `InputError` for a name that is no part of Sluice.
    """
    if not packages:
        raise InputError("A code digest needs at least one package.", hint='For example code_digest("training").')
    files = {
        path.relative_to(root).as_posix(): digest_bytes(path.read_bytes())
        for package in packages
        for path in _files_of(package, root)
    }
    return {"files": files, "locks": {name: lock_digest(name, root=root) for name in locks}}


def lock_digest(name: str = "main", root: Path = SOURCES) -> str | None:
    """Digest of `requirements/<name>.lock` beside the package, or None when the package came without it."""
    path = root.parent / "requirements" / f"{name}.lock"
    return digest_bytes(path.read_bytes()) if path.is_file() else None


def lock_files(root: Path = SOURCES) -> dict[str, bytes]:
    """All lock files that the package came with, by path."""
    folder = root.parent / "requirements"
    return {f"requirements/{path.name}": path.read_bytes() for path in sorted(folder.glob("*.lock"))}


def lock_digests(root: Path = SOURCES) -> dict[str, str]:
    """Digests of `lock_files`, by path: the environments that a statement names."""
    return {path: digest_bytes(data) for path, data in lock_files(root).items()}


def _files_of(package: str, root: Path) -> Iterator[Path]:
    if not all(part.isidentifier() for part in package.split(".")):
        raise InputError(f"package = {package!r} is not a dotted name below sluice.")
    place = root.joinpath(*package.split("."))
    module = place.with_suffix(".py")
    if place.is_dir():
        for path in sorted(place.rglob("*")):
            if path.is_file() and not _PASSED_OVER & set(path.parts) and not path.name.startswith("."):
                yield path
    elif module.is_file():
        yield module
    else:
        raise InputError(f"package = {package!r} is no part of sluice: neither {place} nor {module} exists.")
