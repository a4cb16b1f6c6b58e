"""The adapters that a vLLM server holds, kept on disk beside it.

vLLM forgets at a restart what was loaded while it ran. So every adapter is copied to a shelf before it is loaded, and
the shelf keeps a list that vLLM reads when it starts: a server that was killed comes back with all its releases.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.infra.errors import InputError, UnavailableError
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

    def place(self, name: str, source: Path) -> Path:
        """Copy an adapter to the shelf, whole or not at all. The same one, if it is there already, is left alone."""
        check_adapter(source, max_rank=self.max_rank)
        target = self.path(name)
        if target.is_dir():
            if all(_same(source / file, target / file) for file in (_CONFIG, _WEIGHTS)):
                return target
            # What a crash, or anybody, left there is not what was verified.
            shutil.rmtree(target)
        staging = self.folder / f".{name}.{os.getpid()}"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            for file in (_CONFIG, _WEIGHTS):
                shutil.copyfile(source / file, staging / file)
                with (staging / file).open("rb") as copied:
                    os.fsync(copied.fileno())
            staging.replace(target)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            if target.is_dir():  # another process placed the same adapter first
                return target
            raise UnavailableError(f"The adapter {name!r} cannot be copied to {str(self.folder)!r}: {error}.") from (
                error
            )
        return target

    def names(self) -> tuple[str, ...]:
        """Served names that a restarted server loads: those whose files are the ones that were put there."""
        return tuple(name for name, files in self._listed().items() if files == self._digests(name))

    def remember(self, name: str) -> None:
        """Load this adapter at every start from now on."""
        self._write({**self._listed(), name: self._digests(name)})

    def forget(self, name: str) -> None:
        """Load it no more."""
        self._write({kept: files for kept, files in self._listed().items() if kept != name})

    def write_list(self) -> None:
        """Make vLLM's configuration file agree with the shelf."""
        self._write(self._listed())

    def _listed(self) -> dict[str, dict[str, str]]:
        """Digests of the files by served name."""
        try:
            found: dict[str, dict[str, str]] = json.loads((self.folder / "shelf.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def _digests(self, name: str) -> dict[str, str]:
        return {file.name: digest_file(file) for file in sorted(self.path(name).glob("*")) if file.is_file()}

    def _write(self, listed: dict[str, dict[str, str]]) -> None:
        replace_file(self.folder / "shelf.json", json.dumps(listed, sort_keys=True))
        modules = [json.dumps({"name": name, "path": str(self.path(name))}) for name in sorted(self.names())]
        # JSON is YAML. An empty file is refused by vLLM, so a harmless setting stands in it always.
        content: dict[str, Any] = {"disable-log-stats": False} | ({"lora-modules": modules} if modules else {})
        replace_file(self.list_file, json.dumps(content))


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


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


def load_adapter(client: VllmClient, shelf: AdapterShelf, name: str, source: Path) -> None:
    """Make the server hold the adapter in `source` under `name`, now and after a restart. Safe to repeat."""
    client.load_adapter(name, shelf.place(name, source))
    shelf.remember(name)


def unload_adapter(client: VllmClient, shelf: AdapterShelf, name: str) -> None:
    """Take an adapter from the server and the shelf. Its weight must be 0 and its last request over."""
    shelf.forget(name)
    client.unload_adapter(name)
    shutil.rmtree(shelf.path(name), ignore_errors=True)
