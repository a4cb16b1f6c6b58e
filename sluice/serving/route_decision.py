"""What a gateway was told: the routes, who was stable before, who may not rise again, and who may still change them.

Pure values: a router reads a `RouteDecision`, asks it for the next one, and writes that only if nobody wrote meanwhile.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sluice.infra.errors import ConflictError, GateRefused
from sluice.serving.routes import RouteState, StaleToken, Target

_REMEMBERED = 8
_REASON_CHARACTERS = 200
_REASONS = 200


@dataclass(frozen=True)
class RouteDecision:
    """`revision` grows by one with every change and names it in the data plane; `change` tells two writers apart who
    both wanted to make the same revision. `previous` is latest last, `refused` oldest first."""

    revision: int
    state: RouteState
    previous: tuple[Target, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    token: int = 0
    change: str = ""

    def applied(self, state: RouteState, *, expected: RouteState | None = None, token: int = 0) -> RouteDecision:
        """Raises `ConflictError`, `StaleToken` or `GateRefused` as `Router.apply` says."""
        if 0 < token < self.token:
            raise StaleToken(
                f"The token {token} is older than {self.token}: another controller moves these routes now.",
                hint="This controller must stop; `sluice release status` tells who is active.",
            )
        if expected is not None and self.state != expected:
            raise ConflictError(
                f"The routes changed meanwhile: {describe(self.state)} instead of {describe(expected)}.",
                hint="Look at `sluice release status`; a rollback by somebody else ends this rollout.",
            )
        for target in state.targets():
            reason = self.refused.get(target.release)
            if reason is not None and state.share(target.release) > self.state.share(target.release):
                raise GateRefused(
                    f"The release {target.release} was rolled back ({reason}) and may not rise again.",
                    hint="Train a new candidate; a release that failed stays out.",
                )
        previous = self.previous
        if state.stable.release != self.state.stable.release:
            others = [target for target in previous if target.release != self.state.stable.release]
            previous = (*others, self.state.stable)[-_REMEMBERED:]
        return self._next(state=state, previous=previous, token=max(token, self.token))

    def rolled_back(self, reason: str, *, absorb: bool = True) -> RouteDecision:
        """Everybody to stable; itself when there is no canary."""
        if self.state.canary is None:
            return self
        refused = self.refused
        if absorb and self.state.canary.release not in refused:
            refused = {**refused, self.state.canary.release: reason[:_REASON_CHARACTERS]}
        return self._next(state=RouteState(self.state.stable), refused=refused)

    def restored(self, reason: str) -> RouteDecision:
        """The stable release before this one again. Raises `ConflictError` when none is remembered."""
        earlier = [target for target in self.previous if target.release not in self.refused]
        if not earlier:
            raise ConflictError("The gateway remembers no earlier stable release to go back to.")
        refused = {**self.refused, self.state.stable.release: reason[:_REASON_CHARACTERS]}
        return self._next(state=RouteState(earlier[-1]), previous=tuple(earlier[:-1]), refused=refused)

    def taken_back(self, before: RouteDecision) -> RouteDecision:
        """The routes of `before` under a new revision; the token stays, so that who was replaced stays out."""
        return self._next(state=before.state, previous=before.previous)

    def again(self) -> RouteDecision:
        """The same under a new revision."""
        return self._next()

    def targets(self) -> tuple[Target, ...]:
        """Every release that the routes lead to, or that a rollback may lead to; each once."""
        return tuple({target.release: target for target in (*self.previous, *self.state.targets())}.values())

    def to_json(self) -> str:
        """Reasons of the oldest refusals are left out: an annotation holds 256 KiB, and a refusal must always fit."""
        content = asdict(self)
        old = list(self.refused)[:-_REASONS]
        content["refused"] = {**dict(self.refused), **dict.fromkeys(old, "")}
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RouteDecision:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError`, `ValueError` or `InputError` on foreign content."""
        content = json.loads(text)
        return cls(
            revision=int(content["revision"]),
            state=RouteState.from_json(content["state"]),
            previous=tuple(Target.from_json(target) for target in content["previous"]),
            refused={str(release): str(reason) for release, reason in content["refused"].items()},
            token=int(content["token"]),
            change=str(content["change"]),
        )

    def _next(self, **changes: Any) -> RouteDecision:
        return replace(self, revision=self.revision + 1, change=uuid.uuid4().hex, **changes)


def describe(state: RouteState) -> str:
    """A state in words."""
    if state.canary is None:
        return f"everybody on {state.stable.served_name}"
    return f"{state.weight}% on {state.canary.served_name}, the rest on {state.stable.served_name}"
