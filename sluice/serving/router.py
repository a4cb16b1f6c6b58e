"""The local router: Envoy follows two files, and this changes them.

The decision is written first (`routes.json`, to disk), then the clusters, then the routes, each by rename; Envoy
applies a file within milliseconds and its version statistic confirms it. A crash between two files is mended by the
next change or by `reconcile`, which writes both again from the decision. A lock file keeps two processes apart. Space
for a rollback's files is kept aside: a full disk does not stop it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from sluice.infra.errors import ConflictError, GateRefused, SluiceError, UnavailableError
from sluice.infra.file_lock import held
from sluice.serving.decisions import Decision, DecisionFile
from sluice.serving.durable import replace_file, reserve
from sluice.serving.envoy import CONFIG_VERSION_STATS, GatewaySettings, probe_key
from sluice.serving.envoy_admin import EnvoyAdmin, Traffic
from sluice.serving.envoy_clusters import clusters
from sluice.serving.envoy_routes import FORCE_HEADER, PROBE_KEY_HEADER, ROUTE_CONFIG, USERS_ROUTE, routes
from sluice.serving.log_rotation import rotate
from sluice.serving.routes import Role, RouteState, StaleToken, Target

_CONFIRM_S = 5.0
_POLL_S = 0.01
_WARMING = "cluster_manager.warming_clusters"
_REMEMBERED = 8
_QUIET_S = 0.25
_ENOUGH = 20


class EnvoyRouter:
    """`Router` over the files of one gateway. Safe between threads and processes. Implements `routes.Router`."""

    def __init__(self, settings: GatewaySettings, *, confirm_s: float = _CONFIRM_S) -> None:
        self.settings = settings
        self._confirm_s = confirm_s
        self._file = DecisionFile(settings.state_file)
        self._admin = EnvoyAdmin(settings.admin_port)

    def state(self) -> RouteState:
        decision = self._file.read()
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
            decision = self._file.read()
            if decision is None:
                decision = Decision(1, RouteState(stable))
                self._file.write(decision)
            self._publish(decision, also=())
            return decision.state

    def apply(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteState:
        with self._locked():
            before = self._file.read()
            if before is None:
                raise UnavailableError("The gateway has no routes yet.", hint="Seed it with a stable release first.")
            if 0 < token < before.token:
                raise StaleToken(
                    f"The routes were changed by a controller with token {before.token}; this one has {token}.",
                    hint="Another process leads this rollout now: `sluice release status`.",
                )
            if expected is not None and before.state != expected:
                raise ConflictError(
                    f"The routes changed meanwhile: {_describe(before.state)} instead of {_describe(expected)}.",
                    hint="Look at `sluice release status`; a rollback by somebody else ends this rollout.",
                )
            for target in state.targets():
                reason = before.refusal(target.release)
                if reason and state.share(target.release) > before.state.share(target.release):
                    raise GateRefused(
                        f"The release {target.release} was rolled back ({reason}) and may not rise again.",
                        hint="Train a new candidate; a release that failed stays out.",
                    )
            previous = before.previous
            if state.stable.release != before.state.stable.release:
                others = [target for target in previous if target.release != before.state.stable.release]
                previous = (*others, before.state.stable)[-_REMEMBERED:]
            token = max(token, before.token)
            decision = replace(before, revision=before.revision + 1, state=state, previous=previous, token=token)
            try:
                self._follow(decision, before)
            except UnavailableError:
                # Nobody may be sent to a release by a change that we reported as failed.
                back = replace(before, revision=decision.revision + 1, token=token)
                self._file.write(back, reserved=True)
                self._publish(back, also=state.targets(), reserved=True)
                raise
            return state

    def rollback(self, reason: str, *, absorb: bool = True) -> RouteState:
        with self._locked():
            before = self._file.read_for_retreat()
            if before is None:
                return self.state()
            canary = before.state.canary
            if canary is None and not self._file.damaged:
                return before.state
            refused = dict(before.refused or {})
            if absorb and canary is not None:
                refused.setdefault(canary.release, reason)
            return self._retreat(before, RouteState(before.state.stable), before.previous, refused)

    def restore_previous(self, reason: str) -> RouteState:
        """Undo a promotion: the stable release before this one is stable again, and this one may not rise again.

        The earlier release must still be loaded in its server. Raises `ConflictError` when none is remembered.
        """
        with self._locked():
            before = self._file.read()
            earlier = [target for target in before.previous if not before.refusal(target.release)] if before else []
            if before is None or not earlier:
                raise ConflictError("The gateway remembers no earlier stable release to go back to.")
            refused = {**(before.refused or {}), before.state.stable.release: reason}
            return self._retreat(before, RouteState(earlier[-1]), tuple(earlier[:-1]), refused)

    def previous(self) -> tuple[Target, ...]:
        """The stable releases before this one, latest last."""
        decision = self._file.read()
        return decision.previous if decision else ()

    def refusal(self, release: str) -> str | None:
        decision = self._file.read()
        return decision.refusal(release) if decision else None

    def drift(self) -> tuple[str, ...]:
        """How Envoy differs from the routes as last decided, a sentence each; empty when it follows."""
        try:
            decision = self._file.read()
            if decision is None:
                return ("The gateway has no routes yet.",)
            reported = self._admin.stats("version_text")
            live = self._admin.shares(ROUTE_CONFIG, USERS_ROUTE)
        except SluiceError as error:
            return (str(error),)
        found = []
        for name, what in zip(CONFIG_VERSION_STATS, ("clusters", "routes"), strict=True):
            if (version := reported.get(name)) != str(decision.revision):
                found.append(f"The gateway's {what} are of revision {version}; {decision.revision} was decided.")
        state = decision.state
        wanted = {target.release: state.share(target.release) for target in state.targets()}
        shares, shadow = live or ({}, 0)
        for release in sorted({*shares, *wanted}):
            if (share := shares.get(release, 0)) != wanted.get(release, 0):
                found.append(
                    f"The release {release} gets {share}% of the sessions; {wanted.get(release, 0)}% is right."
                )
        if shadow != state.shadow:
            found.append(f"{shadow}% of stable's requests are mirrored; {state.shadow}% is right.")
        return tuple(found)

    def reconcile(self) -> RouteState:
        """Write the gateway's files again from the decision and wait until Envoy confirms."""
        with self._locked():
            decision = self._file.read()
            if decision is None:
                return self.state()
            self._follow(replace(decision, revision=decision.revision + 1), decision)
            return decision.state

    def relocate(self, place: Callable[[str], Target]) -> RouteState:
        """Servers answer at other addresses now: routes, and what a rollback may go to, follow `place`, which gives the
        target of a release. Who gets which share stays as it is."""
        with self._locked():
            before = self._file.read()
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

    def traffic(self) -> Mapping[str, Traffic]:
        """What Envoy counted, by release. Raises `UnavailableError` when it does not answer."""
        return self._admin.traffic()

    def active_requests(self, release: str) -> int:
        """Requests running on this release now, mirrored ones too. Raises `UnavailableError`."""
        found = self.traffic().get(release, Traffic())
        return found.active + found.shadows_active

    def confirm_traffic(self, state: RouteState, *, within_s: float) -> str:
        """Watch until requests show that only releases with a share in `state` get any; a sentence of what was seen.

        Without traffic the sentence says so after `within_s` seconds. A probe counts like a user. Raises
        `UnavailableError` when requests still begin on a release without a share, or Envoy does not tell.
        """
        served = {target.release: target.served_name for target in state.targets() if state.share(target.release)}
        until = time.monotonic() + within_s
        begun, since = self.traffic(), time.monotonic()
        while True:
            now = self.traffic()
            grown = {release: one.begun - begun.get(release, Traffic()).begun for release, one in now.items()}
            strays = {release: count for release, count in grown.items() if count and release not in served}
            if strays:
                # One that had its release before the change may only now reach it: the watch begins anew.
                begun, since = now, time.monotonic()
            counts = {name: grown.get(release, 0) for release, name in served.items()} if not strays else {}
            quiet = time.monotonic() - since >= min(_QUIET_S, within_s / 2)
            if time.monotonic() >= until and not quiet:
                raise UnavailableError(
                    f"After {within_s:g} s requests still begin on a release without a share: "
                    f"{', '.join(sorted(strays)) or 'a moment ago'}.",
                    hint="`sluice release drift` tells what the gateway follows.",
                )
            if time.monotonic() >= until or (quiet and sum(counts.values()) >= _ENOUGH):
                break
            time.sleep(2 * _POLL_S)
        if not sum(counts.values()):
            return f"No request came within {within_s:g} s to see it by; the gateway reports that it follows."
        seen = ", ".join(f"{count} on {name}" for name, count in counts.items())
        return f"Of the requests that began since, {seen}, and none elsewhere."

    def rotate_log(self) -> None:
        """Put a large access log aside; readers lose nothing. Raises `UnavailableError`."""
        rotate(self.settings, self._admin)

    def wait_idle(self, release: str, *, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while active := self.active_requests(release):
            if time.monotonic() >= until:
                raise UnavailableError(f"{active} request(s) still run on {release} after {timeout_s:g} s.")
            time.sleep(0.05)

    def _retreat(
        self, before: Decision, state: RouteState, previous: tuple[Target, ...], refused: Mapping[str, str]
    ) -> RouteState:
        # A copy may be older than what Envoy follows: its revision must be a new one all the same.
        revision = max(before.revision, self._published_revision()) + 1
        decision = replace(before, revision=revision, state=state, previous=previous, refused=refused)
        self._follow(decision, before, reserved=True)
        return state

    def _published_revision(self) -> int:
        try:
            return int(json.loads(self.settings.clusters_file.read_text())["version_info"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _follow(self, decision: Decision, before: Decision, *, reserved: bool = False) -> None:
        self._file.write(decision, reserved=reserved)
        known = before.state.targets()
        self._publish_clusters(decision, also=known, reserved=reserved)
        if not set(decision.state.targets()) <= set(known):
            # A route to a cluster whose servers were not looked at yet would be answered with 503.
            self._confirm(decision.revision, warm=True)
        self._publish_routes(decision, reserved=reserved)
        self._confirm(decision.revision)

    def _publish(self, decision: Decision, *, also: tuple[Target, ...], reserved: bool = False) -> None:
        self._publish_clusters(decision, also=also, reserved=reserved)
        self._publish_routes(decision, reserved=reserved)

    def _publish_clusters(self, decision: Decision, *, also: tuple[Target, ...], reserved: bool) -> None:
        """Clusters come first, so that no route names one that is missing; those just left stay for their last
        streams."""
        kept = clusters((*decision.state.targets(), *also), str(decision.revision))
        replace_file(self.settings.clusters_file, json.dumps(kept, indent=1), reserved=reserved)

    def _publish_routes(self, decision: Decision, *, reserved: bool) -> None:
        settings, key = self.settings, probe_key(self.settings)
        content = routes(settings.application, decision.state, str(decision.revision), key, settings.timeouts)
        replace_file(settings.routes_file, json.dumps(content, indent=1), mode=0o600, reserved=reserved)
        self._file.reserve()
        reserve(settings.clusters_file)
        reserve(settings.routes_file)

    def _confirm(self, revision: int, *, warm: bool = False) -> None:
        """Wait until Envoy reports the revision: of clusters, all ready (`warm`), or of clusters and routes."""
        until = time.monotonic() + self._confirm_s
        written = time.monotonic()
        wanted = dict.fromkeys(CONFIG_VERSION_STATS, str(revision))
        if warm:
            wanted = {CONFIG_VERSION_STATS[0]: str(revision), _WARMING: "0"}
        seen: dict[str, str] = {}
        while time.monotonic() < until:
            try:
                seen = self._admin.stats("version_text|warming_clusters")
            except UnavailableError:
                seen = {}
            if wanted.items() <= seen.items():
                return
            # Routes that arrive before their cluster is known are refused; a second rename offers them again.
            if not warm and time.monotonic() - written > 0.25:
                replace_file(self.settings.routes_file, self.settings.routes_file.read_text(), mode=0o600)
                written = time.monotonic()
            time.sleep(_POLL_S)
        reported = {name: seen.get(name, "nothing") for name in wanted}
        raise UnavailableError(
            f"The gateway did not confirm revision {revision} of its {'clusters' if warm else 'routes'} within "
            f"{self._confirm_s:g} s (it reports {reported}).",
            hint="Is it running, and are the servers it should reach? `sluice status` tells. A rollback stands all the "
            "same.",
        )

    def _locked(self) -> AbstractContextManager[None]:
        return held(self.settings.folder / "routes.lock")


def _describe(state: RouteState) -> str:
    if state.canary is None:
        return f"everybody on {state.stable.served_name}"
    return f"{state.weight}% on {state.canary.served_name}, the rest on {state.stable.served_name}"
