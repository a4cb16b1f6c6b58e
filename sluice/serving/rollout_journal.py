"""The state of the rollout under way: a change counts when it is saved, and is told after that."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sluice.infra.errors import UnavailableError
from sluice.serving.rollout_interfaces import Clock, EventSink
from sluice.serving.rollout_state import EventKind, RolloutEvent, RolloutState
from sluice.serving.rollout_store import RolloutStore

if TYPE_CHECKING:
    from sluice.serving.analysis import AnalysisResult, Verdict

_log = logging.getLogger(__name__)


class Journal:
    """Holds `state` and changes it through the store; `token` is the controller's."""

    def __init__(
        self, state: RolloutState, *, store: RolloutStore, sinks: Sequence[EventSink], clock: Clock, token: int
    ) -> None:
        self.state = replace(state, token=token)
        self._store = store
        self._sinks = sinks
        self._clock = clock
        self._held = ""

    def save(
        self,
        kind: EventKind,
        sentence: str,
        *,
        weight: int | None = None,
        verdict: Verdict | None = None,
        actor: str = "",
        analysis: AnalysisResult | None = None,
        **changes: Any,
    ) -> None:
        """Add an event and make `changes`, both or neither. Raises `UnavailableError` and `StaleToken`."""
        state = self.state
        weight = state.weight if weight is None else weight
        event = RolloutEvent(self._clock.now(), kind, weight, verdict, sentence, actor, state.step, analysis)
        changed = state.after(event, **changes)
        self._store.save(changed)
        self.state = changed
        if kind != "hold":
            self._held = ""
        for sink in self._sinks:
            try:
                sink.emit(event, changed)
            except Exception:  # noqa: BLE001 - a listener is none of the users' business
                _log.exception("A listener did not take the event %s", kind)

    def try_save(self, kind: EventKind, sentence: str, **changes: Any) -> None:
        """`save`; where nothing can be saved now, the changes are made in memory and saved with the next event."""
        try:
            self.save(kind, sentence, **changes)
        except UnavailableError as error:
            _log.warning("The rollout's state could not be saved: %s", error)
            facts = {name: value for name, value in changes.items() if name not in ("verdict", "actor")}
            self.state = replace(self.state, **facts)

    def keep(self, **changes: Any) -> None:
        """Changes without an event, which may be lost."""
        self.state = replace(self.state, **changes)
        try:
            self._store.save(self.state)
        except UnavailableError as error:
            _log.warning("The rollout's state could not be saved: %s", error)

    def hold(self, cause: str, sentence: str) -> None:
        """Say once why it does not go on; `cause` tells one cause from another."""
        if cause != self._held:
            self._held = cause
            self.try_save("hold", sentence)
