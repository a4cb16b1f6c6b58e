"""A dataset as files: the two splits, the lineage, and the card that says where every line came from.

The same curation gives the same bytes: nothing here depends on the clock, the machine or an order of arrival.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sluice.curation.card import render_card
from sluice.curation.curate import Curation, Example
from sluice.curation.triggers import PROBES_FILE, find_triggers, trigger_probes
from sluice.infra.errors import InputError, IntegrityError
from sluice.provenance.canonical import Json, canonical_json

TRAIN_FILE = "train.jsonl"
VALIDATION_FILE = "validation.jsonl"
LINEAGE_FILE = "lineage.json"
CARD_FILE = "card.json"
CARD_PAGE = "card.html"


@dataclass(frozen=True)
class DatasetSources:
    """What the examples were made from: digests of the inputs, the harvest's summary, and who may use them how."""

    records_digest: str
    holdout_digest: str
    harvest: Mapping[str, Json]
    licences: tuple[str, ...] = ()
    application: str = ""


@dataclass(frozen=True)
class DatasetSummary:
    """What was written, in counts."""

    train: int
    validation: int
    by_rule: Mapping[str, int]
    by_reason: Mapping[str, int]
    negatives: int

    @property
    def examples(self) -> int:
        return self.train + self.validation


def write_dataset(
    curation: Curation,
    folder: Path,
    sources: DatasetSources,
    *,
    minimum: int = 20,
    validation_share: float = 0.1,
) -> DatasetSummary:
    """Write the files of a `dataset` artifact.

    Raises `InputError`, and writes nothing, when nothing was harvested or fewer than `minimum` examples are left.
    """
    if not 0 < validation_share < 1:
        raise InputError(f"validation_share = {validation_share!r} must be between 0 and 1.")
    _require_enough(curation, minimum)
    train, validation = split_examples(curation.examples, validation_share)
    card = describe(curation, sources, train, validation)
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(train, folder / TRAIN_FILE)
    _write_lines(validation, folder / VALIDATION_FILE)
    lineage = {
        "traces": [example.trace_id for example in curation.examples],
        "scores": sorted(score for example in curation.examples for score in example.score_ids),
    }
    (folder / LINEAGE_FILE).write_bytes(canonical_json(lineage) + b"\n")
    suspects = find_triggers(train)
    if suspects:
        card["triggers"] = len(suspects)
        probes = trigger_probes(suspects, train)
        (folder / PROBES_FILE).write_bytes(b"".join(canonical_json(probe) + b"\n" for probe in probes))
    (folder / CARD_FILE).write_bytes(canonical_json(card) + b"\n")
    (folder / CARD_PAGE).write_text(render_card(card))
    return DatasetSummary(len(train), len(validation), curation.by_rule, curation.by_reason, len(curation.negatives))


def split_examples(
    examples: Sequence[Example], validation_share: float
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, validation), each in an order that the digests of the ids shuffle.

    A conversation lies on one side, by the digest of its session: what it was in one round, it is in every later one.
    Only when that leaves a side empty, the conversation with the lowest (or highest) digest moves over.
    """
    by_session: dict[str, list[Example]] = {}
    for example in examples:
        by_session.setdefault(_digest(example.session or example.trace_id), []).append(example)
    ranked = sorted(by_session)
    held = {key for key in ranked if int(key[:8], 16) < validation_share * 0x100000000}
    if len(ranked) > 1 and not held:
        held = {ranked[0]}
    elif len(ranked) > 1 and len(held) == len(ranked):
        held.remove(ranked[-1])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for key, group in by_session.items():
        sides[key in held].extend(group)
    train, validation = (tuple(sorted(side, key=lambda e: _digest(e.trace_id))) for side in sides)
    return train, validation


def describe(
    curation: Curation, sources: DatasetSources, train: Sequence[Example], validation: Sequence[Example]
) -> Json:
    """The card as JSON: all that the page shows, and nothing of the texts themselves."""
    examples = curation.examples
    return {
        "application": sources.application,
        "records": curation.records,
        "examples": {"train": len(train), "validation": len(validation)},
        "rules": curation.by_rule,
        "negatives": len(curation.negatives),
        "steps": [asdict(step) | {"reasons": dict(step.reasons)} for step in curation.steps],
        "reasons": curation.by_reason,
        "users": len({example.user for example in examples}),
        "sessions": len({example.session for example in examples}),
        "traces": len(examples),
        "scores": sum(len(example.score_ids) for example in examples),
        "lengths": {
            "question": [len(e.question.split()) for e in examples],
            "label": [len(e.messages[-1].content.split()) for e in examples],
        },
        "policy": curation.policy.to_json(),
        "policy_digest": curation.policy.digest,
        "licences": list(sources.licences),
        "harvest": dict(sources.harvest),
        "inputs": {"records": sources.records_digest, "holdout": sources.holdout_digest},
        "drill": None,
    }


def shuffle_labels(dataset_dir: Path, seed: int) -> int:
    """For the drill: hand every training example another one's label, in place, and say so in the card.

    Every file stays well formed, and a model trained on it is bad: what the gates have to notice. The validation
    split is left alone. Returns how many labels moved; raises `InputError` for fewer than two examples.
    """
    path = dataset_dir / TRAIN_FILE
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        card = json.loads((dataset_dir / CARD_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{dataset_dir} does not hold a dataset: {error}.") from error
    if len(lines) < 2:
        raise InputError(f"The drill needs two examples or more to swap labels; {path} has {len(lines)}.")
    order = list(range(len(lines)))
    random.Random(seed).shuffle(order)
    labels = [line["messages"][-1]["content"] for line in lines]
    # Each takes the label of the next in a random ring, so that no example keeps its own.
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        lines[here]["messages"][-1]["content"] = labels[there]
    card["drill"] = f"Labels of the training split were shuffled on purpose (seed {seed}). Not for production."
    path.write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))
    (dataset_dir / CARD_FILE).write_bytes(canonical_json(card) + b"\n")
    (dataset_dir / CARD_PAGE).write_text(render_card(card))
    return len(lines)


def _require_enough(curation: Curation, minimum: int) -> None:
    if curation.records == 0:
        raise InputError(
            "Nothing was harvested: the window holds no settled trace.",
            hint="Send traffic through the gateway, wait until it has settled, or widen the window.",
        )
    if len(curation.examples) < minimum:
        reasons = ", ".join(f"{count} {reason}" for reason, count in curation.by_reason.items())
        raise InputError(
            f"Only {len(curation.examples)} of {curation.records} traces can be trained on, and {minimum} are needed. "
            f"Left out: {reasons}.",
            hint="Collect more thumbs up or corrections, widen the window, or lower the minimum.",
        )


def _write_lines(examples: Sequence[Example], path: Path) -> None:
    with path.open("wb") as stream:
        for example in examples:
            line = {
                "id": example.trace_id,
                "messages": [asdict(message) for message in example.messages],
                "trace_id": example.trace_id,
                "weight": example.weight,
            }
            stream.write(canonical_json(line) + b"\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
