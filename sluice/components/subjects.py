"""Who and what a retraining is about: pinned once, so that every later step has digests for its key."""

# No `from __future__ import annotations` here: KFP reads the annotations themselves.
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from sluice.components.task import Task, component, parse_json
from sluice.provenance.times import parse_time


@dataclass(frozen=True)
class Subjects:
    """Digests of champion, base model and index, and the window of traces as ISO 8601 times."""

    champion: str
    base: str
    index: str
    since: str
    until: str


@component
def subjects(since: str, until: str, champion: str, index: str, recipe: str, overrides: str, suite: str) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("champion", str), ("base", str), ("index", str), ("since", str), ("until", str)]
):
    """Pin what was left open: champion and index of this moment, all traces until now. Check what was chosen."""
    from dataclasses import astuple

    from sluice.components.subjects import check_choices, pin_subjects
    from sluice.components.task import task

    with task("subjects") as running:
        check_choices(recipe=recipe, overrides=overrides, suite=suite)
        found = pin_subjects(running, since=since, until=until, champion=champion, index=index)
    return astuple(found)


def check_choices(*, recipe: str, overrides: str, suite: str) -> None:
    """Recipe, overrides and suite are read now: a mistake in them is told before anything is computed."""
    from sluice.evaluation.suite import find_suite
    from sluice.training.recipe import load_recipe

    load_recipe(recipe).with_overrides(parse_json(overrides, "overrides"))
    find_suite(suite)


def pin_subjects(running: Task, *, since: str, until: str, champion: str, index: str) -> Subjects:
    """The given values, checked; what is empty is read from the ledger and the vector store."""
    from sluice.components.champion import base_digest, current_champion
    from sluice.components.index_alias import current_index
    from sluice.provenance.canonical import require_digest, short

    workspace = running.workspace
    start = parse_time(since, "since") if since else datetime.fromtimestamp(0, UTC)
    end = parse_time(until, "until") if until else datetime.now(UTC)
    found = Subjects(
        champion=require_digest(champion, "champion") if champion else current_champion(workspace),
        base=base_digest(workspace),
        index=require_digest(index, "index") if index else current_index(workspace),
        since=start.isoformat(),
        until=end.isoformat(),
    )
    running.state.values.update(asdict(found))
    running.say(f"champion {short(found.champion)}, index {short(found.index)}, traces until {end:%H:%M:%S} UTC")
    return found
