"""The description on a model version's page: the gate's verdict for somebody who sees it for the first time.

What MLflow 3.17 makes of markdown there (looked at in a browser): lists, links, code and pictures are shown; tables
have no lines, no space between columns and no alignment; colours, quotes and most HTML are dropped; the list of
versions shows the start of the raw first line. So a table becomes aligned text in a code block where it fits, and the
first line carries the verdict. A picture is shown in its own size, about 700 pixels are there for it.
"""

from __future__ import annotations

import html
import re
import unicodedata

LIMIT = 5000
"""Characters that MLflow's database keeps of a description."""

TEXT_WIDTH = 92
"""Widest aligned table, in characters, that the page shows without cutting on a 1400 pixel screen."""

VERDICTS = {
    "pass": "Every rule of the gate holds. This version may be released once a person approves it.",
    "fail": "At least one rule of the gate is broken. This version cannot be released.",
    "inconclusive": "The evidence does not settle it, and that is not a pass. This version cannot be released.",
    "overridden": "The gate refused this version, and a named person overrode it; the decision says who and why. "
    "It may be released once a person approves it.",
}

DECIDE = (
    "**To approve:** `sluice approve {number} --reason '...'`. Or here, under Tags: add `approval.by` (your name) and "
    "`approval.reason`, and last set `approval` to `approved`; or give it the alias `approved`. To refuse: "
    "`sluice reject {number}`, or `rejected`."
)
TWO = "**Two people must approve** ({why}), one of them at least with `sluice approve`: here nobody checks a name."
SPARE = 400
"""Characters left free on a page that asks, for what is said of the approval later."""

CUT = "*(Shortened here: the gate run holds the whole report.)*"

_SAID = re.compile(r"\*\*Gate: \w+\.?\*\*\s*(?=\S)")
_RULE = re.compile(r"^\|?[\s:|-]+\|[\s:|-]*$")
_NUMBER = re.compile(r"^([+\-−]?[\d.,]+\s*(%|ms|s|x)?|–)$")


def describe(
    *,
    verdict: str,
    markdown: str,
    number: int,
    links: dict[str, str],
    picture: str | None = None,
    asks: bool = True,
    second_approver: str = "",
) -> str:
    """The page's text: verdict, what it means, the gate's own words, how to decide (if it `asks`), links, one picture.

    `markdown` is the gate's summary: paragraphs, lists, pipe tables. A leading heading is dropped (the verdict is the
    heading), so is `**Gate: PASS.**` at the start, whose sentence then stands for ours. `links` maps words to
    addresses; `second_approver` says why two people have to approve, empty: one is enough. At most `LIMIT` characters,
    `SPARE` of them left free: the gate's last paragraphs give way first.
    """
    decide = DECIDE.format(number=number) if asks and verdict in ("pass", "overridden") else ""
    if decide and second_approver:
        decide = f"{TWO.format(why=second_approver)} {decide}"
    more = " · ".join(f"[{words}]({address})" for words, address in links.items())
    ending = [part for part in (decide, more, f'<img src="{picture}">' if picture else "") if part]
    blocks = _blocks(markdown)
    opening = [f"### Gate: {verdict.upper()}"]
    if blocks and (said := _SAID.match(blocks[0])):
        blocks[0] = blocks[0][said.end() :]
    else:
        opening.append(VERDICTS[verdict])
    kept = list(blocks)
    while True:
        body = kept if len(kept) == len(blocks) else [*kept, CUT]
        text = "\n\n".join([*opening, *body, *ending])
        if len(text) <= LIMIT - SPARE:
            return text
        if not kept:
            return "\n\n".join([*opening, CUT, *ending[:-1]])[:LIMIT]
        kept.pop()


def align_tables(markdown: str) -> str:
    """The same markdown, without its title, in the form that MLflow's pages show well."""
    return "\n\n".join(_blocks(markdown))


def _blocks(markdown: str) -> list[str]:
    return [block for block in (_block(text) for text in _paragraphs(markdown)) if block]


def _paragraphs(markdown: str) -> list[str]:
    """Blocks between blank lines; a code block stays whole, a heading at the start is dropped."""
    blocks: list[str] = []
    lines: list[str] = []
    fenced = False
    for line in [*markdown.strip().splitlines(), ""]:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if line.strip() or fenced:
            lines.append(line.rstrip())
        elif lines:
            blocks.append("\n".join(lines))
            lines = []
    if fenced:
        blocks.append("\n".join([*lines, "```"]))
    if blocks and blocks[0].startswith("#"):
        rest = blocks[0].split("\n", 1)[1:]
        blocks[:1] = rest
    return blocks


def _block(block: str) -> str:
    if block.lstrip().startswith("```"):
        return block
    lines = block.splitlines()
    start = next((i for i in range(1, len(lines)) if _RULE.match(lines[i]) and "|" in lines[i - 1]), None)
    if start is None:
        return block
    rows = [_cells(line) for i, line in enumerate(lines) if i >= start - 1 and i != start and "|" in line]
    before = "\n".join(lines[: start - 1])
    after = "\n".join(line for line in lines[start:] if "|" not in line)
    return "\n\n".join(part for part in (before, _table(rows), after) if part)


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _table(rows: list[list[str]]) -> str:
    columns = max(len(row) for row in rows)
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    plain = [[_plain(cell) for cell in row] for row in filled]
    widths = [max(_width(row[i]) for row in plain) for i in range(columns)]
    if sum(widths) + 2 * (columns - 1) > TEXT_WIDTH:
        # Too wide for a code block, which does not wrap: a plain table, with space put between its
        # columns and below it.
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in filled]
        spaced = ["| " + " | ".join(f"{cell}&nbsp;&nbsp;&nbsp;" for cell in row) + " |" for row in escaped]
        return "\n".join([spaced[0], "|" + "---|" * columns, *spaced[1:], "", "&nbsp;"])
    numeric = [all(_NUMBER.match(row[i]) for row in plain[1:] if row[i]) for i in range(columns)]
    lines = []
    for row in plain:
        padded = [
            " " * (widths[i] - _width(cell)) + cell if numeric[i] else cell + " " * (widths[i] - _width(cell))
            for i, cell in enumerate(row)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(["```text", *lines, "```"])


def _plain(cell: str) -> str:
    """A cell without markup: in a code block marks, escapes and hard blanks would be shown as they are."""
    text = re.sub(r"(?<!\\)(\*\*|\*|__|`)", "", cell)
    text = html.unescape(re.sub(r"\\([^a-zA-Z0-9\s])", r"\1", text))
    return " ".join(text.replace("`", "'").split())


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))
