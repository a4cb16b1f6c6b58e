"""Values that the tests of this room share."""

from __future__ import annotations

from sluice.serving.routes import Target


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def target(letter: str, port: int = 8101) -> Target:
    return Target(digest(letter), digest(letter), f"app-{letter * 12}", (f"127.0.0.1:{port}",))


