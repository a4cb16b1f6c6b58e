"""The frozen holdout: questions that no round of training may ever see, chosen by digest, spread over the categories.

Chosen once and stored as an artifact. The choice depends on the ids alone, never on order, time or a random state, so
anybody can make it again and compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sluice.curation.text import normalise
from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.canonical import canonical_json

ITEMS_FILE = "items.jsonl"


@dataclass(frozen=True)
class HoldoutItem:
    """One question with the answer it should get."""

    id: str
    question: str
    reference: str
    category: str = ""


def split_holdout(
    items: Iterable[HoldoutItem], size: int, *, salt: str = "holdout-1"
) -> tuple[tuple[HoldoutItem, ...], tuple[HoldoutItem, ...]]:
    """(holdout, rest), both in the order of their ids. `size` items, each category its share by largest remainder.

    An item of the rest that asks a question of the holdout again (the same once normalised) is in neither.
    """
    every = sorted(items, key=lambda item: item.id)
    if len({item.id for item in every}) != len(every):
        raise InputError("The items of a holdout need distinct ids; some id occurs twice.")
    if not 0 < size < len(every):
        raise InputError(f"holdout size = {size} must be between 1 and {len(every) - 1}: there are {len(every)} items.")
    by_category: dict[str, list[HoldoutItem]] = {}
    for item in every:
        by_category.setdefault(item.category, []).append(item)
    quotas = _largest_remainder({name: len(group) for name, group in by_category.items()}, size)
    chosen: set[str] = set()
    for name, group in by_category.items():
        ranked = sorted(group, key=lambda item: (_rank(salt, item.id), item.id))
        chosen.update(item.id for item in ranked[: quotas[name]])
    holdout = tuple(item for item in every if item.id in chosen)
    asked = {normalise(item.question) for item in holdout}
    return holdout, tuple(item for item in every if item.id not in chosen and normalise(item.question) not in asked)


def write_holdout(items: Sequence[HoldoutItem], folder: Path) -> None:
    """items.jsonl: the file of a `holdout` artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ITEMS_FILE).write_bytes(b"".join(canonical_json(asdict(item)) + b"\n" for item in items))


def read_holdout(folder: Path) -> tuple[HoldoutItem, ...]:
    """The items of a `holdout` artifact. Raises `IntegrityError` when the file is missing or not one."""
    try:
        # Not splitlines(): it would also cut at U+2028 inside a text.
        lines = (folder / ITEMS_FILE).read_bytes().split(b"\n")
        return tuple(HoldoutItem(**json.loads(line)) for line in lines if line)
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"{folder / ITEMS_FILE} is not a holdout: {error}.") from error


def _largest_remainder(sizes: dict[str, int], seats: int) -> dict[str, int]:
    """Shares of `seats` in proportion to `sizes` (Hamilton's method); ties go to the name that sorts first."""
    total = sum(sizes.values())
    quotas = {name: size * seats // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(sizes[name] * seats % total), name))
    for name in by_remainder[: seats - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _rank(salt: str, item_id: str) -> str:
    return hashlib.sha256(f"{salt}\0{item_id}".encode()).hexdigest()
