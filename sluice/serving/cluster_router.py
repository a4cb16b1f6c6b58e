"""What the routers of a cluster share: one object of the API is the truth, and it is replaced only unchanged.

The decision (routes, earlier stable releases, refusals, token) lives in an annotation of the very object that the
gateway follows, so both change in one write, and a rollback needs the cluster's API and nothing else. A write that
somebody else came before is decided again from what is there now: an `apply` with `expected` then loses, a rollback
wins. Sent and unknown whether written (a broken connection) is found out from the name of the change.
"""

from __future__ import annotations

import random
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sluice.infra.errors import ConflictError, InputError, IntegrityError, SluiceError, UnavailableError
from sluice.infra.kubernetes_objects import Kind, KubernetesObjects, Object, ObjectChanged
from sluice.serving.route_decision import RouteDecision, describe
from sluice.serving.routes import RouteState, Target

DECISION = "sluice.dev/decision"
PROBE_KEY = "sluice.dev/probe-key"
MANAGED = {"app.kubernetes.io/managed-by": "sluice"}
_KEPT = ("name", "labels", "resourceVersion", "ownerReferences", "finalizers")
_WRITE_S = 30.0
_POLL_S = 0.05
_SETTLED_S = 1.0


class ClusterRouter(ABC):
    """`routes.Router` over one object of the cluster. Safe between threads, processes and machines.

    A driver says how the object looks for a decision (`spec`), which objects a release needs besides (`prepare`,
    `missing`), and how the data plane confirms (`confirmed`).
    """

    kind: Kind

    def __init__(self, objects: KubernetesObjects, application: str, *, confirm_s: float) -> None:
        self._objects = objects
        self.application = application
        self._confirm_s = confirm_s

    # What a driver adds.

    @abstractmethod
    def spec(self, decision: RouteDecision, probe_key: str) -> Object:
        """The object's `spec` for a decision."""

    def check(self, state: RouteState) -> None:  # noqa: B027 - most drivers need none
        """Raises `InputError` for what this gateway cannot do."""

    def prepare(self, targets: Iterable[Target]) -> None:  # noqa: B027 - most drivers need none
        """Make the objects that these releases need, before the routes lead to them."""

    def tidy(self, decision: RouteDecision) -> None:  # noqa: B027 - most drivers need none
        """Remove what no release of the decision needs any more."""

    @abstractmethod
    def differences(self, decision: RouteDecision, live: Object, probe_key: str) -> tuple[str, ...]:
        """How the live object and what belongs to it differ from the decision, a sentence each."""

    @abstractmethod
    def confirmed(self, live: Object, decision: RouteDecision, probe_key: str) -> str:
        """Empty when the data plane follows, else what is missing. Raises `Refused` when it never will."""

    @abstractmethod
    def active_requests(self, release: str) -> int:
        """See `routes.Router`."""

    # The protocol.

    def state(self) -> RouteState:
        return self._current()[0].state

    def seed(self, stable: Target) -> RouteState:
        """Routes where there are none: everybody to `stable`. Routes decided before are kept as they are."""
        try:
            return self.state()
        except NoRoutes:
            pass
        decision = RouteDecision(1, RouteState(stable))
        self.check(decision.state)
        self.prepare(decision.targets())
        key = secrets.token_hex(24)
        metadata = {
            "name": self.application,
            "labels": MANAGED,
            "annotations": {DECISION: decision.to_json(), PROBE_KEY: key},
        }
        body = {"apiVersion": self.kind.api_version, "kind": self.kind.name, "metadata": metadata}
        try:
            self._objects.create(self.kind, {**body, "spec": self.spec(decision, key)})
        except ObjectChanged:
            return self.state()
        self._confirm(decision)
        return decision.state

    def apply(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteState:
        self.check(state)
        self.prepare(state.targets())
        pair: tuple[RouteDecision, RouteDecision] | None = None

        def decide(before: RouteDecision) -> RouteDecision:
            nonlocal pair
            after = before.applied(state, expected=expected, token=token)
            pair = before, after
            return after

        try:
            decision = self._write(decide, set())
            standing = self._confirm(decision)
        except UnavailableError:
            if pair is not None:
                self._take_back(*pair)
            raise
        if standing != state:
            raise ConflictError(
                f"The routes changed while the gateway took them over: {describe(standing)} now.",
                hint="Look at `sluice release status`; a rollback by somebody else ends this rollout.",
            )
        self._tidy(decision)
        return state

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        return self._retreat(lambda before: before.rolled_back(reason, absorb=absorb))

    def restore_previous(self, reason: str) -> RouteState:
        return self._retreat(lambda before: before.restored(reason))

    def previous(self) -> tuple[Target, ...]:
        try:
            return self._current()[0].previous
        except NoRoutes:
            return ()

    def refusal(self, release: str) -> str | None:
        try:
            reason = self._current()[0].refused.get(release)
        except NoRoutes:
            return None
        return reason if reason is None else reason or "it was rolled back"

    def drift(self) -> tuple[str, ...]:
        # What was changed just now is given a moment to be followed.
        until = time.monotonic() + _SETTLED_S
        while True:
            try:
                decision, live = self._current()
                found = self.differences(decision, live, _probe_key(live))
            except SluiceError as error:
                return (str(error),)
            if found:
                return found
            try:
                missing = self.confirmed(live, decision, _probe_key(live))
            except UnavailableError as error:
                missing = error.message
            if not missing or time.monotonic() > until:
                return (f"The gateway does not follow: {missing.rstrip('.')}.",) if missing else ()
            time.sleep(_POLL_S)

    def reconcile(self) -> RouteState:
        self.prepare(self._current()[0].targets())
        return self._retreat(lambda before: before.again())

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while active := self.active_requests(release):
            if time.monotonic() >= until:
                raise UnavailableError(f"{active} request(s) still run on {release} after {timeout_s:g} s.")
            time.sleep(min(0.5, timeout_s / 4))

    def confirm_traffic(self, state: RouteState, *, within_s: float) -> str:
        """Raises `UnavailableError`: what the proxies counted is not read here."""
        raise UnavailableError(
            "The proxies' figures are not read here, so nobody saw which release requests go to.",
            hint="The change itself was confirmed by the proxies.",
        )

    def probe_key(self) -> str:
        """What a probe must show to choose its release. Whoever may read the object knows it."""
        return _probe_key(self._current()[1])

    # How.

    def _current(self) -> tuple[RouteDecision, Object]:
        live = self._objects.get(self.kind, self.application)
        if live is None:
            raise NoRoutes(
                f"The gateway of {self.application} has no routes yet: there is no {self.kind.name} "
                f"{self.application!r} in namespace {self._objects.namespace!r}.",
                hint="Seed it with a stable release first (`sluice up`).",
            )
        text = (live["metadata"].get("annotations") or {}).get(DECISION)
        if text is None:
            raise ConflictError(
                f"The {self.kind.name} {self.application!r} was not made by Sluice: it has no annotation {DECISION}.",
                hint="Delete or rename it, or choose another application name.",
            )
        try:
            return RouteDecision.from_json(text), live
        except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise IntegrityError(
                f"The annotation {DECISION} of {self.kind.name} {self.application!r} is damaged: {error}.",
                hint="Delete the object and seed it again: everybody is sent to the base model, then roll out again.",
            ) from error

    def _write(self, decide: Callable[[RouteDecision], RouteDecision], attempted: set[str]) -> RouteDecision:
        """Decide from what is there and write it, again and again until nobody comes in between. `attempted` are the
        changes sent so far: one of them may be there although its answer was lost."""
        until = time.monotonic() + _WRITE_S
        while True:
            before, live = self._current()
            if before.change in attempted:
                return before
            after = decide(before)
            if after is before:
                return before
            metadata = live["metadata"]
            annotations = {**metadata["annotations"], DECISION: after.to_json()}
            kept = {name: metadata[name] for name in _KEPT if name in metadata}
            attempted.add(after.change)
            try:
                self._objects.replace(
                    self.kind,
                    {
                        "apiVersion": self.kind.api_version,
                        "kind": self.kind.name,
                        "metadata": {**kept, "annotations": annotations},
                        "spec": self.spec(after, _probe_key(live)),
                    },
                )
                return after
            except ObjectChanged:
                if time.monotonic() > until:
                    raise UnavailableError(
                        f"Somebody changes the {self.kind.name} {self.application!r} all the time: no change got "
                        f"through within {_WRITE_S:g} s.",
                        hint="Look who writes it: `kubectl get -o yaml --show-managed-fields`.",
                    ) from None
                time.sleep(random.uniform(0, 0.02))

    def _retreat(self, decide: Callable[[RouteDecision], RouteDecision]) -> RouteState:
        """Away from a release: never taken back."""
        decision, changed = self._persist(decide)
        if changed:
            self._confirm(decision)
        return decision.state

    def _persist(self, decide: Callable[[RouteDecision], RouteDecision]) -> tuple[RouteDecision, bool]:
        """Write also through hiccups of the API; the decision that stands, and whether it is ours."""
        attempted: set[str] = set()
        for pause in (0.05, 0.2, 0.5):
            try:
                decision = self._write(decide, attempted)
                return decision, bool(attempted)
            except UnavailableError:
                time.sleep(pause)
        return self._write(decide, attempted), bool(attempted)

    def _take_back(self, before: RouteDecision, after: RouteDecision) -> None:
        """Nobody may be sent to a release by a change that we report as failed.

        Also when it is not there: it may still be under way, and a new revision shuts it out.
        """
        ours = (before.change, after.change)
        try:
            self._persist(lambda current: current.taken_back(before) if current.change in ours else current)
        except SluiceError:
            # The caller hears the first error, and whoever looks at the routes next goes back.
            pass

    def _confirm(self, decision: RouteDecision) -> RouteState:
        """Wait until the data plane follows; the state that it follows, another when somebody decided anew."""
        until = time.monotonic() + self._confirm_s
        while True:
            current, live = self._current()
            if current.state != decision.state:
                return current.state
            try:
                missing = self.confirmed(live, current, _probe_key(live))
            except Refused:
                raise
            except UnavailableError as error:
                missing = error.message
            if not missing:
                return current.state
            if time.monotonic() >= until:
                raise UnavailableError(
                    f"The gateway did not confirm revision {current.revision} of its routes within "
                    f"{self._confirm_s:g} s: {missing.rstrip('.')}.",
                    hint="Is the gateway's controller running? docs/kubernetes-routing.md tells how to look.",
                )
            time.sleep(_POLL_S)

    def _tidy(self, decision: RouteDecision) -> None:
        try:
            self.tidy(decision)
        except SluiceError:
            # What is left behind serves nobody; the next change removes it.
            pass


class Refused(UnavailableError):
    """The data plane does not take the routes, and waiting will not change that."""


class NoRoutes(UnavailableError):
    """The cluster holds no routes of this application yet."""


def differing(wanted: Any, live: Any, path: str = "") -> tuple[str, ...]:
    """Paths at which `live` does not hold what is `wanted`. Fields that only `live` has are the API's defaults."""
    if isinstance(wanted, Mapping) and isinstance(live, Mapping):
        found = [
            difference
            for name, value in wanted.items()
            for difference in differing(value, live.get(name), f"{path}.{name}" if path else name)
        ]
        return tuple(found)
    if isinstance(wanted, list) and isinstance(live, list) and len(wanted) == len(live):
        return tuple(
            difference
            for index, (one, other) in enumerate(zip(wanted, live, strict=True))
            for difference in differing(one, other, f"{path}[{index}]")
        )
    return () if wanted == live else (path,)


def _probe_key(live: Object) -> str:
    key = (live["metadata"].get("annotations") or {}).get(PROBE_KEY)
    if not key:
        raise IntegrityError(
            f"{live['kind']} {live['metadata']['name']!r} has lost its annotation {PROBE_KEY}.",
            hint="Put it back, or delete the object and seed it again.",
        )
    return str(key)
