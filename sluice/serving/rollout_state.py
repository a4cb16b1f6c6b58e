"""What a rollout remembers: enough that a killed one goes on where it was, and never further than it may."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from sluice.infra.errors import IntegrityError
from sluice.infra.file_lock import held
from sluice.infra.progress import Report, no_report
from sluice.serving.analysis import Verdict
from sluice.serving.durable import replace_file
from sluice.serving.routes import Target

Phase = Literal["probing", "raising", "holding", "baking", "passed", "promoted", "failing", "failed"]
"""`raising`: about to set this step's weight. `failing`: off the routes, the failure not yet recorded. The last three
of `passed`, `promoted` and `failed` are final for their side: nothing follows `failed`."""

EventKind = Literal["start", "resume", "probe", "raise", "look", "pass", "bake", "promote", "rollback", "fail"]


@dataclass(frozen=True)
class RolloutEvent:
    """One line of a rollout's timeline. `time` in seconds since the epoch, `weight` in percent after the event."""

    time: float
    kind: EventKind
    weight: int
    verdict: Verdict | None
    sentence: str


@dataclass(frozen=True)
class RolloutState:
    """Where a rollout is. `step` counts from 0; `since` is the start of the running step's window (epoch seconds).

    `reference` is the window (start, end) of the last step that passed below 100 percent: at 100 percent nobody is
    left on stable, and its figures are taken from there.
    """

    target: Target
    stable: Target
    phase: Phase
    step: int
    weight: int
    since: float
    reference: tuple[float, float] | None = None
    reason: str = ""
    events: tuple[RolloutEvent, ...] = field(default=())

    @property
    def release(self) -> str:
        return self.target.release

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RolloutState:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on foreign content."""
        fields = dict(content)
        reference = fields["reference"]
        fields.update(
            target=Target.from_json(fields["target"]),
            stable=Target.from_json(fields["stable"]),
            reference=(float(reference[0]), float(reference[1])) if reference else None,
            events=tuple(RolloutEvent(**event) for event in fields["events"]),
        )
        return cls(**fields)


class RolloutStore(Protocol):
    """Keeps the state of one application's rollouts, one for each release."""

    def load(self, release: str) -> RolloutState | None:
        """The last saved state, or None for a release that was never rolled out. Raises `IntegrityError`."""

    def save(self, state: RolloutState) -> None:
        """Keep the state; when this returns it survives a crash."""


class FileRolloutStore:
    """`RolloutStore` in a folder: one JSON file for each release."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def exclusive(self, report: Report = no_report) -> Iterator[None]:
        """One rollout at a time moves the gateway's weights: wait for the one that does so now."""
        with held(self._folder / ".lock", lambda: report(0, 0, "waiting for the end of another rollout")):
            yield

    def load(self, release: str) -> RolloutState | None:
        path = self._path(release)
        try:
            return RolloutState.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"The rollout's state {str(path)!r} is damaged: {error}.",
                hint="Roll back (`sluice rollback`), then remove the file.",
            ) from error

    def save(self, state: RolloutState) -> None:
        replace_file(self._path(state.release), json.dumps(state.to_json(), indent=1))

    def _path(self, release: str) -> Path:
        return self._folder / f"{release.removeprefix('sha256:')}.json"
