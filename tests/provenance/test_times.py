"""Instants as people write them."""

from __future__ import annotations

import pytest

from sluice.infra.errors import InputError
from sluice.provenance.times import parse_time


def test_an_instant_is_told_in_utc() -> None:
    assert parse_time("2026-11-21T10:00:00+01:00", "until").isoformat() == "2026-11-21T09:00:00+00:00"


@pytest.mark.parametrize(("text", "said"), [("yesterday", "until = 'yesterday'"), ("2026-11-21T09:00:00", "offset")])
def test_what_is_no_instant_names_its_field(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_time(text, "until")
