"""What users said of an answer, and what that is worth as a label."""

from __future__ import annotations

from sluice.curation.candidate import BY_CORRECTION, BY_THUMBS_UP, Candidate
from sluice.curation.records import CORRECTION, THUMB, Score, TraceRecord, latest_scores


def corrections(record: TraceRecord) -> tuple[Score, ...]:
    """The last correction of each user that says anything, oldest first."""
    latest = latest_scores(record.scores, CORRECTION)
    return tuple(s for s in latest if s.source == "user" and isinstance(s.value, str) and s.value.strip())


def thumbs(record: TraceRecord) -> tuple[Score, ...]:
    """The last thumb of each user, oldest first."""
    return tuple(s for s in latest_scores(record.scores, THUMB) if s.source == "user" and isinstance(s.value, bool))


def is_negative(record: TraceRecord) -> bool:
    """Whether a user's last word on the answer is a thumb down or a correction."""
    return bool(corrections(record)) or any(thumb.value is False for thumb in thumbs(record))


def select(candidate: Candidate) -> Candidate | str:
    """The candidate with its label and the scores that gave it, or the reason why nothing is known of it.

    Corrections first: what a person wrote is the best label. Then answers that somebody liked and nobody disliked.
    """
    record = candidate.record
    written = corrections(record)
    if written:
        last = written[-1]
        return Candidate(record, BY_CORRECTION, str(last.value).strip(), (last.id,))
    votes = thumbs(record)
    if not votes:
        return "no feedback"
    if all(vote.value is True for vote in votes):
        return Candidate(record, BY_THUMBS_UP, record.answer.strip(), tuple(sorted(vote.id for vote in votes)))
    return "users disagree" if any(vote.value is True for vote in votes) else "thumbs down, not corrected"
