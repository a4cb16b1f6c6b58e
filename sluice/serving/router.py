"""The local router: Envoy follows two files, and this changes them.

The decision is written first (`routes.json`, to disk), then the clusters, then the routes, each by rename; Envoy
applies a file within milliseconds and its version statistic confirms it. A crash between two files is mended by the
next change or by `reconcile`, which writes both again from the decision. A lock file keeps two processes apart.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from sluice.infra.errors import ConflictError, GateRefused, InputError, IntegrityError, UnavailableError
from sluice.infra.file_lock import held
from sluice.serving.durable import replace_file
from sluice.serving.envoy import CONFIG_VERSION_STATS, GatewaySettings, probe_key
from sluice.serving.envoy_routes import FORCE_HEADER, PROBE_KEY_HEADER, cluster_name, clusters, routes
from sluice.serving.routes import Role, RouteState, Target

_CONFIRM_S = 5.0
_POLL_S = 0.01
_REMEMBERED = 8


@dataclass(frozen=True)
class _Decision:
    """`routes.json`: the routes, who was stable before (latest last) and which releases may not rise again."""

    revision: int
    state: RouteState
    previous: tuple[Target, ...]
    refused: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "state": self.state.to_json(),
            "previous": [vars(target) for target in self.previous],
            "refused": dict(self.refused),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> _Decision:
        previous = tuple(Target.from_json(target) for target in content["previous"])
        refused = {str(release): str(reason) for release, reason in content["refused"].items()}
        return cls(int(content["revision"]), RouteState.from_json(content["state"]), previous, refused)


class EnvoyRouter:
    """`Router` over the files of one gateway. Safe between threads and processes. Implements `routes.Router`."""

    def __init__(self, settings: GatewaySettings, *, confirm_s: float = _CONFIRM_S) -> None:
        self.settings = settings
        self._confirm_s = confirm_s

    def state(self) -> RouteState:
        decision = self._read()
        if decision is None:
            raise UnavailableError(
                f"The gateway of {self.settings.application} has no routes yet.",
                hint="`sluice up` sends everybody to the base model first.",
            )
        return decision.state

    def seed(self, stable: Target) -> RouteState:
        """Routes for a gateway that has none: everybody to `stable`. Routes decided before are kept as they are.

        Writes files only, so that it may come before the gateway's start.
        """
        with self._locked():
            decision = self._read()
            if decision is None:
                decision = _Decision(1, RouteState(stable), (), {})
                self._decide(decision)
            self._publish(decision, also=())
            return decision.state

    def apply(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteState:
        with self._locked():
            before = self._read()
            if before is None:
                raise UnavailableError("The gateway has no routes yet.", hint="Seed it with a stable release first.")
            if expected is not None and before.state != expected:
                raise ConflictError(
                    f"The routes changed meanwhile: {_describe(before.state)} instead of {_describe(expected)}.",
                    hint="Look at `sluice release status`; a rollback by somebody else ends this rollout.",
                )
            for target in state.targets():
                reason = before.refused.get(target.release)
                if reason and state.share(target.release) > before.state.share(target.release):
                    raise GateRefused(
                        f"The release {target.release} was rolled back ({reason}) and may not rise again.",
                        hint="Train a new candidate; a release that failed stays out.",
                    )
            previous = before.previous
            if state.stable.release != before.state.stable.release:
                others = [target for target in previous if target.release != before.state.stable.release]
                previous = (*others, before.state.stable)[-_REMEMBERED:]
            decision = replace(before, revision=before.revision + 1, state=state, previous=previous)
            try:
                self._follow(decision, before)
            except UnavailableError:
                # Nobody may be sent to a release by a change that we reported as failed.
                back = replace(before, revision=decision.revision + 1)
                self._decide(back)
                self._publish(back, also=state.targets())
                raise
            return state

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        with self._locked():
            before = self._read()
            if before is None:
                return self.state()
            if before.state.canary is None:
                return before.state
            refused = dict(before.refused)
            if absorb:
                refused.setdefault(before.state.canary.release, reason)
            return self._retreat(before, RouteState(before.state.stable), before.previous, refused)

    def restore_previous(self, reason: str) -> RouteState:
        """Undo a promotion: the stable release before this one is stable again, and this one may not rise again.

        The earlier release must still be loaded in its server. Raises `ConflictError` when none is remembered.
        """
        with self._locked():
            before = self._read()
            earlier = [target for target in before.previous if target.release not in before.refused] if before else []
            if before is None or not earlier:
                raise ConflictError("The gateway remembers no earlier stable release to go back to.")
            refused = {**before.refused, before.state.stable.release: reason}
            return self._retreat(before, RouteState(earlier[-1]), tuple(earlier[:-1]), refused)

    def previous(self) -> tuple[Target, ...]:
        """The stable releases before this one, latest last."""
        decision = self._read()
        return decision.previous if decision else ()

    def refusal(self, release: str) -> str | None:
        decision = self._read()
        return decision.refused.get(release) if decision else None

    def reconcile(self) -> RouteState:
        """Write the gateway's files again from the decision and wait until Envoy confirms."""
        with self._locked():
            decision = self._read()
            if decision is None:
                return self.state()
            self._follow(replace(decision, revision=decision.revision + 1), decision)
            return decision.state

    def relocate(self, place: Callable[[str], Target]) -> RouteState:
        """Servers answer at other addresses now: routes, and what a rollback may go to, follow `place`, which gives the
        target of a release. Who gets which share stays as it is."""
        with self._locked():
            before = self._read()
            if before is None:
                return self.state()
            canary = before.state.canary
            stable = place(before.state.stable.release)
            state = replace(before.state, stable=stable, canary=canary and place(canary.release))
            previous = tuple(place(target.release) for target in before.previous)
            if (state, previous) == (before.state, before.previous):
                return state
            self._follow(replace(before, revision=before.revision + 1, state=state, previous=previous), before)
            return state

    def probe_headers(self, role: Role) -> dict[str, str]:
        """Request headers by which a probe reaches this role, whatever the weights are."""
        return {FORCE_HEADER: role, PROBE_KEY_HEADER: probe_key(self.settings)}

    def active_requests(self, release: str) -> int:
        """Requests running on this release now. Raises `UnavailableError` when Envoy does not answer."""
        name = f"cluster.{cluster_name(release)}.upstream_rq_active"
        return int(self._stats(name).get(name, "0"))

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while active := self.active_requests(release):
            if time.monotonic() >= until:
                raise UnavailableError(f"{active} request(s) still run on {release} after {timeout_s:g} s.")
            time.sleep(0.05)

    def _retreat(
        self, before: _Decision, state: RouteState, previous: tuple[Target, ...], refused: Mapping[str, str]
    ) -> RouteState:
        self._follow(_Decision(before.revision + 1, state, previous, refused), before)
        return state

    def _follow(self, decision: _Decision, before: _Decision) -> None:
        self._decide(decision)
        self._publish(decision, also=before.state.targets())
        self._confirm(decision.revision)

    def _decide(self, decision: _Decision) -> None:
        replace_file(self.settings.state_file, json.dumps(decision.to_json(), indent=1))

    def _publish(self, decision: _Decision, *, also: tuple[Target, ...]) -> None:
        """Clusters first, so that no route names one that is missing; those just left stay for their last streams."""
        version = str(decision.revision)
        key = probe_key(self.settings)
        kept = clusters((*decision.state.targets(), *also), version)
        replace_file(self.settings.clusters_file, json.dumps(kept, indent=1))
        content = routes(self.settings.application, decision.state, version, key)
        replace_file(self.settings.routes_file, json.dumps(content, indent=1), mode=0o600)

    def _confirm(self, revision: int) -> None:
        until = time.monotonic() + self._confirm_s
        written = time.monotonic()
        seen: dict[str, str] = {}
        while time.monotonic() < until:
            try:
                seen = self._stats("version_text")
            except UnavailableError:
                seen = {}
            if all(seen.get(name) == str(revision) for name in CONFIG_VERSION_STATS):
                return
            # Routes that arrive before their cluster is known are refused; a second rename offers them again.
            if seen.get(CONFIG_VERSION_STATS[0]) == str(revision) and time.monotonic() - written > 0.25:
                replace_file(self.settings.routes_file, self.settings.routes_file.read_text(), mode=0o600)
                written = time.monotonic()
            time.sleep(_POLL_S)
        raise UnavailableError(
            f"The gateway did not confirm revision {revision} of its routes within {self._confirm_s:g} s "
            f"(it reports {sorted(set(seen.values())) or 'nothing'}).",
            hint="Is it running? `sluice status` tells.",
        )

    def _stats(self, pattern: str) -> dict[str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.settings.admin_port, timeout=2.0)
        try:
            connection.request("GET", f"/stats?filter={pattern}")
            text = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(
                f"The gateway's admin address {self.settings.admin_url} does not answer: {error}.",
                hint="Is it running? `sluice status` tells, `sluice up` mends it.",
            ) from error
        finally:
            connection.close()
        pairs = (line.split(": ", 1) for line in text.splitlines() if ": " in line)
        return {name: value.strip().strip('"') for name, value in pairs}

    def _read(self) -> _Decision | None:
        try:
            return _Decision.from_json(json.loads(self.settings.state_file.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise IntegrityError(
                f"The gateway's state {str(self.settings.state_file)!r} is damaged: {error}.",
                hint="Remove it and run `sluice up`: everybody is sent to the base model, then roll out again.",
            ) from error

    def _locked(self) -> AbstractContextManager[None]:
        return held(self.settings.folder / "routes.lock")


def _describe(state: RouteState) -> str:
    if state.canary is None:
        return f"everybody on {state.stable.served_name}"
    return f"{state.weight}% on {state.canary.served_name}, the rest on {state.stable.served_name}"
