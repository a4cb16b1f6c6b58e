"""The adapters that a vLLM server holds, kept on disk beside it.

vLLM forgets at a restart what was loaded while it ran. So every adapter is copied to a shelf before it is loaded, and
the shelf keeps a list that vLLM reads when it starts: a server that was killed comes back with all its releases. It
also knows who needs an adapter beside the gateway's routes: whom it is kept for until when, and who is asking it now.
Replicas on other machines see the same shelf, as a shared folder at the same path.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.infra.file_lock import held, held_if_free
from sluice.provenance.canonical import digest_file
from sluice.serving.durable import replace_file

if TYPE_CHECKING:
    from sluice.serving.vllm import VllmClient

LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a Llama that an adapter may change here; the server is started for exactly these."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterShelf:
    """Adapters by served name under `folder`, none above `max_rank`."""

    folder: Path
    max_rank: int = 16

    @property
    def list_file(self) -> Path:
        """vLLM's configuration file: the adapters to load at start."""
        return self.folder / "vllm.yaml"

    def path(self, name: str) -> Path:
        """Where the adapter of this served name lies."""
        return self.folder / name

    def place(self, name: str, source: Path, digests: Mapping[str, str]) -> Path:
        """Copy an adapter to the shelf, whole or not at all. The same one, if it is there already, is left alone.

        `digests` are those of its files according to its manifest. Raises `IntegrityError` when what was copied is
        something else, `InputError` for what is no adapter that is served here.
        """
        target = self.path(name)
        if target.is_dir():
            if self._digests(name) == digests:
                return target
            # What a crash, or anybody, left there is not what was verified.
            shutil.rmtree(target)
        check_adapter(source, max_rank=self.max_rank)
        staging = self.folder / f".{name}.{os.getpid()}"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for file in (_CONFIG, _WEIGHTS):
                shutil.copyfile(source / file, staging / file)
                with (staging / file).open("rb") as copied:
                    os.fsync(copied.fileno())
            # The copy, and not the source: that one was verified a moment ago, and may be another one by now.
            _require_digests(staging, digests, name)
            staging.replace(target)
        except OSError as error:
            if target.is_dir():  # another process placed the same adapter first
                _require_digests(target, digests, name)
                return target
            raise UnavailableError(f"The adapter {name!r} cannot be copied to {str(self.folder)!r}: {error}.") from (
                error
            )
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def require(self, name: str, digests: Mapping[str, str]) -> None:
        """Raise `IntegrityError` unless the adapter on the shelf is the one of these digests."""
        _require_digests(self.path(name), digests, name)

    def size(self, name: str) -> int:
        """Bytes of an adapter's files; 0 where there are none."""
        return sum(file.stat().st_size for file in self.path(name).glob("*") if file.is_file())

    def keep(self, name: str, until: float, why: str) -> None:
        """Nobody takes this adapter from the servers before `until` (seconds since the epoch); `drop` ends it."""
        with self._changing():
            self._write_kept({**self._kept(), name: {"until": until, "why": why}})

    def drop(self, name: str) -> None:
        """Keep it no longer."""
        with self._changing():
            self._write_kept({kept: entry for kept, entry in self._kept().items() if kept != name})

    def kept(self) -> dict[str, tuple[float, str]]:
        """(until, why) by served name; what was kept until a moment that has passed included."""
        return {name: (float(entry["until"]), str(entry["why"])) for name, entry in self._kept().items()}

    @contextmanager
    def in_use(self, name: str) -> Iterator[None]:
        """While somebody asks an adapter that no route leads to, such as an evaluation: nobody takes it away. Several
        may; the system forgets those that were killed."""
        lock = self._lock(name)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield

    @contextmanager
    def unused(self, name: str) -> Iterator[bool]:
        """Whether nobody asks it now; as long as this is held, nobody begins to."""
        with held_if_free(self._lock(name)) as free:
            yield free

    def _changing(self) -> AbstractContextManager[None]:
        return held(self.folder / ".lock")

    def _lock(self, name: str) -> Path:
        return self.folder / ".in-use" / name

    def _kept(self) -> dict[str, dict[str, Any]]:
        return _read(self.folder / "kept.json")

    def _write_kept(self, kept: Mapping[str, Mapping[str, Any]]) -> None:
        replace_file(self.folder / "kept.json", json.dumps(kept, sort_keys=True))

    def names(self) -> tuple[str, ...]:
        """Served names that a restarted server loads: those whose files are the ones that were put there."""
        return tuple(name for name, files in self._listed().items() if files == self._digests(name))

    def remember(self, name: str) -> None:
        """Load this adapter at every start from now on."""
        with self._changing():
            self._write({**self._listed(), name: self._digests(name)})

    def forget(self, name: str) -> None:
        """Load it no more."""
        with self._changing():
            self._write({kept: files for kept, files in self._listed().items() if kept != name})

    def write_list(self) -> None:
        """Make vLLM's configuration file agree with the shelf."""
        with self._changing():
            self._write(self._listed())

    def _listed(self) -> dict[str, dict[str, str]]:
        """Digests of the files by served name."""
        return _read(self.folder / "shelf.json")

    def _digests(self, name: str) -> dict[str, str]:
        return {file.name: digest_file(file) for file in sorted(self.path(name).glob("*")) if file.is_file()}

    def _write(self, listed: dict[str, dict[str, str]]) -> None:
        replace_file(self.folder / "shelf.json", json.dumps(listed, sort_keys=True))
        modules = [json.dumps({"name": name, "path": str(self.path(name))}) for name in sorted(self.names())]
        # JSON is YAML. An empty file is refused by vLLM, so a harmless setting stands in it always.
        content: dict[str, Any] = {"disable-log-stats": False} | ({"lora-modules": modules} if modules else {})
        replace_file(self.list_file, json.dumps(content))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)} if isinstance(found, dict) else {}


def _require_digests(folder: Path, digests: Mapping[str, str], name: str) -> None:
    for file in sorted({*digests, _CONFIG, _WEIGHTS}):
        path = folder / file
        found = digest_file(path) if path.is_file() else "nothing"
        if found != digests.get(file):
            raise IntegrityError(
                f"{file} of the adapter {name!r} is not the one that was verified: its digest is {found}, its manifest "
                f"says {digests.get(file, 'nothing')}.",
                hint="Somebody changed it after it was verified. Look who can write there before you try again.",
            )


def check_adapter(folder: Path, *, max_rank: int) -> None:
    """Raises `InputError` for a folder that is not a LoRA adapter this server can hold, naming what is wrong."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{str(folder / _CONFIG)!r} cannot be read: {error}.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{str(folder)!r}: peft_type = {config.get('peft_type')!r} is not LORA.")
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{str(folder)!r} holds no {_WEIGHTS}.")
    rank = config.get("r")
    if not isinstance(rank, int) or not 0 < rank <= max_rank:
        raise InputError(
            f"{str(folder)!r}: r = {rank!r} is not a rank from 1 to {max_rank}.",
            hint="Train with a smaller rank, or raise serving's max_lora_rank.",
        )
    targets = config.get("target_modules") or []
    # vLLM would load the rest and stay silent about these: the release would not be what was trained and judged.
    foreign = sorted({str(name).rpartition(".")[2] for name in targets} - set(LORA_MODULES))
    if foreign or not targets or isinstance(targets, str):
        raise InputError(f"{str(folder)!r}: target_modules holds {foreign or targets}, not only {list(LORA_MODULES)}.")
    for name in ("modules_to_save", "use_dora"):
        if config.get(name):
            raise InputError(f"{str(folder)!r}: {name} = {config[name]!r} cannot be served as an adapter.")


def load_adapter(
    clients: Sequence[VllmClient], shelf: AdapterShelf, name: str, source: Path, digests: Mapping[str, str]
) -> None:
    """Make every server hold the adapter in `source` under `name`, now and after a restart. Safe to repeat.

    `digests` are those of its files according to its manifest: the copy on the shelf is verified before a server reads
    it and once all have. What one server refuses, or anything else that goes wrong, is taken from those again that did
    not hold it before.
    """
    before = shelf.path(name).is_dir()
    placed = shelf.place(name, source, digests)
    loaded = []
    try:
        for client in clients:
            if client.load_adapter(name, placed):
                loaded.append(client)
        shelf.require(name, digests)
    except Exception:
        for client in loaded:
            with suppress(UnavailableError):
                client.unload_adapter(name)
        if not before:
            shutil.rmtree(placed, ignore_errors=True)
        raise
    shelf.remember(name)


def unload_adapter(clients: Sequence[VllmClient], shelf: AdapterShelf, name: str) -> tuple[str, ...]:
    """Take an adapter from every server and the shelf. Its weight must be 0 and its last request over.

    A server that does not answer keeps nobody from unloading it elsewhere; a sentence for each such. One that restarts
    comes back without it.
    """
    shelf.forget(name)
    shelf.drop(name)
    left = []
    for client in clients:
        try:
            client.unload_adapter(name)
        except UnavailableError as error:
            left.append(error.message)
    shutil.rmtree(shelf.path(name), ignore_errors=True)
    return tuple(left)
