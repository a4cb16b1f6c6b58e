"""Labels that the retrieved passages do not support are not trained on."""

from __future__ import annotations

from dataclasses import replace

from sluice.curation.curate import curate
from sluice.curation.policy import CurationPolicy
from sluice.curation.records import Context
from tests.curation import traces

REASON = "label not supported by the retrieved passages"


def test_only_supported_labels_are_kept() -> None:
    passage = (Context("c", "A building permit takes ten weeks, longer in complex cases."),)
    supported = replace(traces.make_record(1), contexts=passage)
    supported = traces.correct(supported, "It takes ten weeks in most cases.")
    invented = replace(traces.make_record(2), contexts=passage)
    invented = traces.correct(invented, "Ask your neighbour on a sunny Tuesday afternoon.")
    result = curate([supported, invented], [], CurationPolicy(min_grounding=0.5))
    assert [example.trace_id for example in result.examples] == [supported.id]
    assert result.dropped[invented.id] == REASON


def test_a_trace_without_passages_is_not_judged_by_them() -> None:
    record = traces.correct(replace(traces.make_record(1), contexts=()), "Anything at all that a person wrote.")
    assert [example.trace_id for example in curate([record], [], CurationPolicy()).examples] == [record.id]
