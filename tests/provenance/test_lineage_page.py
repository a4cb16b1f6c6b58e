"""The picture: everything in one file, boxes in columns that never overlap, large fan-outs folded."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.provenance.lineage import Node
from sluice.provenance.lineage_layout import GAP, arrange
from sluice.provenance.lineage_page import KEEP, render_page

DIGESTS = [f"sha256:{number:012x}{0:052x}" for number in range(40)]


class Texts(HTMLParser):
    """What a reader of the page sees, and every address that it names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.boxes: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if "data-n" in found:
            self.boxes.append(found["data-n"] or "")


def tree() -> Node:
    traces = tuple(Node("trace", f"trace t{n}", f"t{n}") for n in range(5))
    dataset = Node("dataset", "dataset x", DIGESTS[1], traces, more=238, detail={"traces": "243"})
    step = Node("step", "train", DIGESTS[2], (dataset,), detail={"finished": "2026-11-21T13:20:00Z", "host": "a<b"})
    told = Node("entry", "approved by anna (</script><b>, 2026-11-21 13:21 UTC", DIGESTS[3])
    return Node("adapter", "adapter y", DIGESTS[0], (told, step))


def test_page_holds_everything_and_asks_no_network() -> None:
    page = render_page(tree())
    seen = Texts(page)
    assert seen.addresses == []
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert {"243 traces", "and 240 more", "train", "2026-11-21 13:20", "dataset", "000000000001"} <= set(seen.texts)
    assert set(seen.boxes) == {*DIGESTS[:3], f"{DIGESTS[1]} sources"}


def test_texts_of_others_stay_texts() -> None:
    page = render_page(tree())
    assert page.count("</script>") == 1
    assert "<b>" not in page
    assert "a<b" not in page.split("<script>")[0]


def test_the_same_tree_is_the_same_page() -> None:
    assert render_page(tree()) == render_page(tree())


def test_large_fan_outs_are_folded_and_what_serves_is_kept() -> None:
    adapters = tuple(Node("adapter", f"adapter {n}", digest) for n, digest in enumerate(DIGESTS[1:31]))
    serving = DIGESTS[30]
    page = render_page(Node("trace", "trace t", "t", adapters), forward=True, serves={serving: "100% of users"})
    seen = Texts(page)
    assert len(seen.boxes) == 1 + KEEP + 1
    assert serving in seen.boxes
    assert f"and {30 - KEEP} more of kind adapter" in seen.texts
    assert "● serves: 100% of users" in seen.texts


@settings(max_examples=60, deadline=None)
@given(
    heights=st.lists(st.floats(10, 90), min_size=1, max_size=14),
    pairs=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), max_size=30),
)
def test_boxes_never_overlap_and_edges_run_right(heights: list[float], pairs: list[tuple[int, int]]) -> None:
    boxes = {str(number): height for number, height in enumerate(heights)}
    edges = [(str(a), str(b)) for a, b in pairs if a < len(heights) and b < len(heights)]
    drawing = arrange(boxes, edges)
    assert set(drawing.places) == set(boxes)
    for start, end, way in drawing.edges:
        columns = [drawing.places[start].column, *(one.column for one in way), drawing.places[end].column]
        assert columns == list(range(columns[0], columns[0] + len(columns)))
    if all(a < b for a, b in pairs):
        assert {(start, end) for start, end, _ in drawing.edges} == set(edges)
    for column in range(drawing.columns):
        spans = sorted(
            (place.middle - boxes[box] / 2, place.middle + boxes[box] / 2)
            for box, place in drawing.places.items()
            if place.column == column
        )
        assert all(above[1] + GAP <= below[0] + 1e-6 for above, below in itertools.pairwise(spans))
        assert all(top >= -1e-6 and bottom <= drawing.height + 1e-6 for top, bottom in spans)
