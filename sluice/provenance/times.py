"""Instants as people and files write them: ISO 8601 with an offset, never without."""

from __future__ import annotations

from datetime import UTC, datetime

from sluice.infra.errors import InputError


def parse_time(text: str, name: str) -> datetime:
    """The instant in UTC. Raises `InputError` naming the field; a time without an offset is refused."""
    try:
        instant = datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} = {text!r} is not an ISO 8601 time.", hint="Write it like this: 2026-11-21T09:00:00Z"
        ) from error
    if instant.tzinfo is None:
        raise InputError(f"{name} = {text!r} has no offset.", hint="Write it in UTC, with a Z at the end.")
    return instant.astimezone(UTC)
