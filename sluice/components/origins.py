"""What a candidate was made of, against the champion: base, recipe, data, suite, and what servers read.

The kinds of changes decide whether a second person has to approve; the sentences are for whoever does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice.components.changes import Change, changes_against
from sluice.components.workspace import Workspace
from sluice.infra.errors import IntegrityError, SluiceError
from sluice.provenance.canonical import Json, short

if TYPE_CHECKING:
    from sluice.evaluation.policy import ChangeKind
    from sluice.evaluation.suite import Suite

MOST = 6
"""Fields of one part that are named; the rest is counted."""
_LONGEST = 40
_FILES: Mapping[str, ChangeKind] = {
    "chat_template.jinja": "chat_template",
    "config.json": "configuration",
    "generation_config.json": "configuration",
}


@dataclass(frozen=True)
class Origins:
    """The kinds of changes, and all of it in words: a sentence without its full stop for each part."""

    kinds: frozenset[ChangeKind]
    sentences: tuple[str, ...]


def change_kinds(workspace: Workspace, candidate: str, champion: str, suite: Suite) -> frozenset[ChangeKind]:
    """What `compare_origins` finds, without its words."""
    return compare_origins(workspace, candidate, champion, suite).kinds


def compare_origins(workspace: Workspace, candidate: str, champion: str, suite: Suite) -> Origins:
    """Candidate against champion. A champion that no gate decided on, like the base model at first, is `first`: then
    there is nothing to compare recipe, data and suite with.

    What should be known of a champion and cannot be read counts as changed: nobody can say that it is the same.
    """
    new, old = (workspace.artifacts.manifest(one) for one in (candidate, champion))
    found: list[tuple[ChangeKind | None, str]] = []
    bases = str(old.metadata.get("base", champion)), str(new.metadata.get("base", candidate))
    found.append(_part("base", *bases, lambda: f"{_name(workspace, bases[0])} → {_name(workspace, bases[1])}"))
    decided = _decision(workspace, champion)
    if old.kind == "base-model" or decided is None:
        found.append(
            ("first", "the champion came before any gate, so there is no recipe, data or suite to compare with")
        )
    else:
        recipes = str(old.metadata.get("recipe")), str(new.metadata.get("recipe"))
        data = str(old.metadata.get("dataset")), str(new.metadata.get("dataset"))
        found.append(_part("recipe", *recipes, lambda: _recipes(workspace, champion, candidate)))
        found.append(_part("data", *data, lambda: _data(workspace, *data)))
        found.append(_part("suite", str(decided.get("suite")), suite.digest, lambda: _policies(decided, suite)))
    kinds = {kind for kind, _ in found if kind is not None}
    for change in changes_against(workspace, candidate, champion):
        kind = _kind_of(change, kinds)
        if kind is not None:
            kinds.add(kind)
            found.append((kind, change.sentence.removesuffix(f" against champion {short(champion)}")))
    return Origins(frozenset(kinds), tuple(sentence for _, sentence in found))


def _part(kind: ChangeKind, before: str, after: str, words: Callable[[], str]) -> tuple[ChangeKind | None, str]:
    if before == after:
        return None, f"{kind}: the same"
    return kind, f"{kind}: {words()}"


def _kind_of(change: Change, known: set[ChangeKind]) -> ChangeKind | None:
    """The kind of a change in a file that servers read. An adapter's own configuration follows from its recipe: it is
    news only where neither the recipe changed nor the champion is without one."""
    if change.file == "adapter_config.json":
        return None if known & {"recipe", "first"} else "configuration"
    return _FILES.get(change.file, "tokenizer")


def _decision(workspace: Workspace, champion: str) -> Mapping[str, Json] | None:
    """The decision by which the champion came, as its report has it; None when no gate decided."""
    from sluice.provenance.releases import read_state

    known = read_state(workspace.ledger).decision_for(champion)
    if known is None:
        return None
    try:
        document: Mapping[str, Json] = json.loads(workspace.file(known.report, "report.json"))["decision"]
        return document
    except (SluiceError, ValueError, KeyError):
        return {}


def _name(workspace: Workspace, base: str) -> str:
    return f"{workspace.artifacts.manifest(base).metadata.get('name', 'base model')} ({short(base)})"


def _recipes(workspace: Workspace, champion: str, candidate: str) -> str:
    """From the signed statements about both trainings, which hold the whole recipe."""
    from sluice.components.verification import verify_signature

    recipes = []
    for release in (champion, candidate):
        try:
            statement = verify_signature(workspace, release)[1]
            recipes.append(statement["predicate"]["buildDefinition"]["externalParameters"]["parameters"]["recipe"])
        except (IntegrityError, KeyError, TypeError):
            return f"another one; that of {short(release)} cannot be read"
    return _fields(*recipes) or "another one"


def _data(workspace: Workspace, before: str, after: str) -> str:
    """From the data cards of both."""
    try:
        old, new = (json.loads(workspace.file(one, "card.json")) for one in (before, after))
    except (SluiceError, ValueError):
        return f"{short(before)} → {short(after)}; a data card cannot be read"
    totals = [sum(card["examples"].values()) for card in (old, new)]
    parts = [f"{totals[1] - totals[0]:+,} examples ({totals[0]:,} → {totals[1]:,})".replace("-", "−")]
    parts += [f"{name} {old[name]:,} → {new[name]:,}" for name in ("users",) if old.get(name, 0) != new.get(name, 0)]
    for title, name in (("by rule", "rules"), ("curation policy", "policy")):
        if said := _fields(old.get(name, {}), new.get(name, {})):
            parts.append(f"{title}: {said}")
    if new.get("drill"):
        parts.append(str(new["drill"]).rstrip("."))
    return "; ".join(parts)


def _policies(decided: Mapping[str, Json], suite: Suite) -> str:
    if not decided:
        return f"the champion's cannot be read; now {suite.name}"
    said = _fields(decided["policy"], suite.policy.model_dump(mode="json"))
    return (
        f"policy: {said}" if said else f"{short(str(decided['suite']))} → {short(suite.digest)}, the policy is the same"
    )


def _fields(before: Json, after: Json) -> str:
    """`lora.rank 8 → 16, schedule.max_steps 40 → 60`: the fields that differ, `MOST` of them named."""
    old, new = dict(_flat(before)), dict(_flat(after))
    names = [name for name in dict.fromkeys([*old, *new]) if name != "name" and old.get(name) != new.get(name)]
    said = [f"{name} {_value(old, name)} → {_value(new, name)}" for name in names[:MOST]]
    more = [f"{len(names) - MOST} more fields"] if len(names) > MOST else []
    return ", ".join([*said, *more])


def _flat(value: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(below, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        for number, below in enumerate(value):
            # A check or a section is known by what it is about, wherever it stands in the list.
            label = ".".join(str(below[key]) for key in ("metric", "slice", "rule") if below.get(key)) or str(number)
            yield from _flat(below, f"{prefix}[{label}]")
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _value(fields: Mapping[str, str], name: str) -> str:
    if name not in fields:
        return "none"
    text = fields[name]
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
