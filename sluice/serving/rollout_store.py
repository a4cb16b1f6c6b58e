"""Where one application's rollouts are kept: their states, the orders that people gave, and the cool-down.

rollouts/<digest>.json           the state of one release's rollout
rollouts/orders/<digest>.json    the orders about it, in the order in which they were given
rollouts/cool-down.json          until when no other rollout begins, and why
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sluice.infra.errors import ConflictError, InputError, IntegrityError
from sluice.infra.file_lock import held
from sluice.provenance.canonical import is_digest, short
from sluice.serving.control import Order
from sluice.serving.durable import replace_file
from sluice.serving.rollout_state import RolloutState
from sluice.serving.routes import StaleToken

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class CoolDown:
    """After `release` failed because of `reason`: no other rollout begins before `until` (epoch seconds). `ended_by`
    and `ended_why` name who ended it early, in their words."""

    release: str
    reason: str
    until: float
    ended_by: str = ""
    ended_why: str = ""


class RolloutStore(Protocol):
    """Keeps the rollouts of one application, one for each release. All raise `UnavailableError` when it does not
    answer, and `IntegrityError` on what cannot be read."""

    def load(self, release: str) -> RolloutState | None:
        """The last saved state, or None for a release that was never rolled out."""

    def save(self, state: RolloutState) -> None:
        """Keep the state; when this returns it survives a crash. Raises `StaleToken` when a controller with a newer
        token has saved this rollout."""

    def states(self) -> tuple[RolloutState, ...]:
        """The last state of every rollout, latest change last."""

    def place_order(self, release: str, order: Order) -> None:
        """Tell the rollout of `release`, under way or waiting. Raises `ConflictError` when it has ended or there is
        none, `InputError` for an order without an actor, or a promotion without a reason."""

    def orders(self, release: str) -> tuple[Order, ...]:
        """All orders about a release, as they were given."""

    def cool_down(self) -> CoolDown | None:
        """The last cool-down, whether it is over or not."""

    def set_cool_down(self, cool_down: CoolDown) -> None:
        """Begin a cool-down."""

    def end_cool_down(self, actor: str, reason: str) -> CoolDown | None:
        """End it early, in somebody's name. Returns what was ended, None when there was nothing to end."""


class FileRolloutStore:
    """`RolloutStore` in a folder. Safe between threads and processes of one machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, release: str) -> RolloutState | None:
        return self._read(self._path(release), RolloutState.from_json)

    def save(self, state: RolloutState) -> None:
        path = self._path(state.release)
        with held(self._folder / ".lock"):
            token = self._read(path, lambda content: int(content["token"])) or 0
            if token > state.token:
                raise StaleToken(f"The rollout of {short(state.release)} has another controller now (token {token}).")
            replace_file(path, json.dumps(state.to_json()))

    def states(self) -> tuple[RolloutState, ...]:
        # The lease and the cool-down are kept here too.
        files = [path for path in self._folder.glob("*.json") if is_digest(f"sha256:{path.stem}")]
        found = (self._read(path, RolloutState.from_json) for path in files)
        return tuple(sorted((one for one in found if one), key=lambda one: one.events[-1].time if one.events else 0.0))

    def place_order(self, release: str, order: Order) -> None:
        if not order.actor.strip():
            raise InputError("actor is empty; an order is somebody's word.")
        if order.kind == "promote" and not order.reason.strip():
            raise InputError("reason is empty; a promotion by order says why it did not wait.")
        state = self.load(release)
        if state is None or state.ended:
            how = "has no rollout" if state is None else f"has ended its rollout ({state.phase})"
            raise ConflictError(f"The release {short(release)} {how}: nobody would obey the order to {order.kind}.")
        with held(self._folder / ".lock"):
            given = [asdict(one) for one in (*self.orders(release), order)]
            replace_file(self._orders(release), json.dumps(given, indent=1))

    def orders(self, release: str) -> tuple[Order, ...]:
        return self._read(self._orders(release), lambda given: tuple(Order(**one) for one in given)) or ()

    def cool_down(self) -> CoolDown | None:
        return self._read(self._cool_down, _cool_down)

    def set_cool_down(self, cool_down: CoolDown) -> None:
        replace_file(self._cool_down, json.dumps(asdict(cool_down), indent=1))

    def end_cool_down(self, actor: str, reason: str) -> CoolDown | None:
        if not actor.strip() or not reason.strip():
            raise InputError("actor or reason is empty; ending a cool-down is somebody's word, and says why.")
        found = self.cool_down()
        if found is not None and not found.ended_by:
            self.set_cool_down(replace(found, ended_by=actor, ended_why=reason))
            return found
        return None

    @property
    def _cool_down(self) -> Path:
        return self._folder / "cool-down.json"

    def _path(self, release: str) -> Path:
        return self._folder / f"{release.removeprefix('sha256:')}.json"

    def _orders(self, release: str) -> Path:
        return self._folder / "orders" / self._path(release).name

    def _read(self, path: Path, parse: Callable[[Any], _Read]) -> _Read | None:
        try:
            return parse(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise IntegrityError(
                f"The rollout's file {str(path)!r} is damaged: {error}.",
                # `abort` ends a rollout and nothing else; `rollback` would undo the last promotion where none runs.
                hint="End what is under way (`sluice release abort --reason TEXT`), then remove the file.",
            ) from error


def _cool_down(content: Any) -> CoolDown:
    return CoolDown(**{**content, "until": float(content["until"])})
