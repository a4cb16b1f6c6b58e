"""Room for one more adapter: slots of a server, and memory of its machine.

A server that is given more adapters than it has slots says nothing: it drops the one used longest ago and reads it
again from disk when somebody asks for it, in the middle of an answer's time. So slots are counted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sluice.serving.vllm import VllmClient

_MEMINFO = Path("/proc/meminfo")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_COPIES = 2
"""While an adapter is loaded its file and the copy that the server makes of it are in memory. The slots themselves,
rows for the largest rank, are set aside when the server starts, on the accelerator where there is one."""
_SPARE = 256 * 1024**2
"""Bytes of memory that loading leaves free: a machine at its end kills the server of everybody."""


@dataclass(frozen=True)
class Slot:
    """An adapter that a server holds: its served name, and who needs it in words (empty: nobody)."""

    served_name: str
    holder: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.served_name} ({self.holder or 'nothing leads to it'})"


@dataclass(frozen=True)
class Slots:
    """The slots of one server, at `server` (its URL). `told`: the server said itself how many it has; else it is the
    setting `serving.max_loras`."""

    server: str
    total: int
    held: tuple[Slot, ...]
    told: bool = True

    @property
    def free(self) -> int:
        """Slots for further adapters; below 0 where a server was given more than it has."""
        return self.total - len(self.held)

    @property
    def sentence(self) -> str:
        held = "; ".join(slot.sentence for slot in self.held) or "none"
        return f"{self.server} holds {len(self.held)} of {self.total} adapters: {held}."

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"free": self.free}


def server_slots(client: VllmClient, holders: Mapping[str, str], *, total: int) -> Slots:
    """The slots of a server. `holders` says who needs an adapter, by served name; `total` is what counts as long as the
    server does not say it itself. The base model takes no slot. Raises `UnavailableError`."""
    told = client.adapter_slots()
    names = sorted(model.name for model in client.models() if model.parent is not None)
    held = tuple(Slot(name, holders.get(name, "")) for name in names)
    return Slots(client.url, told or total, held, told is not None)


@dataclass(frozen=True)
class Memory:
    """`needed` bytes to load an adapter, `free` of the server's machine, None where it cannot be known from here."""

    server: str
    needed: int
    free: int | None

    @property
    def enough(self) -> bool:
        """True also where nobody can know."""
        return self.free is None or self.free >= self.needed

    @property
    def sentence(self) -> str:
        needed = f"{self.needed / 1e6:.0f} MB to load it safely"
        if self.free is None:
            return f"{self.server} runs on another machine: whether it has {needed} is unknown."
        return f"The machine of {self.server} has {self.free / 1e6:.0f} MB of memory free of {needed}."


def server_memory(url: str, adapter_bytes: int, *, meminfo: Path = _MEMINFO) -> Memory:
    """Memory for an adapter of so many bytes at the server's machine. Linux tells of its own only (`MemAvailable`)."""
    free = None
    if urlsplit(url).hostname in _LOOPBACK and meminfo.is_file():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        free = int(found[1]) * 1024 if found else None
    return Memory(url, _COPIES * adapter_bytes + _SPARE, free)
