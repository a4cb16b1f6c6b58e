"""How our pages look, gate report and training report alike: one stylesheet, one palette, one way to draw a figure.

A page is one file: no script, no font or picture from elsewhere. The bytes of a drawing depend on its data alone
(fixed ids, no date).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, QUIET, RULE = "#1f2328", "#6e7781", "#d0d7de"
BEFORE, NOW = "#8c959f", "#0a66c2"
GOOD, BAD, UNSURE = "#1a7f37", "#cf222e", "#9a6700"

FIGURE_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "sluice",
}
"""Settings of matplotlib, for `matplotlib.rc_context`."""


@dataclass(frozen=True)
class Drawing:
    """One figure in both forms."""

    svg: str
    png: bytes


def page_style() -> str:
    """The stylesheet, to stand inside a page."""
    return (files("sluice.infra") / "page.css").read_text(encoding="utf-8")


def as_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def drawn(figure: Figure, dpi: int = 150) -> Drawing:
    """The figure as SVG for a page and as PNG, of `dpi` dots an inch, for MLflow."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, metadata={"Software": None})
    return Drawing(as_svg(figure), png.getvalue())
