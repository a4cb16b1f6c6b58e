"""What a candidate changes against the champion beside its weights: configuration, tokenizer and chat template.

These decide what a model does as code does, so a person sees them before approving.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass

from sluice.components.workspace import Workspace
from sluice.provenance.canonical import Json, short

TEXT = ("adapter_config.json", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer_config.json")
OPAQUE = ("special_tokens_map.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Too long to read; that they differ is said."""
LONGEST = 40
"""Lines of one file's difference that are shown."""


@dataclass(frozen=True)
class Change:
    """One file that differs. `lines` are a unified difference, cut at `LONGEST` lines; empty for long files."""

    file: str
    sentence: str
    lines: tuple[str, ...]

    def to_json(self) -> Json:
        return {"file": self.file, "sentence": self.sentence, "lines": list(self.lines)}


def changes_against(workspace: Workspace, candidate: str, champion: str) -> tuple[Change, ...]:
    """What servers would read otherwise for the candidate than for the champion, in file order."""
    old, new = _files(workspace, champion), _files(workspace, candidate)
    changes = []
    for name in sorted({*TEXT, *OPAQUE}):
        before, after = old.get(name), new.get(name)
        if before == after or (before and after and before[1] == after[1]):
            continue
        sentence = "new" if before is None else "removed" if after is None else "changed"
        lines: tuple[str, ...] = ()
        if name in TEXT:
            lines = _difference(_text(workspace, before, name), _text(workspace, after, name))
        changes.append(Change(name, f"{name}: {sentence} against champion {short(champion)}", lines))
    return tuple(changes)


def markdown_of(changes: tuple[Change, ...]) -> str:
    """The changes for the version's page; a sentence when there are none."""
    if not changes:
        return "**Configuration, tokenizer and chat template:** as the champion's."
    blocks = ["**Changed beside the weights** (read as you would read code):"]
    for change in changes:
        body = "\n".join(line.replace("```", "'''") for line in change.lines)
        blocks.append(f"{change.sentence}" + (f"\n\n```diff\n{body}\n```" if body else ""))
    return "\n\n".join(blocks)


def _files(workspace: Workspace, release: str) -> dict[str, tuple[str, str]]:
    """Artifact and digest of each file that a server reads for a release: its own, and below them its base's."""
    manifest = workspace.artifacts.manifest(release)
    base = manifest.metadata.get("base")
    found = _files(workspace, str(base)) if base else {}
    return found | {entry.path: (release, entry.digest) for entry in manifest.files}


def _text(workspace: Workspace, place: tuple[str, str] | None, name: str) -> str:
    if place is None:
        return ""
    text = workspace.file(place[0], name).decode("utf-8", "replace")
    try:
        return json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False)
    except ValueError:
        return text


def _difference(before: str, after: str) -> tuple[str, ...]:
    lines = list(
        difflib.unified_diff(before.splitlines(), after.splitlines(), "champion", "candidate", lineterm="", n=1)
    )
    return tuple(lines[:LONGEST] + ([f"... {len(lines) - LONGEST} more lines"] if len(lines) > LONGEST else []))
