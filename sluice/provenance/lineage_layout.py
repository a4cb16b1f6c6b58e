"""Boxes in columns: a layered drawing of an acyclic graph (K. Sugiyama, S. Tagawa, M. Toda, 1981), small and plain.

Every box lies right of all that flows into it. An edge that skips columns gets a waypoint in each, so that it runs
between boxes and not over them; boxes of a column are ordered by the mean place of their neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GAP = 18.0
WAYPOINT = 6.0
_SWEEPS = 12


@dataclass(frozen=True)
class Place:
    """Where a box or waypoint lies: its column from the left, and the middle of its height."""

    column: int
    middle: float


@dataclass(frozen=True)
class Drawing:
    """`places` by box, and for each drawn edge its (start, end) and the middles of its waypoints, column by column."""

    places: Mapping[str, Place]
    edges: tuple[tuple[str, str, tuple[Place, ...]], ...]
    columns: int
    height: float


def arrange(heights: Mapping[str, float], edges: Sequence[tuple[str, str]]) -> Drawing:
    """Places for boxes of these heights. An edge that would close a cycle is left out."""
    kept = _acyclic(list(heights), edges)
    column = _columns(list(heights), kept)
    sizes = dict(heights)
    layers: list[list[str]] = [[] for _ in range(max(column.values(), default=0) + 1)]
    for box in heights:
        layers[column[box]].append(box)
    chains: list[tuple[str, str, list[str]]] = []
    links: dict[str, list[str]] = {box: [] for box in heights}
    for number, (start, end) in enumerate(kept):
        chain = [f"\0{number}.{layer}" for layer in range(column[start] + 1, column[end])]
        for layer, waypoint in enumerate(chain, start=column[start] + 1):
            sizes[waypoint] = WAYPOINT
            links[waypoint] = []
            layers[layer].append(waypoint)
        for one, other in zip([start, *chain], [*chain, end], strict=True):
            links[one].append(other)
            links[other].append(one)
        chains.append((start, end, chain))
    middle = _middles(layers, links, sizes)
    layer_of = {box: number for number, layer in enumerate(layers) for box in layer}
    places = {box: Place(layer_of[box], middle[box]) for box in sizes}
    bottom = max((middle[box] + sizes[box] / 2 for box in sizes), default=0.0)
    return Drawing(
        {box: places[box] for box in heights},
        tuple((start, end, tuple(places[one] for one in chain)) for start, end, chain in chains),
        len(layers),
        bottom,
    )


def _acyclic(boxes: Sequence[str], edges: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    onward: dict[str, list[str]] = {box: [] for box in boxes}
    for start, end in dict.fromkeys(edges):
        onward[start].append(end)
    kept: list[tuple[str, str]] = []
    state: dict[str, int] = {}
    for root in boxes:
        if root in state:
            continue
        state[root] = 1
        stack = [(root, iter(onward[root]))]
        while stack:
            box, coming = stack[-1]
            following = next(coming, None)
            if following is None:
                state[box] = 2
                stack.pop()
            elif state.get(following) != 1:
                kept.append((box, following))
                if following not in state:
                    state[following] = 1
                    stack.append((following, iter(onward[following])))
    return kept


def _columns(boxes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The longest way from an origin; then each box moves right, next to what it flows into, for short edges."""
    before: dict[str, list[str]] = {box: [] for box in boxes}
    after: dict[str, list[str]] = {box: [] for box in boxes}
    for start, end in edges:
        before[end].append(start)
        after[start].append(end)
    column = {box: 0 for box in boxes if not before[box]}
    open_inputs = {box: len(before[box]) for box in boxes}
    waiting = list(column)
    while waiting:
        box = waiting.pop()
        for following in after[box]:
            column[following] = max(column.get(following, 0), column[box] + 1)
            open_inputs[following] -= 1
            if not open_inputs[following]:
                waiting.append(following)
    for box in sorted(boxes, key=lambda one: -column[one]):
        if after[box]:
            column[box] = min(column[following] for following in after[box]) - 1
    return column


def _middles(
    layers: list[list[str]], links: Mapping[str, Sequence[str]], sizes: Mapping[str, float]
) -> dict[str, float]:
    middle: dict[str, float] = {}

    def stack(layer: list[str]) -> None:
        top = 0.0
        for box in layer:
            middle[box] = top + sizes[box] / 2
            top += sizes[box] + GAP

    for layer in layers:
        stack(layer)

    def wanted(box: str) -> float:
        found = [middle[other] for other in links[box]]
        return sum(found) / len(found) if found else middle[box]

    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            aims = {box: wanted(box) for box in layer}
            layer.sort(key=lambda box: aims[box])
            _settle(layer, aims, sizes, middle)
    top = min((middle[box] - sizes[box] / 2 for box in middle), default=0.0)
    return {box: place - top for box, place in middle.items()}


def _settle(layer: list[str], aims: Mapping[str, float], sizes: Mapping[str, float], middle: dict[str, float]) -> None:
    """Put the boxes of a column near where they want to be, in order and without touching."""
    blocks: list[tuple[list[str], float]] = []
    for box in layer:
        blocks.append(([box], aims[box] - sizes[box] / 2))
        while len(blocks) > 1 and blocks[-2][1] + _height(blocks[-2][0], sizes) + GAP > blocks[-1][1]:
            # Two groups that would touch become one, placed where its boxes want to be on the mean.
            (upper, upper_top), (lower, lower_top) = blocks[-2], blocks[-1]
            offset = _height(upper, sizes) + GAP
            share = len(upper) + len(lower)
            top = (upper_top * len(upper) + (lower_top - offset) * len(lower)) / share
            blocks[-2:] = [([*upper, *lower], top)]
    for boxes, top in blocks:
        for box in boxes:
            middle[box] = top + sizes[box] / 2
            top += sizes[box] + GAP


def _height(boxes: Sequence[str], sizes: Mapping[str, float]) -> float:
    return sum(sizes[box] for box in boxes) + GAP * (len(boxes) - 1)
