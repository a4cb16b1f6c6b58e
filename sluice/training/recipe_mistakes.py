"""A wrong recipe in sentences: each names field, line and value, and for a misspelt field the nearest known one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from sluice.infra.errors import InputError

_PREFERENCE = ("dpo", "orpo", "kto", "simpo", "ipo", "rlhf", "grpo", "ppo")
_NUMBER_WITHOUT_POINT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_NO_PREFERENCE = (
    "is not offered: NeMo AutoModel 0.7 has neither a recipe nor a loss for preference tuning; train on the preferred "
    "answers alone (method: lora)"
)


def describe(
    error: ValidationError | None,
    found: Iterable[tuple[str, str]],
    values: Any,
    lines: Mapping[tuple[str, ...], int],
    model: type[BaseModel],
    source: str,
) -> InputError:
    """All that pydantic found, and `found` (dotted field, sentence), as one error about `source`."""
    sentences = []
    for field, says in found:
        sentences.append(_sentence(field, says, values, lines))
    for problem in error.errors(include_url=False) if error else ():
        field = ".".join(str(part) for part in problem["loc"])
        kind = problem["type"]
        if kind == "cross":
            for at, says in problem["ctx"]["problems"]:
                sentences.append(_sentence(at, says, problem["ctx"]["values"], lines))
        elif kind == "field":
            field = ".".join(part for part in (field, problem["ctx"]["field"]) if part)
            default = known_fields(model)[field].get_default(call_default_factory=True)
            sentences.append(_sentence(field, problem["ctx"]["says"], values, lines, default=default))
        elif kind == "extra_forbidden":
            sentences.append(f"{field}{_where(field, lines)}: no such field{nearest(field, model)}")
        elif kind == "missing":
            sentences.append(f"{field}{_where(field, lines)}: is required and not given")
        else:
            sentences.append(_sentence(field, _says(problem), values, lines, problem["input"]))
    sentences = [sentence if sentence.endswith("?") else f"{sentence}." for sentence in sentences]
    if len(sentences) == 1:
        message = f"{source}: {sentences[0]}"
    else:
        message = f"{source} has {len(sentences)} mistakes:\n  " + "\n  ".join(sentences)
    return InputError(message, hint="`sluice recipe show` lists every field with its default and meaning.")


def nearest(field: str, model: type[BaseModel]) -> str:
    """`; did you mean ...?`: the same name in another section, or the nearest name in this one; empty without one."""
    *parents, name = field.split(".")
    here = model
    for parent in parents:
        here = _section(here, parent) or here
    by_name: dict[str, str] = {}
    for path in known_fields(model):
        by_name.setdefault(path.split(".")[-1], path)
    close = difflib.get_close_matches(name, list(here.model_fields), n=1, cutoff=0.6)
    anywhere = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.8)
    meant = by_name.get(name) or (close[0] if close else by_name[anywhere[0]] if anywhere else "")
    return f"; did you mean {meant}?" if meant else ""


def known_fields(model: type[BaseModel], above: str = "") -> dict[str, Any]:
    """Pydantic's field of each dotted name, sections themselves left out."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        below = _section(model, name)
        if below is None:
            found[above + name] = field
        else:
            found |= known_fields(below, f"{above}{name}.")
    return found


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


_MISSING = object()


def _sentence(
    field: str,
    says: str,
    values: Any,
    lines: Mapping[tuple[str, ...], int],
    given: Any = _MISSING,
    default: Any = _MISSING,
) -> str:
    if given is _MISSING:
        given = values
        for part in field.split("."):
            given = given.get(part, _MISSING) if isinstance(given, dict) else _MISSING
    given = default if given is _MISSING else given
    value = "" if given is _MISSING or isinstance(given, dict) else f" = {_short(given)}"
    return f"{field}{_where(field, lines)}{value}: {says}"


def _where(field: str, lines: Mapping[tuple[str, ...], int]) -> str:
    location = tuple(field.split("."))
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    return f" (line {line})" if line else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _says(problem: Any) -> str:
    """Pydantic's message, or ours where the cause is a habit of YAML."""
    kind, given = problem["type"], problem["input"]
    expected: str = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if kind == "literal_error" and problem["loc"] == ("method",) and str(given).lower() in _PREFERENCE:
        return _NO_PREFERENCE
    if given is None:
        return "is empty; give a value, or leave the line out for the default"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        what = "a list" if isinstance(given, list) else "a single value"
        return f"is a section: fields below it, indented, each as `name: value`, were expected, not {what}"
    if isinstance(given, str) and kind in ("float_type", "int_type", "float_parsing", "int_parsing"):
        if _NUMBER_WITHOUT_POINT.match(given):
            mantissa, exponent = f"{float(given):.1e}".split("e")
            return f"YAML 1.1 reads it as text; write it with a point and a sign: {mantissa}e{int(exponent):+d}"
        return f"{expected}; text in quotes is no number" if _is_number(given) else expected
    if isinstance(given, bool) and kind in ("string_type", "literal_error"):
        return f"{expected}; YAML 1.1 reads yes, no, on and off as true or false: write it in quotes"
    if kind == "string_pattern_mismatch" and "sha256" in problem["msg"]:
        return "is no digest: sha256: and 64 hexadecimal digits were expected"
    return expected


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
