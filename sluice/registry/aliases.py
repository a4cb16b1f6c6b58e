"""The aliases `champion`, `challenger` and `candidate`: a view of the ledger that people see, and that is put right.

Where we last left an alias is noted on the registered model (tags `alias.champion` and so on): so a repair can tell an
alias that somebody moved by hand from one that only lags behind the ledger. A repair of the first sort leaves the tag
`repaired.<alias>` there, which says what was found and when it was put back. Who moved it, and when, nobody knows:
MLflow keeps neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sluice.infra.errors import InputError
from sluice.provenance.canonical import require_digest, short
from sluice.registry.mlflow_registry import MlflowRegistry, RegistryMissing, unpaired
from sluice.registry.versions import NOWHERE, Version, list_versions, note_alias, place_alias, set_tag


@dataclass(frozen=True)
class Repair:
    """One thing that was not as the ledger has it, and what was done. `by_hand`: somebody had changed it in MLflow."""

    subject: str
    sentence: str
    by_hand: bool = False

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True)
class _View:
    """The registered model as MLflow shows it: alias -> version number, its tags, versions by number and digest."""

    name: str
    aliases: Mapping[str, int]
    tags: Mapping[str, str]
    numbers: Mapping[int, Version]
    digests: Mapping[str, Version]


def reconcile(
    registry: MlflowRegistry,
    application: str,
    *,
    champion_digest: str | None,
    candidate_digest: str | None,
    challenger_digest: str | None = None,
    previous_champions: Iterable[str] | None = None,
) -> list[Repair]:
    """Make MLflow's aliases say what the ledger says; returns each change, none when all was right.

    `challenger_digest` is the release in canary. The current champion gets the tag `champion` = `current`, each of
    `previous_champions` `former`; without that list, whatever was tagged before becomes `former`. A digest that MLflow
    does not know is told and left out: the ledger holds without MLflow.
    """
    wanted = {"champion": champion_digest, "challenger": challenger_digest, "candidate": candidate_digest}
    former = None if previous_champions is None else frozenset(previous_champions)
    for alias, digest in wanted.items():
        if digest is not None:
            require_digest(digest, f"{alias}_digest")
    if champion_digest is not None and champion_digest == candidate_digest:
        raise InputError(f"{short(champion_digest)} cannot be champion and candidate at once.")
    view = _view(registry, application)
    if view is None:
        named = [f"{alias} {short(digest)}" for alias, digest in wanted.items() if digest is not None]
        told = f"MLflow has no model {application!r}; the ledger names {', '.join(named)}."
        return [Repair(application, told)] if named else []
    repairs: list[Repair] = []
    for alias, digest in wanted.items():
        repairs.extend(_put_alias(registry, view, alias, digest))
    repairs.extend(_put_champion_tags(registry, view, champion_digest, former))
    return repairs


def _put_alias(registry: MlflowRegistry, view: _View, alias: str, digest: str | None) -> list[Repair]:
    said = view.tags.get(f"alias.{alias}")
    now = view.aliases.get(alias)
    target = view.digests.get(digest) if digest is not None else None
    told: list[Repair] = []
    if digest is not None and target is None:
        missing = f"The ledger's {alias} {short(digest)} has no version in MLflow; the alias is left out."
        told.append(Repair(alias, missing))
    if now != (target.number if target else None):
        # By hand: the alias is not where we last put it. Else it only lags behind the ledger.
        by_hand = said is not None and said != (NOWHERE if now is None else str(now))
        who = "was moved by hand: it" if by_hand else "lagged behind the ledger: it"
        right = _place(view, target.number if target else None)
        repair = Repair(alias, f"Alias {alias} {who} {_place(view, now)}, and now {right}.", by_hand)
        told.append(repair)
        if by_hand:
            # Before the alias itself: a crash in between finds it still moved, and says so again.
            value = f"{datetime.now(UTC).isoformat(timespec='seconds')} {repair.sentence}"
            registry.post("registered-models/set-tag", name=view.name, key=f"repaired.{alias}", value=value)
        place_alias(registry, view.name, alias, target)
    elif said != (str(target.number) if target else NOWHERE):
        note_alias(registry, view.name, alias, target)
    return told


def _put_champion_tags(
    registry: MlflowRegistry, view: _View, champion: str | None, former: frozenset[str] | None
) -> list[Repair]:
    told: list[Repair] = []
    for version in view.numbers.values():
        now = version.tags.get("champion")
        right = "current" if version.digest == champion else _history(version, former)
        if now == right:
            continue
        if right is None:
            registry.delete("model-versions/delete-tag", name=view.name, version=str(version.number), key="champion")
            never = f"Version {version.number} ({short(version.digest)}) is no champion to go back to: tag removed."
            told.append(Repair("champion", never, by_hand=True))
        else:
            set_tag(registry, version, "champion", right)
            shown = f"Version {version.number} ({short(version.digest)}) is tagged champion = {right}."
            told.append(Repair("champion", shown))
    return told


def _history(version: Version, former: frozenset[str] | None) -> str | None:
    if former is None:
        return "former" if "champion" in version.tags else None
    return "former" if version.digest in former else None


def _place(view: _View, number: int | None) -> str:
    if number is None:
        return "points nowhere"
    version = view.numbers.get(number)
    return f"points at version {number}" + (f" ({short(version.digest)})" if version else "")


def _view(registry: MlflowRegistry, application: str) -> _View | None:
    try:
        model = registry.get("registered-models/get", name=application)["registered_model"]
    except RegistryMissing:
        return None
    versions = list_versions(registry, application)
    return _View(
        name=application,
        aliases={entry["alias"]: int(entry["version"]) for entry in model.get("aliases", [])},
        tags=unpaired(model.get("tags")),
        numbers={version.number: version for version in versions},
        # Newest first: the lowest number of a digest is written last and stays.
        digests={version.digest: version for version in versions},
    )
