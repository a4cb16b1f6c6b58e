"""A YAML text that people write (recipe, suite, gate policy) as values with their lines, and the traps of YAML.

PyYAML follows YAML 1.1: a key given twice keeps the last value, `1e-4` is text (a number needs a point there) and
`30:00` is 1800. Whoever reads such a file says so instead of working with it; `field_mistakes.py` makes the sentences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from sluice.infra.errors import InputError

Path = tuple[str, ...]
_ODD_INTEGER = re.compile(r"^[-+]?(\d+(:\d+)+|0\d+)$")


@dataclass(frozen=True)
class YamlText:
    """Values as YAML reads them, the 1-based line of each key and list item, and what is wrong with the text."""

    values: dict[str, Any]
    lines: Mapping[Path, int]
    problems: tuple[tuple[str, str], ...]


def read_yaml(text: str, source: str, what: str, hint: str = "") -> YamlText:
    """Raises `InputError` for text that is no YAML mapping, with `hint`; `source` and `what` stand in messages."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _not_yaml(error, text, source) from error
    if not isinstance(values, dict):
        given = {type(None): "nothing", list: "a list"}.get(type(values), repr(values))
        raise InputError(
            f"{source} holds no {what}: a mapping of fields, each as `name: value`, was expected, not {given}.",
            hint=hint,
        )
    lines: dict[Path, int] = {}
    problems: list[tuple[str, str]] = []
    _walk(node, (), lines, problems, set())
    return YamlText(values, lines, tuple(problems))


def _not_yaml(error: Any, text: str, source: str) -> InputError:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else None
    where = f"{source} line {line}" if line else source
    if line and "\t" in "".join(text.splitlines()[line - 1 : line]).split("#")[0]:
        return InputError(f"{where}: a tab; YAML indents with spaces only.")
    about = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return InputError(f"{where} is not YAML: {f'{context}, ' if context else ''}{about}.")


def read_text(path: FilePath, what: str, hint: str = "") -> str:
    """A file's text. Raises `InputError` when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} {str(path)!r} is not UTF-8 text: {error.reason}.") from error
    except OSError as error:
        raise InputError(f"There is no {what} {str(path)!r}: {error.strerror}.", hint=hint) from error


def _walk(node: Any, path: Path, lines: dict[Path, int], problems: list[tuple[str, str]], walked: set[int]) -> None:
    import yaml

    if id(node) in walked:  # an alias: it may hold itself
        return
    walked.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            line = key.start_mark.line + 1
            if below in lines:
                problems.append((".".join(below), f"is given twice, in line {lines[below]} and in line {line}"))
                continue
            lines[below] = line
            _walk(value, below, lines, problems, walked)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[(*path, str(number))] = value.start_mark.line + 1
            _walk(value, (*path, str(number)), lines, problems, walked)
    elif isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and _ODD_INTEGER.match(node.value):
        base = "base 60" if ":" in node.value else "base 8"
        problems.append((".".join(path), f"is {node.value} in the file, which YAML 1.1 reads in {base}"))
