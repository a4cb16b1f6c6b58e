"""A wrong file in sentences: each names field, line and value, and for a misspelt field the nearest known one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from sluice.infra.errors import InputError

M = TypeVar("M", bound=BaseModel)
Problem = tuple[str, str]
"""Dotted field, and what is wrong with it."""

_NUMBER_WITHOUT_POINT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


def validated(
    model: type[M],
    values: Any,
    source: str,
    lines: Mapping[tuple[str, ...], int],
    problems: Sequence[Problem] = (),
    *,
    hint: str = "",
    habit: Callable[[ErrorDetails], str] = lambda _: "",
    files: Mapping[str, str] | None = None,
) -> M:
    """A model of these values. Raises `InputError` with everything that is wrong, `problems` among it (`describe`)."""
    found: ValidationError | None = None
    try:
        made = model.model_validate(values)
        if not problems:
            return made
    except ValidationError as error:
        found = error
    raise describe(found, problems, values, lines, model, source, hint=hint, habit=habit, files=files) from found


def cross_error(problems: list[Problem], values: Any) -> PydanticCustomError:
    """What a validator of a whole model raises for fields (named from that model on) that do not go together."""
    return PydanticCustomError("cross", "fields do not go together", {"problems": problems, "values": values})


def describe(
    error: ValidationError | None,
    found: Iterable[Problem],
    values: Any,
    lines: Mapping[tuple[str, ...], int],
    model: type[BaseModel],
    source: str,
    *,
    hint: str = "",
    habit: Callable[[ErrorDetails], str] = lambda _: "",
    files: Mapping[str, str] | None = None,
) -> InputError:
    """All that pydantic found, and `found`, as one error about `source` with `hint`.

    `habit` may give a better sentence than pydantic's. `files` names the file of a section that is not in `source`.
    """
    files = files or {}
    sentences = [_sentence(field, says, values, lines, files) for field, says in found]
    told = error.errors(include_url=False) if error else []
    for problem in told:
        if problem["type"] == "too_short" and any(_is_below(one["loc"], problem["loc"]) for one in told):
            continue  # every entry of the list is wrong: pydantic then counts none
        parts, here = _place(problem["loc"], model)
        field = ".".join(parts)
        kind = problem["type"]
        where = _where(field, lines, files)
        if kind == "cross":
            for at, says in problem["ctx"]["problems"]:
                below = ".".join([*parts, at])
                sentences.append(
                    _sentence(below, says, values, lines, files, default=_at(problem["ctx"]["values"], at))
                )
        elif kind == "field":
            field = ".".join(part for part in (field, problem["ctx"]["field"]) if part)
            default = known_fields(model)[field].get_default(call_default_factory=True)
            sentences.append(_sentence(field, problem["ctx"]["says"], values, lines, files, default=default))
        elif kind == "extra_forbidden":
            sentences.append(f"{field}{where}: no such field{_meant(parts[-1], here, model)}")
        elif kind in ("missing", "union_tag_not_found"):
            lacks = problem["ctx"]["discriminator"].strip("'") if kind == "union_tag_not_found" else ""
            field = ".".join(part for part in (field, lacks) if part)
            sentences.append(f"{field}{where}: is required and not given")
        elif kind == "union_tag_invalid":
            field = f"{field}.{problem['ctx']['discriminator'].strip(chr(39))}"
            tag, known = problem["ctx"]["tag"], re.findall(r"'([^']+)'", problem["ctx"]["expected_tags"])
            says = f"should be {listed(known)}{meant(str(tag), known)}"
            sentences.append(_sentence(field, says, values, lines, files, default=tag))
        else:
            sentences.append(_sentence(field, habit(problem) or _says(problem), values, lines, files, problem["input"]))
    sentences = [sentence if sentence.endswith("?") else f"{sentence}." for sentence in sentences]
    if len(sentences) == 1:
        message = f"{source}: {sentences[0]}"
    else:
        message = f"{source} has {len(sentences)} mistakes:\n  " + "\n  ".join(sentences)
    return InputError(message, hint=hint)


def nearest(field: str, model: type[BaseModel]) -> str:
    """`; did you mean ...?`: the same name in another section, or the nearest name in this one; empty without one."""
    parts, here = _place(tuple(field.split(".")), model)
    return _meant(parts[-1], here, model)


def meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for the nearest of the known names; empty when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def listed(names: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last


def known_fields(model: type[BaseModel], above: str = "") -> dict[str, Any]:
    """Pydantic's field of each dotted name, sections themselves left out."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, BaseModel):
            found |= known_fields(below, f"{above}{name}.")
        else:
            found[above + name] = field
    return found


def _place(location: tuple[str | int, ...], model: type[BaseModel]) -> tuple[list[str], tuple[type[BaseModel], ...]]:
    """The field as it is written in the file, and the models that could hold its last part.

    In a list whose entries are of several kinds pydantic puts the kind into the location; no file has it there.
    """
    parts: list[str] = []
    here: tuple[type[BaseModel], ...] = (model,)
    below = here
    for part in location:
        here = below
        if isinstance(part, str) and len(here) > 1 and (chosen := tuple(one for one in here if _is_of_kind(one, part))):
            below = chosen
            continue
        parts.append(str(part))
        if not str(part).isdigit():
            fields = [one.model_fields[part] for one in here if isinstance(part, str) and part in one.model_fields]
            below = tuple(one for field in fields for one in _models(field.annotation))
    return parts, here


def _is_below(location: tuple[int | str, ...], above: tuple[int | str, ...]) -> bool:
    return len(location) > len(above) and location[: len(above)] == above


def _is_of_kind(model: type[BaseModel], kind: str) -> bool:
    return any(kind in get_args(field.annotation) for field in model.model_fields.values())


def _models(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models in a type: itself, or those of a union, a tuple, an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    return tuple(one for inner in get_args(annotation) for one in _models(inner))


def _meant(name: str, here: tuple[type[BaseModel], ...], model: type[BaseModel]) -> str:
    by_name: dict[str, str] = {}
    for path in known_fields(model):
        by_name.setdefault(path.split(".")[-1], path)
    near = {field for one in here for field in one.model_fields}
    close = difflib.get_close_matches(name, sorted(near), n=1, cutoff=0.6)
    anywhere = difflib.get_close_matches(name, list(by_name), n=1, cutoff=0.8)
    best = by_name.get(name) or (close[0] if close else by_name[anywhere[0]] if anywhere else "")
    return f"; did you mean {best}?" if best else ""


_MISSING = object()


def _at(values: Any, field: str) -> Any:
    for part in field.split("."):
        if isinstance(values, dict):
            values = values.get(part, _MISSING)
        elif isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        else:
            return _MISSING
    return values


def _sentence(
    field: str,
    says: str,
    values: Any,
    lines: Mapping[tuple[str, ...], int],
    files: Mapping[str, str],
    given: Any = _MISSING,
    default: Any = _MISSING,
) -> str:
    if given is _MISSING:
        given = _at(values, field)
    given = default if given is _MISSING else given
    value = "" if given is _MISSING or isinstance(given, dict) else f" = {_short(given)}"
    return f"{field}{_where(field, lines, files)}{value}: {says}"


def _where(field: str, lines: Mapping[tuple[str, ...], int], files: Mapping[str, str]) -> str:
    location = tuple(field.split("."))
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    file = files.get(location[0], "")
    return f" ({f'{file} ' if file else ''}line {line})" if line else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _says(problem: ErrorDetails) -> str:
    """Pydantic's message, or ours where the cause is a habit of YAML."""
    kind, given = problem["type"], problem["input"]
    expected: str = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if given is None:
        return "is empty; give a value, or leave the line out for the default"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        what = "a list" if isinstance(given, list) else "a single value"
        return f"is a section: fields below it, indented, each as `name: value`, were expected, not {what}"
    if kind == "too_short":
        return "is an empty list"
    if kind == "tuple_type":
        return "is a list: entries below it, each behind a `- `, or [a, b], were expected"
    if isinstance(given, str) and kind in ("float_type", "int_type", "float_parsing", "int_parsing"):
        if _NUMBER_WITHOUT_POINT.match(given):
            mantissa, exponent = f"{float(given):.1e}".split("e")
            return f"YAML 1.1 reads it as text; write it with a point and a sign: {mantissa}e{int(exponent):+d}"
        return f"{expected}; text in quotes is no number" if _is_number(given) else expected
    if isinstance(given, bool) and kind in ("string_type", "literal_error"):
        return f"{expected}; YAML 1.1 reads yes, no, on and off as true or false: write it in quotes"
    if kind == "literal_error" and isinstance(given, str):
        return expected + meant(given, re.findall(r"'([^']+)'", expected))
    if kind == "string_pattern_mismatch" and "sha256" in problem["msg"]:
        return "is no digest: sha256: and 64 hexadecimal digits were expected"
    return expected


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
