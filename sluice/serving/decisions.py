"""What the router decided, on disk: the truth from which Envoy's files follow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sluice.infra.errors import InputError, IntegrityError, UnavailableError
from sluice.serving.durable import replace_file, reserve
from sluice.serving.routes import RouteState, Target


@dataclass(frozen=True)
class Decision:
    """The routes, who was stable before (latest last), which releases may not rise again and why, and the largest
    token that a controller came with."""

    revision: int
    state: RouteState
    previous: tuple[Target, ...] = ()
    refused: Mapping[str, str] | None = None
    token: int = 0

    def refusal(self, release: str) -> str | None:
        return (self.refused or {}).get(release)

    def to_json(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "state": self.state.to_json(),
            "previous": [vars(target) for target in self.previous],
            "refused": dict(self.refused or {}),
            "token": self.token,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Decision:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on foreign content."""
        previous = tuple(Target.from_json(target) for target in content["previous"])
        refused = {str(release): str(reason) for release, reason in content["refused"].items()}
        state = RouteState.from_json(content["state"])
        return cls(int(content["revision"]), state, previous, refused, int(content["token"]))


class DecisionFile:
    """One decision in `path`, and a copy of it beside, from which a rollback goes on when the first is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.copy = path.with_name(f"{path.stem}.copy{path.suffix}")

    def read(self) -> Decision | None:
        """The decision, None before the first. Raises `IntegrityError` when the file is damaged."""
        try:
            return Decision.from_json(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise IntegrityError(
                f"The gateway's state {str(self.path)!r} is damaged: {error}.",
                hint="`sluice rollback` sends everybody to stable and mends it from its copy. Without a copy: remove "
                "it and run `sluice up`.",
            ) from error

    def read_for_retreat(self) -> Decision | None:
        """The decision, or its copy when it is damaged. The copy may be one change old, so its canary is a hint only,
        but who is stable does not change without one. Raises `IntegrityError` when both are damaged."""
        try:
            return self.read()
        except IntegrityError:
            try:
                return Decision.from_json(json.loads(self.copy.read_text()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
                pass
            raise

    @property
    def damaged(self) -> bool:
        try:
            self.read()
        except IntegrityError:
            return True
        return False

    def write(self, decision: Decision, *, reserved: bool = False) -> None:
        """Keep it; when this returns it survives a crash. `reserved`: on a full disk too. Raises `UnavailableError`."""
        text = json.dumps(decision.to_json(), indent=1)
        replace_file(self.path, text, reserved=reserved)
        # The decision stands without its copy.
        with suppress(UnavailableError):
            replace_file(self.copy, text, reserved=reserved)

    def reserve(self) -> None:
        """Keep space aside, so that the next decision can be written on a full disk."""
        reserve(self.path)
        reserve(self.copy)
