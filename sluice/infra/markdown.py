"""Texts of files, models and other people within Markdown of ours."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~])")


def plain(text: str, limit: int = 200) -> str:
    """`text` as one line that Markdown shows literally, at most about `limit` characters of it."""
    line = " ".join(text.split())
    if len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _MARKUP.sub(r"\\\1", line)
    # Bare addresses become links in GitHub's dialect; not here.
    return line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
