"""The ways back: users first, by the gateway alone, then everything else.

Failing: the gateway goes back and refuses the release for ever (its own files say so), then the failure is saved,
recorded, and saved as done. Withdrawing: the intention is saved, the gateway goes back, that is recorded and saved as
done. Killed in between, the next run finds the refusal, or the intention, and finishes.
"""

from __future__ import annotations

from collections.abc import Callable

from sluice.infra.errors import IntegrityError, UnavailableError
from sluice.infra.progress import Report
from sluice.provenance.canonical import short
from sluice.serving.errand import HUNG_S, Errand
from sluice.serving.rollout_interfaces import Clock, Recorder
from sluice.serving.rollout_journal import Journal
from sluice.serving.rollout_store import CoolDown, RolloutStore
from sluice.serving.routes import Router, RouteState

_PAUSE_S = 0.25
_RETRY_S = 2.0
CONFIRM_S = 2.0
"""Seconds for which requests are watched after a rollback."""
_FOLLOW_S = 10.0
"""Seconds for which a gateway that was told already is made to follow; one that is not there has no users."""
PATIENCE_S = 60.0
"""Seconds for which a ledger that does not answer is asked again, after users are back."""


class Retreat:
    """Takes the users of one rollout back. `require_lease` raises when another controller is at work."""

    def __init__(
        self,
        journal: Journal,
        *,
        router: Router,
        store: RolloutStore,
        recorder: Recorder,
        cool_down_s: float,
        confirm: Callable[[RouteState], str] | None,
        require_lease: Callable[[], None],
        clock: Clock,
        report: Report,
    ) -> None:
        self._journal = journal
        self._router = router
        self._store = store
        self._recorder = recorder
        self._cool_down_s = cool_down_s
        self._confirm = confirm
        self._require_lease = require_lease
        self._clock = clock
        self._report = report

    def fail(self, reason: str) -> None:
        """For good. Raises `UnavailableError` when users are back and the ledger could not be told: run it again."""
        journal = self._journal
        note = self._off(reason, absorb=True)
        stable = self._router.state().stable
        analysis = journal.state.analysis
        if journal.state.phase != "failing":
            journal.try_save(
                "rollback",
                f"Everybody is back on {stable.served_name}{note}: {reason}",
                weight=0,
                verdict="fail",
                analysis=analysis,
                phase="failing",
                shadow=0,
                reason=reason,
            )
        self._watch_traffic()
        self._cool_down(reason)
        release = journal.state.release
        self._told(lambda: self._recorder.failure(release, stable.release, reason, analysis))
        journal.save("fail", f"Failed for good: {reason}", weight=0, verdict="fail", phase="failed", reason=reason)

    def withdraw(self, reason: str) -> None:
        """Without failing: it may begin again when it is approved anew. Raises as `fail` does."""
        journal = self._journal
        if journal.state.phase != "withdrawing":
            journal.try_save("note", f"It is withdrawn: {reason}", phase="withdrawing", reason=reason)
        note = self._off(reason, absorb=False)
        stable = self._router.state().stable
        self._watch_traffic()
        release = journal.state.release
        self._told(lambda: self._recorder.withdrawal(release, stable.release, reason))
        journal.save(
            "withdraw",
            f"Everybody is back on {stable.served_name}{note}; the release may be tried again: {reason}",
            weight=0,
            verdict="inconclusive",
            phase="withdrawn",
            shadow=0,
            reason=reason,
        )

    def leave(self, reason: str) -> None:
        """Users only, where there is no time for more: the next run tells the ledger."""
        self._journal.try_save("note", f"It is withdrawn: {reason}", phase="withdrawing", reason=reason)
        self._off(reason, absorb=False)

    def _off(self, reason: str, *, absorb: bool) -> str:
        """Take the release from the routes, however often it has to be tried. A note for the record, or nothing."""
        decided_at: float | None = None
        while True:
            self._require_lease()
            try:
                if self._is_canary():
                    self._router.rollback(reason, absorb=absorb)
                elif self._router.drift():
                    # Decided, by somebody who was killed, or had no disk, before the gateway heard of it.
                    decided_at = decided_at or self._clock.monotonic()
                    self._router.reconcile()
                return ""
            except UnavailableError as error:
                if decided_at is not None and self._clock.monotonic() - decided_at >= _FOLLOW_S:
                    # A data plane that comes back comes back to it.
                    return f" (the gateway has not confirmed yet: {error.message})"
                self._report(0, 0, f"rolling back, the gateway does not answer yet: {error.message}")
            self._clock.sleep(_PAUSE_S)

    def _watch_traffic(self) -> None:
        """See by what users' requests do that nobody reaches the canary any more; not for long."""
        if self._confirm is None:
            return
        confirm, state = self._confirm, self._router.state()
        watching = Errand(lambda: confirm(state))
        if not watching.done(within_s=CONFIRM_S + 1):
            self._journal.try_save("note", "The gateway does not tell where requests go.")
            return
        try:
            self._journal.try_save("note", watching.result())
        except UnavailableError as error:
            self._journal.try_save("note", f"Not seen in the traffic yet: {error.message}")

    def _is_canary(self) -> bool:
        try:
            canary = self._router.state().canary
        except IntegrityError:
            # A rollback needs no more than the copy, and mends it.
            return True
        return canary is not None and canary.release == self._journal.state.release

    def _cool_down(self, reason: str) -> None:
        state = self._journal.state
        if not self._cool_down_s:
            return
        began = next((event.time for event in reversed(state.events) if event.kind == "rollback"), self._clock.now())
        try:
            known = self._store.cool_down()
            if known is None or (known.release, known.reason) != (state.release, reason):
                self._store.set_cool_down(CoolDown(state.release, reason, began + self._cool_down_s))
        except UnavailableError as error:
            self._report(0, 0, f"the cool-down could not be kept: {error.message}")

    def _told(self, tell: Callable[[], None]) -> None:
        """Tell the ledger, again and again for a while: it may hang and it may be down."""
        begun = self._clock.monotonic()
        note, retry_at = "it does not answer", begun
        errand: Errand[None] | None = None
        while (now := self._clock.monotonic()) - begun < PATIENCE_S:
            self._require_lease()
            if now >= retry_at:
                # One that hangs is left to itself: it writes what it writes once, or what is written already.
                errand, retry_at = Errand(tell), now + HUNG_S
                errand.done(within_s=_PAUSE_S)
            if errand is not None and errand.done():
                try:
                    return errand.result()
                except UnavailableError as error:
                    errand, note, retry_at = None, error.message, now + _RETRY_S
            self._report(0, 0, "users are back on stable; telling the ledger")
            self._clock.sleep(_PAUSE_S)
        raise UnavailableError(
            f"The release {short(self._journal.state.release)} is rolled back, but the ledger was not told: {note}",
            hint="Run it again when the ledger answers, or `sluice up`: users stay on stable meanwhile.",
        )
