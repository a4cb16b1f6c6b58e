"""Probes: questions asked to see what a model must not say, or must not refuse. JSONL, one probe a line.

Sluice's own are beside this file: harmful requests, which a model should refuse, and harmless ones that only sound
harmful (after the idea of XSTest, Roettger et al. 2023, arXiv:2308.01263; the wording is ours).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from importlib.resources import files
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from sluice.evaluation.policy import Section
from sluice.infra.errors import InputError
from sluice.provenance.canonical import digest_json

PROBES_FILE = "probes.jsonl"
"""Where a dataset keeps the probes that belong to it: of the canaries that it holds, and of triggers in it."""

Kind = Literal["canary", "trigger", "harmful", "harmless"]


class Message(Section):
    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Probe(Section):
    """One probe: `prompt`, or whole `messages`.

    A canary or trigger says what must not be in an answer: texts (`forbidden`; case and blanks do not count) or a
    regular expression (`pattern`; case does not count). `without` is a trigger's last message without the trigger.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")
    kind: Kind
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    without: str = ""
    forbidden: tuple[str, ...] = ()
    pattern: str = ""
    source: str = ""

    @property
    def asked(self) -> tuple[dict[str, str], ...]:
        """The messages that the model gets."""
        messages = self.messages or (Message(role="user", content=self.prompt),)
        return tuple(message.model_dump() for message in messages)

    @property
    def asked_without(self) -> tuple[dict[str, str], ...]:
        """The same without the trigger; empty when the probe does not say how that reads."""
        return (*self.asked[:-1], {"role": "user", "content": self.without}) if self.without else ()

    def found_in(self, text: str) -> str:
        """The forbidden text that `text` holds, as the probe writes it or as the pattern found it; empty for none."""
        flat = _flat(text)
        for one in self.forbidden:
            if _flat(one) in flat:
                return one
        match = re.search(self.pattern, " ".join(text.split()), re.IGNORECASE) if self.pattern else None
        return match.group() if match else ""

    @model_validator(mode="after")
    def _consistent(self) -> Probe:
        if bool(self.prompt.strip()) == bool(self.messages):
            raise ValueError("prompt: give either prompt or messages")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("messages: the last one must be the user's")
        if self.kind in ("canary", "trigger"):
            if not self.forbidden and not self.pattern:
                raise ValueError(f"forbidden: a {self.kind} needs forbidden texts or a pattern")
        elif self.forbidden or self.pattern:
            raise ValueError(f"forbidden: a {self.kind} request is judged by its refusal, not by texts")
        if any(not _flat(one) for one in self.forbidden):
            raise ValueError("forbidden: an empty text is in every answer")
        if self.without and self.kind != "trigger":
            raise ValueError("without: is a field of triggers")
        try:
            empty = bool(self.pattern) and re.search(self.pattern, "") is not None
        except re.error as error:
            raise ValueError(f"pattern = {self.pattern!r} is no regular expression: {error}") from error
        if empty:
            raise ValueError(f"pattern = {self.pattern!r} finds something in every answer")
        return self


def parse_probes(data: bytes, source: str) -> tuple[Probe, ...]:
    """The probes of a JSONL file. Raises `InputError` naming file (`source`), line and field."""
    found = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        try:
            found.append(Probe.model_validate(json.loads(line)))
        except ValidationError as error:
            raise InputError(f"{where}: {'; '.join(_sentences(error))}.") from error
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}.") from error
    return tuple(found)


def bundled_probes() -> tuple[Probe, ...]:
    """The probes that Sluice brings."""
    here = files(__name__)
    return tuple(
        probe
        for name in ("harmful.jsonl", "harmless.jsonl")
        for probe in parse_probes((here / name).read_bytes(), name)
    )


def chosen_probes(kinds: Iterable[Kind], *sets: Iterable[Probe]) -> tuple[Probe, ...]:
    """The probes of these kinds out of several sets. Raises `InputError` when two have the same id."""
    wanted = set(kinds)
    found: dict[str, Probe] = {}
    for probe in (probe for one in sets for probe in one):
        if probe.id in found:
            raise InputError(
                f"Two probes have the id {probe.id!r}: one of {_origin(found[probe.id])}, one of {_origin(probe)}."
            )
        found[probe.id] = probe
    return tuple(probe for probe in found.values() if probe.kind in wanted)


def digest_of_probes(probes: Iterable[Probe]) -> str:
    """Identity of what is asked and looked for."""
    return digest_json([probe.model_dump(mode="json") for probe in probes])


def _flat(text: str) -> str:
    """Without blanks, compatibility forms and case folded: a canary written apart is a canary still."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _origin(probe: Probe) -> str:
    return f"kind {probe.kind}" + (f" from {probe.source}" if probe.source else "")


def _sentences(error: ValidationError) -> list[str]:
    found = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        says = problem["msg"].removeprefix("Value error, ")
        found.append(f"{field} = {problem['input']!r}: {says}" if field else says)
    return found
