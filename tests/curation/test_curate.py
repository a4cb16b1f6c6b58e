from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from sluice.curation.curate import Curation, curate
from sluice.curation.holdout import HoldoutItem
from sluice.curation.policy import CurationPolicy
from sluice.curation.records import THUMB, Score, TraceRecord
from sluice.infra.errors import InputError
from tests.curation.traces import correct, make_record, thumb

HOLDOUT = (
    HoldoutItem(
        "h1", "Do I need a building permit?", "You need one for most new buildings that are larger than a shed."
    ),
    HoldoutItem("h2", "How long does it take until the municipality has decided on my application?", "Ten weeks."),
)


def reason(record: TraceRecord, **policy: float) -> str:
    limits = CurationPolicy(**policy)  # type: ignore[arg-type]
    result = curate([record], HOLDOUT, limits)
    assert len(result.examples) + len(result.dropped) == 1
    return result.dropped.get(record.id, "")


def test_evidence_decides_and_corrections_come_first() -> None:
    liked = thumb(make_record(1), True)
    corrected = correct(thumb(make_record(2), False), "  The right answer.  ")
    disliked = thumb(make_record(3), False)
    flipped = thumb(thumb(make_record(4), False), True)
    disputed = thumb(thumb(make_record(5), True, user="a"), False, user="b")
    silent = make_record(6)
    judged = replace(make_record(7), scores=(Score("j", THUMB, True, "judge", "llm", 1),))
    result = curate([liked, corrected, disliked, flipped, disputed, silent, judged], HOLDOUT)
    by_id = {example.trace_id: example for example in result.examples}
    assert set(by_id) == {liked.id, corrected.id, flipped.id}
    assert by_id[liked.id].messages == (
        *liked.messages,
        replace(liked.messages[0], role="assistant", content=liked.answer),
    )
    assert by_id[corrected.id].messages[-1].content == "The right answer."
    assert by_id[corrected.id].score_ids == (corrected.scores[1].id,)
    assert by_id[flipped.id].score_ids == (flipped.scores[1].id,)
    assert result.by_rule == {"correction": 1, "thumbs up": 2}
    assert result.by_reason == {"no feedback": 2, "thumbs down, not corrected": 1, "users disagree": 1}
    assert result.negatives == tuple(sorted([corrected.id, disliked.id, disputed.id]))


def test_what_is_not_whole_is_out_unless_a_person_wrote_the_answer() -> None:
    good = thumb(make_record(1), True)
    assert reason(replace(good, ended_ms=None)) == "half written"
    assert reason(replace(good, question=" ")) == "no question"
    assert reason(replace(good, messages=())) == "no prompt"
    assert reason(replace(good, messages=good.messages[:1])) == "no prompt"
    for broken, why in (
        (replace(good, status="error"), "request failed"),
        (replace(good, answer=" \n"), "empty answer"),
        (replace(good, finish_reason="length"), "answer cut off"),
    ):
        assert reason(broken) == why
        assert reason(correct(broken, "What is right.")) == ""
    assert reason(correct(make_record(1), "  ")) == "no feedback"


def test_labels_have_to_look_like_answers() -> None:
    record = make_record(1)
    assert reason(correct(record, record.question.upper())) == "label repeats the question"
    assert reason(correct(record, "?!...")) == "label without words"
    assert reason(correct(record, "tail \x00 of \x1b bytes")) == "label with broken characters"
    assert reason(correct(record, "was \ufffd once")) == "label with broken characters"
    assert reason(correct(record, "long " * 50), max_label=100) == "label too short or too long"
    assert reason(thumb(make_record(1, question="Ö?"), True)) == "question too short or too long"
    assert reason(correct(record, "Line one\n\tline two: 12 m² — åäö 🏠")) == ""


def test_the_holdout_is_never_trained_on() -> None:
    def asked(question: str) -> str:
        return reason(thumb(make_record(1, question=question), True))

    assert asked("do i NEED a building-permit") == "question of the holdout"
    assert asked("Do I need the building permit?") == ""
    assert asked("Do I even need a building permit?") == "nearly a question of the holdout"
    run = "Please say how long does it take until the municipality has answered?"
    assert asked(run) == "shares 8 words in a row with the holdout"
    leaked = correct(make_record(2), HOLDOUT[0].reference.upper())
    assert reason(leaked) == "answer of the holdout"
    assert reason(correct(make_record(2), "Ten weeks.")) == ""


def test_one_example_for_each_question() -> None:
    older = thumb(make_record(1, question="What is a plot?"), True)
    newer = thumb(make_record(2, question="what is a PLOT"), True)
    corrected = correct(make_record(0, question="What is a plot"), "A piece of land.")
    result = curate([older, newer], HOLDOUT)
    assert [e.trace_id for e in result.examples] == [newer.id]
    result = curate([older, newer, corrected], HOLDOUT)
    assert [e.trace_id for e in result.examples] == [corrected.id]
    assert result.by_reason == {"same question again": 2}


def test_one_user_cannot_flood_a_dataset() -> None:
    flood = [thumb(make_record(n, user="mallory"), True) for n in range(300)]
    others = [thumb(make_record(n, user=f"user-{n}"), True) for n in range(300, 310)]
    fixed = correct(make_record(500, user="mallory"), "Written by hand.")
    result = curate([*flood, *others, fixed], HOLDOUT, CurationPolicy(cap_per_user=25))
    mallory = [e for e in result.examples if e.user == "mallory"]
    assert len(mallory) == 25
    assert fixed.id in {e.trace_id for e in mallory}
    assert len(result.examples) == 35
    # Not simply the first of the flood.
    assert {e.trace_id for e in mallory} - {r.id for r in flood[:60]}


def mixed() -> list[TraceRecord]:
    records: list[TraceRecord] = []
    for n in range(60):
        record = make_record(n, question=f"What about topic {n % 40}?")
        records.append([thumb(record, True), thumb(record, False), correct(record, f"Fixed {n}."), record][n % 4])
    return records


def account(result: Curation) -> Sequence[int]:
    return [step.before - step.after - sum(step.reasons.values()) for step in result.steps]


def test_every_record_is_accounted_for_and_order_does_not_matter() -> None:
    records = mixed()
    first = curate(records, HOLDOUT)
    assert account(first) == [0] * len(first.steps)
    assert len(first.examples) + sum(first.by_reason.values()) == len(records) == first.records
    random.Random(7).shuffle(records)
    assert curate([*records, records[0]], HOLDOUT) == first


def test_a_deleted_trace_is_not_trained_on() -> None:
    records = [thumb(make_record(n), True) for n in range(3)]
    result = curate(records, HOLDOUT, existing={records[0].id, records[2].id})
    assert [e.trace_id for e in result.examples] == [records[0].id, records[2].id]
    assert result.by_reason == {"deleted in the trace store": 1}
    assert "not deleted" in [step.name for step in result.steps]
    assert "not deleted" not in [step.name for step in curate(records, HOLDOUT).steps]


def test_a_policy_has_an_identity_and_limits() -> None:
    assert CurationPolicy().digest == CurationPolicy().digest != CurationPolicy(cap_per_user=5).digest
    with pytest.raises(InputError, match="cap_per_user = 0"):
        CurationPolicy(cap_per_user=0)
    with pytest.raises(InputError, match="holdout_overlap"):
        CurationPolicy(holdout_overlap=1.5)
    with pytest.raises(InputError, match="min_label = 50 is above max_label"):
        CurationPolicy(min_label=50, max_label=10)
