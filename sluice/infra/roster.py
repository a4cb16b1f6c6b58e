"""The parts that an installation runs, written down: one file for each, an index, and supervisord's configuration.

A part's file is named by the digest of its content. The name stands in the part's command line, so supervisord sees
any difference in a part, secrets included, without reading them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from sluice.infra.errors import InputError
from sluice.infra.home import write_private, writing
from sluice.infra.services import ServiceSpec
from sluice.infra.supervisord import CONFIGURATION, configuration

_INDEX = "index.json"


class Roster:
    """The parts of the installation at `home` (absolute), in the order in which they start."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "parts"

    def read(self) -> list[ServiceSpec]:
        """The parts written last; empty before the first `up`. Files of another version are passed over."""
        try:
            index = json.loads((self.folder / _INDEX).read_text())
            return [ServiceSpec.from_json(json.loads((self.folder / name).read_text())) for name in index]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def write(self, specs: Sequence[ServiceSpec]) -> None:
        """Replace the parts and the configuration; each file appears whole. Raises `UnavailableError`, `InputError`."""
        depths = dependence_depths(specs)
        with writing(self.home):
            for folder in (self.home, self.folder, self.home / "logs"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = {}
            for spec in specs:
                content = json.dumps(spec.to_json(), sort_keys=True, indent=2)
                digest = hashlib.sha256(content.encode()).hexdigest()[:12]
                files[spec.name] = self.folder / f"{spec.name}.{digest}.json"
                write_private(files[spec.name], content)
            write_private(self.folder / _INDEX, json.dumps([file.name for file in files.values()]))
            write_private(self.home / CONFIGURATION, configuration(self.home, files, specs, depths))

    def forget_others(self) -> None:
        """Remove part files that nothing names any more; call it once no part runs from them."""
        try:
            named = set(json.loads((self.folder / _INDEX).read_text())) | {_INDEX}
        except (OSError, ValueError):
            return
        for path in self.folder.glob("*.json"):
            if path.name not in named:
                path.unlink(missing_ok=True)


def dependence_depths(specs: Sequence[ServiceSpec]) -> dict[str, int]:
    """For each part the length of its longest chain of dependence. Raises `InputError` on a name that is missing,
    twice there, or depends on itself in the end."""
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) < len(specs):
        names = sorted(spec.name for spec in specs)
        raise InputError(f"Two parts have one name: {', '.join(names)}.")
    depths: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise InputError(f"Parts depend on each other in a circle: {' > '.join((*above, name))}.")
        if name not in by_name:
            raise InputError(f"The part {above[-1]!r} depends on {name!r}, which is not among the parts.")
        if name not in depths:
            below = (depth(other, (*above, name)) for other in by_name[name].depends_on)
            depths[name] = 1 + max(below, default=-1)
        return depths[name]

    for spec in specs:
        depth(spec.name, ())
    return depths
