"""Labelled items: answers that people judged, which a judge has to agree with before it may gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sluice.evaluation.json_lines import json_lines
from sluice.evaluation.judged_metrics import JUDGED
from sluice.evaluation.judged_scores import Sample
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json, digest_json


@dataclass(frozen=True)
class LabelledItem:
    """One answer, and what people say of it: `labels` is 1 (good) or 0 (bad) by metric. A metric that people could not
    agree on, or that does not apply, is left out."""

    sample: Sample
    labels: Mapping[str, int]
    labelled_by: str


def labelled_digest(items: tuple[LabelledItem, ...]) -> str:
    """Identity of a labelled set, whatever the order of its lines."""
    return digest_json(sorted((asdict(item) for item in items), key=lambda row: str(row["sample"]["id"])))


def read_labelled(path: Path) -> tuple[LabelledItem, ...]:
    """The labelled items of a JSONL file (docs/judge.md). Raises `InputError` naming file, line and field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"The labelled items {str(path)!r} cannot be read: {error}.") from error
    found: dict[str, LabelledItem] = {}
    for where, row in json_lines(data, str(path)):
        item = _item(row, where)
        if item.sample.id in found:
            raise InputError(f"{where}: id = {item.sample.id!r} is given twice.")
        found[item.sample.id] = item
    if not found:
        raise InputError(f"{path} holds 0 labelled items.")
    return tuple(found.values())


def _item(row: Json, where: str) -> LabelledItem:
    if not isinstance(row, dict):
        raise InputError(f"{where} must be an object with id, question, contexts, answer, reference and labels.")
    known = ("id", "question", "contexts", "answer", "reference", "labels", "labelled_by")
    if strange := sorted(set(row) - set(known)):
        raise InputError(f"{where}: {strange[0]} is no field of a labelled item; there are {', '.join(known)}.")
    for name in ("id", "question", "answer", "labelled_by"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{where}: {name} = {row.get(name)!r} must be a text that is not empty.")
    contexts, reference, labels = row.get("contexts", []), row.get("reference", ""), row.get("labels")
    if not isinstance(contexts, list) or not all(isinstance(one, str) for one in contexts):
        raise InputError(f"{where}: contexts = {contexts!r} must be a list of texts.")
    if not isinstance(reference, str):
        raise InputError(f"{where}: reference = {reference!r} must be a text.")
    if not isinstance(labels, dict) or not labels:
        raise InputError(f"{where}: labels = {labels!r} must name a metric and give it 0 or 1.")
    sample = Sample(row["id"], row["question"], row["answer"], tuple(contexts), reference)
    for metric, label in labels.items():
        if metric not in JUDGED:
            raise InputError(f"{where}: labels names {metric!r}, which no judge gives; there are {', '.join(JUDGED)}.")
        if label not in (0, 1) or isinstance(label, bool):
            raise InputError(f"{where}: labels.{metric} = {label!r} must be 0 or 1.")
        for field in JUDGED[metric].reads:
            if not getattr(sample, field):
                raise InputError(f"{where}: labels names {metric!r}, which reads {field}, and that is empty.")
    return LabelledItem(sample, labels, row["labelled_by"])
