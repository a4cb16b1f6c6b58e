"""The picture of a lineage: one HTML file that holds everything it needs and asks no network.

Columns run from the origins on the left to what came of them on the right. Large fan-outs are folded; a click on a box
shows its whole digest and what else is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from sluice.provenance.lineage import Node
from sluice.provenance.lineage_layout import Drawing, arrange

KEEP = 6
"""Children of one kind that are drawn below one node; the rest is one box that counts them."""
_WIDTH, _STEP_WIDTH, _SPACE, _TOP = 190, 140, 44, 24
_LINE = 16
_COLOURS = {
    "trace": "#2e7d5b",
    "score": "#2e7d5b",
    "user": "#2e7d5b",
    "document": "#2e7d5b",
    "step": "#5b6b7b",
    "records": "#3b6fb6",
    "dataset": "#3b6fb6",
    "corpus": "#3b6fb6",
    "chunks": "#3b6fb6",
    "holdout": "#3b6fb6",
    "adapter": "#a8541d",
    "base-model": "#a8541d",
    "index": "#7a4fa3",
    "report": "#8a6d00",
    "answers": "#8a6d00",
    "calibration": "#8a6d00",
    "evaluation": "#8a6d00",
    "benchmark": "#8a6d00",
    "safety": "#8a6d00",
    "speed": "#8a6d00",
    "decision": "#8a6d00",
}


@dataclass(frozen=True)
class _Box:
    """One drawn thing: its heading, the lines below it, and the facts that a click shows."""

    kind: str
    heading: str
    lines: tuple[str, ...]
    facts: Mapping[str, str]

    @property
    def height(self) -> float:
        return 14 + _LINE * (1 + len(self.lines))

    @property
    def width(self) -> float:
        return _STEP_WIDTH if self.kind == "step" else _WIDTH


def write_page(tree: Node, path: Path, *, forward: bool = False, serves: Mapping[str, str] | None = None) -> None:
    """Draw a tree into a file. `forward` says that it is one of descendants; `serves` tells by digest who answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(tree, forward=forward, serves=serves), encoding="utf-8")


def render_page(tree: Node, *, forward: bool = False, serves: Mapping[str, str] | None = None) -> str:
    """The page as text; the same tree gives the same page."""
    boxes, edges = _graph(_folded(tree, serves or {}), forward, serves or {})
    drawing = arrange({name: box.height for name, box in boxes.items()}, edges)
    told = "What came of" if forward else "What lies behind"
    facts = json.dumps({name: box.facts for name, box in boxes.items()}).replace("<", "\\u003c")
    return _PAGE.format(
        title=escape(f"{told} {tree.label}"),
        drawing=_svg(boxes, drawing, _key(tree)),
        facts=facts,
        root=json.dumps(_key(tree)).replace("<", "\\u003c"),
    )


def _folded(node: Node, serves: Mapping[str, str]) -> Node:
    """The tree with at most `KEEP` children of a kind below each node; those that serve users are kept first."""
    by_kind: dict[str, list[Node]] = {}
    for child in node.children:
        by_kind.setdefault(child.kind, []).append(child)
    kept: list[Node] = []
    for kind, children in by_kind.items():
        ranked = sorted(children, key=lambda one: one.digest not in serves)
        source = kind in ("trace", "score")
        shown = ranked if source or len(ranked) <= KEEP + 1 else ranked[:KEEP]
        kept.extend(_folded(child, serves) for child in shown)
        if len(shown) < len(ranked):
            left = len(ranked) - len(shown)
            kept.append(Node("more", f"and {left:,} more of kind {kind}", f"{node.digest} {kind}"))
    return replace(node, children=tuple(kept))


def _graph(tree: Node, forward: bool, serves: Mapping[str, str]) -> tuple[dict[str, _Box], list[tuple[str, str]]]:
    boxes: dict[str, _Box] = {}
    edges: list[tuple[str, str]] = []

    def join(parent: str, child: str) -> None:
        edges.append((parent, child) if forward else (child, parent))

    for node in tree.walk():
        if node.repeated or node.kind == "entry" or (node.kind in ("trace", "score") and node is not tree):
            continue
        boxes[_key(node)] = _box(node, serves.get(node.digest, ""))
    for node in tree.walk():
        sources = [child for child in node.children if child.kind in ("trace", "score")]
        if node.kind == "entry" or node.repeated:
            continue
        for child in node.children:
            if _key(child) in boxes:
                join(_key(node), _key(child))
        named = [child for child in sources if _key(child) not in boxes]
        if named or node.more:
            name = f"{_key(node)} sources"
            boxes[name] = _sources(node, named)
            join(_key(node), name)
    return boxes, edges


def _box(node: Node, serves: str) -> _Box:
    detail = dict(node.detail)
    short = node.digest.removeprefix("sha256:")[:12]
    facts = {"what": node.kind, "id" if node.kind in ("trace", "user") else "digest": node.digest} | detail
    lines: list[str] = []
    if node.kind == "step":
        lines = [_clock(detail["finished"])] if "finished" in detail else []
        return _Box("step", node.label, tuple(lines), facts)
    if node.kind in ("more", "unknown"):
        label = node.label if len(node.label) < 30 else f"{short} not stored here"
        return _Box(node.kind, label, (), {"what": node.label})
    if node.kind in ("trace", "score", "user", "document"):
        heading = "answer" if node.label.startswith("answer of") else node.kind
        return _Box(node.kind, heading, (_cut(node.digest),), facts)
    lines.append(short)
    if serves:
        lines.append(f"● serves: {serves}")
        facts["serves"] = serves
    if "removed since" in node.label:
        lines.append("removed since")
    for child in node.children:
        if child.kind == "entry":
            words, _, when = child.label.rpartition(", ")
            lines.append(_cut(words, 23))
            facts[f"ledger {child.digest[7:15]}"] = f"{words}, {when}"
    return _Box(node.kind, node.kind.replace("-", " "), tuple(lines), facts)


def _sources(node: Node, named: Iterable[Node]) -> _Box:
    ids = [child.digest for child in named]
    counts = {kind: int(node.detail.get(kind, 0)) for kind in ("traces", "scores")}
    heading = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    shown = tuple(_cut(one) for one in ids[:3])
    total = sum(counts.values())
    more = (f"and {total - len(shown):,} more",) if total > len(shown) else ()
    facts = {"what": f"named by {node.label}"} | {str(number): one for number, one in enumerate(ids[:50], start=1)}
    return _Box("trace", heading or f"{len(ids):,} traces and scores", (*shown, *more), facts)


def _svg(boxes: Mapping[str, _Box], drawing: Drawing, root: str) -> str:
    widths = [0.0] * drawing.columns
    for name, place in drawing.places.items():
        widths[place.column] = max(widths[place.column], boxes[name].width)
    lefts = [20.0]
    for width in widths:
        lefts.append(lefts[-1] + width + _SPACE)
    parts: list[str] = []
    for start, end, way in drawing.edges:
        first, last = drawing.places[start], drawing.places[end]
        points = [(lefts[first.column] + boxes[start].width, first.middle)]
        for one in way:
            points += [(lefts[one.column], one.middle), (lefts[one.column] + widths[one.column], one.middle)]
        points.append((lefts[last.column], last.middle))
        parts.append(f'<path class="edge" d="{_curve(points)}" data-a="{escape(start)}" data-b="{escape(end)}"/>')
    for name, box in boxes.items():
        place = drawing.places[name]
        left, top = lefts[place.column], place.middle - box.height / 2 + _TOP
        parts.append(_draw(name, box, left, top, name == root))
    width = lefts[-1] - _SPACE + 20
    height = drawing.height + _TOP + 24
    return (
        f'<svg width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{''.join(parts)}</svg>"
    )


def _draw(name: str, box: _Box, left: float, top: float, root: bool) -> str:
    colour = _COLOURS.get(box.kind, "#5f6368")
    hover = "\n".join(f"{key}: {value}" for key, value in box.facts.items())
    classes = (
        f"box {'step' if box.kind == 'step' else ''} {'root' if root else ''} {'more' if box.kind == 'more' else ''}"
    )
    text = [f'<text class="head" x="{left + 12:.1f}" y="{top + 19:.1f}">{escape(box.heading)}</text>']
    for number, line in enumerate(box.lines, start=1):
        good = ' class="live"' if line.startswith("●") else ""
        text.append(f'<text{good} x="{left + 12:.1f}" y="{top + 19 + number * _LINE:.1f}">{escape(line)}</text>')
    radius = box.height / 2 if box.kind == "step" and not box.lines else 12 if box.kind == "step" else 5
    bar = (
        "" if box.kind == "step" else f'<rect x="{left:.1f}" y="{top:.1f}" width="5" height="{box.height:.1f}" rx="2"/>'
    )
    return (
        f'<g class="{classes}" style="--c:{colour}" tabindex="0" data-n="{escape(name)}"><title>{escape(hover)}</title>'
        f'<rect class="body" x="{left:.1f}" y="{top:.1f}" width="{box.width}" height="{box.height:.1f}" rx="{radius}"/>'
        f"{bar}{''.join(text)}</g>"
    )


def _curve(points: list[tuple[float, float]]) -> str:
    (x, y), *rest = [(x, y + _TOP) for x, y in points]
    parts = [f"M{x:.1f} {y:.1f}"]
    for right, below in rest:
        half = (x + right) / 2
        parts.append(f"C{half:.1f} {y:.1f} {half:.1f} {below:.1f} {right:.1f} {below:.1f}")
        x, y = right, below
    return "".join(parts)


def _key(node: Node) -> str:
    return node.digest if node.kind not in ("unknown", "more") else f"{node.kind} {node.digest}"


def _cut(text: str, length: int = 22) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _clock(time: str) -> str:
    return time[:16].replace("T", " ")


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 14px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; margin: 0;
  color: #1d2730; background: #fbfbfa; }}
header {{ padding: 18px 24px 0; }}
h1 {{ font-size: 19px; margin: 0 0 2px; overflow-wrap: anywhere; }}
p {{ margin: 0; color: #5f6b76; }}
.scroll {{ overflow-x: auto; padding: 0 4px; }}
svg text {{ font: 12px ui-monospace, "DejaVu Sans Mono", monospace; fill: #4a5560; }}
svg .head {{ font: 600 13px system-ui, "DejaVu Sans", sans-serif; fill: #1d2730; }}
.edge {{ fill: none; stroke: #b6bfc7; stroke-width: 1.4; marker-end: url(#tip); }}
.edge.on {{ stroke: #d4572a; stroke-width: 2.4; }}
#tip path {{ fill: #97a2ac; }}
.box rect {{ fill: var(--c); }}
.box .body {{ fill: #fff; stroke: #cfd6dc; }}
.box.step .body {{ fill: #eef1f4; stroke: #d5dbe1; }}
.box.more .body {{ stroke-dasharray: 4 3; }}
.box.root .body {{ stroke: var(--c); stroke-width: 2.4; }}
.box:hover .body, .box.on .body {{ stroke: #d4572a; stroke-width: 2; }}
.box {{ cursor: pointer; outline: none; }}
svg .live {{ fill: #1b7a3d; font-weight: 600; }}
dl {{ margin: 8px 24px 28px; display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; }}
dt {{ color: #5f6b76; }}
dd {{ margin: 0; font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; overflow-wrap: anywhere; }}
</style>
<header><h1>{title}</h1>
<p>Origins on the left, what came of them on the right. Click a box for all that is known of it.</p>
</header>
<div class="scroll">{drawing}</div>
<dl id="facts"></dl>
<script>
const facts = {facts};
function show(name) {{
  const list = document.getElementById("facts");
  list.replaceChildren();
  for (const [key, value] of Object.entries(facts[name] || {{}})) {{
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = key; text.textContent = value; list.append(term, text);
  }}
  document.querySelectorAll(".box").forEach(box => box.classList.toggle("on", box.dataset.n === name));
  document.querySelectorAll(".edge").forEach(edge =>
    edge.classList.toggle("on", edge.dataset.a === name || edge.dataset.b === name));
}}
document.querySelectorAll(".box").forEach(box => {{
  box.addEventListener("click", () => show(box.dataset.n));
  box.addEventListener("keydown", event => event.key === "Enter" && show(box.dataset.n));
}});
show({root});
</script>
</html>
"""
