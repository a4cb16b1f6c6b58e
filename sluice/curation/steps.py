"""The curation's steps, in order. Each reason is a phrase that a data card can print."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence

from sluice.curation.candidate import BY_CORRECTION, Candidate, CurationStep, Verdicts
from sluice.curation.evidence import corrections, select
from sluice.curation.holdout import HoldoutItem
from sluice.curation.policy import CurationPolicy
from sluice.curation.text import grams, normalise, overlap, words

_TRUNCATED = ("length", "max_tokens")


def curation_steps(
    holdout: Sequence[HoldoutItem], policy: CurationPolicy, existing: Collection[str] | None
) -> tuple[CurationStep, ...]:
    """All steps. Cheap and certain ones first; the cap last, so that it counts only what would be trained on."""
    # A check that was not made must not stand on the card as one that everything passed.
    asked = () if existing is None else (CurationStep("not deleted", _each(_still_there(frozenset(existing)))),)
    return (
        CurationStep("complete", _each(_complete)),
        *asked,
        CurationStep("evidence", _select),
        CurationStep("shape", _each(_shape(policy))),
        CurationStep("grounded", _each(_grounded(policy))),
        CurationStep("holdout", _each(_decontaminate(holdout, policy))),
        CurationStep("duplicates", _first_of_each_question),
        CurationStep("cap per user", _cap(policy.cap_per_user)),
    )


def _each(reason_of: Callable[[Candidate], str]) -> Callable[[Sequence[Candidate]], Verdicts]:
    """A step that looks at one candidate at a time; an empty reason keeps it."""

    def decide(candidates: Sequence[Candidate]) -> Verdicts:
        reasons = {candidate.record.id: reason_of(candidate) for candidate in candidates}
        kept = tuple(candidate for candidate in candidates if not reasons[candidate.record.id])
        return Verdicts(kept, {trace_id: reason for trace_id, reason in reasons.items() if reason})

    return decide


def _complete(candidate: Candidate) -> str:
    record = candidate.record
    roles = [message.role for message in record.messages]
    if not record.finished:
        return "half written"
    if not record.question.strip():
        return "no question"
    if not roles or roles[-1] != "user" or not record.messages[-1].content.strip():
        return "no prompt"
    # What went wrong with the answer does not matter where a person wrote the right one.
    if corrections(record):
        return ""
    if record.status == "error":
        return "request failed"
    if not record.answer.strip():
        return "empty answer"
    return "answer cut off" if record.finish_reason in _TRUNCATED else ""


def _still_there(existing: frozenset[str]) -> Callable[[Candidate], str]:
    return lambda candidate: "" if candidate.record.id in existing else "deleted in the trace store"


def _select(candidates: Sequence[Candidate]) -> Verdicts:
    kept, dropped = [], {}
    for candidate in candidates:
        chosen = select(candidate)
        if isinstance(chosen, str):
            dropped[candidate.record.id] = chosen
        else:
            kept.append(chosen)
    return Verdicts(tuple(kept), dropped)


def _shape(policy: CurationPolicy) -> Callable[[Candidate], str]:
    def reason_of(candidate: Candidate) -> str:
        question, label = candidate.record.question.strip(), candidate.label
        if not policy.min_question <= len(question) <= policy.max_question:
            return "question too short or too long"
        if not policy.min_label <= len(label) <= policy.max_label:
            return "label too short or too long"
        if not words(label):
            return "label without words"
        if normalise(label) == normalise(question):
            return "label repeats the question"
        return "label with broken characters" if _broken(label) else ""

    return reason_of


def _grounded(policy: CurationPolicy) -> Callable[[Candidate], str]:
    """A label that its passages do not support teaches the model to make things up.

    The measure is K-precision, the share of an answer's words that stand in the passages (Adlakha et al. 2024,
    "Evaluating Correctness and Faithfulness of Instruction-Following Models for Question Answering", TACL 12).
    """

    def reason_of(candidate: Candidate) -> str:
        if not candidate.record.contexts:
            return ""
        known = {word for context in candidate.record.contexts for word in words(context.text)}
        label = words(candidate.label)
        share = sum(word in known for word in label) / len(label)
        return "" if share >= policy.min_grounding else "label not supported by the retrieved passages"

    return reason_of


def _broken(text: str) -> bool:
    """Control, unassigned or private characters, or U+FFFD: bytes that were text once, or never were."""
    return any(
        character == "\ufffd" or (unicodedata.category(character) in ("Cc", "Cn", "Co") and character not in "\n\t\r")
        for character in text
    )


def _decontaminate(holdout: Sequence[HoldoutItem], policy: CurationPolicy) -> Callable[[Candidate], str]:
    held = [words(item.question) for item in holdout]
    questions = {" ".join(tokens) for tokens in held}
    # Short answers ("Yes.") are anybody's.
    references = {normalise(i.reference) for i in holdout if len(words(i.reference)) >= policy.holdout_gram}
    runs = frozenset(run for tokens in held for run in grams(tokens, policy.holdout_gram))
    # Only holdout questions that share a word can overlap: an index by word instead of a look at all of them.
    by_word: dict[str, list[frozenset[str]]] = {}
    for bag in (frozenset(tokens) for tokens in held):
        for word in bag:
            by_word.setdefault(word, []).append(bag)

    def reason_of(candidate: Candidate) -> str:
        tokens = words(candidate.record.question)
        if " ".join(tokens) in questions:
            return "question of the holdout"
        if normalise(candidate.label) in references:
            return "answer of the holdout"
        if not runs.isdisjoint(grams(tokens, policy.holdout_gram)):
            return f"shares {policy.holdout_gram} words in a row with the holdout"
        bag = frozenset(tokens)
        near = {other for word in bag for other in by_word.get(word, ())}
        if any(overlap(bag, other) >= policy.holdout_overlap for other in near):
            return "nearly a question of the holdout"
        return ""

    return reason_of


def _first_of_each_question(candidates: Sequence[Candidate]) -> Verdicts:
    """One example for each question: a correction before a liked answer, and of equals the newest."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        key = normalise(candidate.record.question)
        if key not in best or _strength(candidate) > _strength(best[key]):
            best[key] = candidate
    return _keep(candidates, best.values(), "same question again")


def _strength(candidate: Candidate) -> tuple[bool, int, str]:
    return candidate.rule == BY_CORRECTION, candidate.record.started_ms, candidate.record.id


def _cap(limit: int) -> Callable[[Sequence[Candidate]], Verdicts]:
    def decide(candidates: Sequence[Candidate]) -> Verdicts:
        by_user: dict[str, list[Candidate]] = {}
        for candidate in candidates:
            by_user.setdefault(candidate.record.user, []).append(candidate)
        kept: list[Candidate] = []
        for group in by_user.values():
            # By digest and not by time: who floods cannot choose which of the flood is kept.
            ranked = sorted(group, key=lambda c: (c.rule != BY_CORRECTION, _digest(c.record.id)))
            kept += ranked[:limit]
        return _keep(candidates, kept, "above the cap of its user")

    return decide


def _keep(candidates: Sequence[Candidate], kept: Iterable[Candidate], reason: str) -> Verdicts:
    ids = {candidate.record.id for candidate in kept}
    return Verdicts(
        tuple(candidate for candidate in candidates if candidate.record.id in ids),
        {candidate.record.id: reason for candidate in candidates if candidate.record.id not in ids},
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
