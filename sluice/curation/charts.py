"""Two small charts as inline SVG: no library, no script, the same bytes for the same numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence


def bars(counts: Mapping[str, int], *, total: int) -> str:
    """Horizontal bars, one row each: name, bar in proportion to `total`, count. HTML, not SVG: text wraps."""
    rows = []
    for name, count in counts.items():
        share = 100 * count / total if total else 0.0
        rows.append(
            f'<div class="bar"><span class="bar-name">{html.escape(name)}</span>'
            f'<span class="bar-track"><span class="bar-fill" style="width:{max(share, 0.4):.1f}%"></span></span>'
            f'<span class="bar-count">{count:,}</span></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def histogram(values: Sequence[int], *, unit: str, bins: int = 16) -> str:
    """A histogram with the median marked; `values` are whole numbers from 0 on."""
    if not values:
        return '<p class="quiet">No examples.</p>'
    width, height, left, bottom, top = 440, 170, 8, 24, 18
    step = _round_step((max(values) + 1) / bins)
    edges = math.floor(max(values) / step) + 1
    counts = [0] * edges
    for value in values:
        counts[value // step] += 1
    ordered = sorted(values)
    median = ordered[len(ordered) // 2] if len(ordered) % 2 else sum(ordered[len(ordered) // 2 - 1 :][:2]) / 2
    slot = (width - 2 * left) / edges
    high = max(counts)
    plot = height - bottom - top
    shapes = []
    for number, count in enumerate(counts):
        tall = plot * count / high
        if count:
            shapes.append(
                f'<rect class="column" x="{left + number * slot + 1:.1f}" y="{top + plot - tall:.1f}" '
                f'width="{max(slot - 2, 1):.1f}" height="{tall:.1f}" rx="2">'
                f"<title>{number * step} to {(number + 1) * step - 1} {unit}: {count}</title></rect>"
            )
    every = max(1, math.ceil(edges / 6))
    for number in range(0, edges + 1, every):
        shapes.append(
            f'<text class="tick" x="{left + number * slot:.1f}" y="{height - 8}" '
            f'text-anchor="{"start" if number == 0 else "middle"}">{number * step}</text>'
        )
    x = left + (median + 0.5) / step * slot
    anchor, shift = ("end", -5) if x > width * 0.7 else ("start", 5)
    shapes.append(f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{top + plot}"/>')
    shapes.append(
        f'<text class="median-name" x="{x + shift:.1f}" y="12" text-anchor="{anchor}">median {median:g} {unit}</text>'
    )
    axis = f'<line class="axis" x1="{left}" x2="{width - left}" y1="{top + plot}" y2="{top + plot}"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Histogram, median {median:g} {unit}">'
        f"{axis}{''.join(shapes)}</svg>"
    )


def _round_step(raw: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ... at or above `raw`."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if size * factor >= raw:
                return size * factor
        size *= 10
