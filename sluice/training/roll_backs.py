"""Roll-backs of a run: counted over all its attempts, and the steps they leave out.

Going back to a checkpoint restores everything that a checkpoint holds, so the memory of having gone back must live
beside the checkpoints: `roll_backs.json` in the work folder. Data order is a pure function of the step; without this
file the same rows would bring the run to the same roll-back for ever.

A process may be killed at any moment of a roll-back. In the order

    store.discard_after(min(verdict.dropped) - 1);  roll_backs.record(verdict);  load the newest checkpoint

each half of it is safe: killed before `record`, the step is met again and judged again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.infra.errors import IntegrityError
from sluice.infra.home import write_private
from sluice.provenance.canonical import Json

if TYPE_CHECKING:
    from sluice.training.guards import Verdict

ROLL_BACKS_FILE = "roll_backs.json"


class RollBacks:
    """Every process keeps one and records the same verdicts; equal files overwrite each other.

    On several nodes without a shared work folder process 0's `state()` goes to all others (`merge`) at the start, and
    into each checkpoint's details, so that a new node knows them too. Raises `IntegrityError` for a damaged file.
    """

    def __init__(self, work_dir: Path | None = None) -> None:
        self._path = work_dir / ROLL_BACKS_FILE if work_dir else None
        self._records: dict[int, dict[str, Json]] = {}
        if self._path and self._path.is_file():
            try:
                self.merge(json.loads(self._path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError) as error:
                raise IntegrityError(
                    f"{self._path} is not a record of roll-backs: {error}.",
                    hint="Delete it to train on: the run then judges again the steps it had left out.",
                ) from error

    def record(self, verdict: Verdict) -> None:
        """Keep a verdict to roll back, on disk before this returns. The same step twice is one."""
        self._records[max(verdict.dropped)] = {
            "step": max(verdict.dropped),
            "dropped": list(verdict.dropped),
            "guard": verdict.guard,
            "sentence": verdict.sentence,
        }
        self._write()

    def merge(self, state: Json) -> None:
        """Take over what another process or a checkpoint knows; nothing known here is lost."""
        self._records |= {int(record["step"]): dict(record) for record in state}

    def state(self) -> Json:
        """All roll-backs in the order of steps, as JSON."""
        return [self._records[step] for step in sorted(self._records)]

    def count(self, guard: str) -> int:
        """How often this guard made the run go back."""
        return sum(record["guard"] == guard for record in self._records.values())

    def dropped(self, step: int) -> str | None:
        """Why the update of this step is left out, as the verdict's sentence said it; None when it is not."""
        found = [record["sentence"] for record in self._records.values() if step in record["dropped"]]
        return str(found[-1]) if found else None

    def _write(self) -> None:
        if self._path:
            write_private(self._path, json.dumps(self.state(), indent=1))
