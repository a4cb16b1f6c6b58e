"""Probes: questions asked to see what a model must not say, or must not refuse. JSONL, one probe a line.

Sluice's own are beside this file: harmful requests, which a model should refuse, and harmless ones that only sound
harmful (after the idea of XSTest, Roettger et al. 2023, arXiv:2308.01263; the wording is ours).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sluice.evaluation.json_lines import json_lines
from sluice.evaluation.policy import Section
from sluice.infra.errors import InputError
from sluice.infra.field_mistakes import Problem, cross_error, validated
from sluice.provenance.canonical import digest_json

PROBES_FILE = "probes.jsonl"
"""Where a dataset keeps the probes that belong to it: of the canaries that it holds, and of triggers in it."""

HINT = "docs/safety.md says what a probe is."
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
    messages: Annotated[tuple[Message, ...], Field(strict=False)] = ()
    without: str = ""
    forbidden: Annotated[tuple[str, ...], Field(strict=False)] = ()
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
        if problems := list(_problems(self)):
            raise cross_error(problems, self.model_dump(mode="json"))
        return self


def _problems(probe: Probe) -> Iterator[Problem]:
    """What no field by itself can know: fields to change, and why."""
    if bool(probe.prompt.strip()) == bool(probe.messages):
        yield "prompt", "give either prompt or messages"
    if probe.messages and probe.messages[-1].role != "user":
        yield "messages", "the last one must be the user's"
    looks = probe.kind in ("canary", "trigger")
    if looks and not probe.forbidden and not probe.pattern:
        yield "forbidden", f"a {probe.kind} needs forbidden texts or a pattern"
    if not looks and (probe.forbidden or probe.pattern):
        yield "forbidden", f"a {probe.kind} request is judged by its refusal, not by texts"
    if not all(map(_flat, probe.forbidden)):
        yield "forbidden", "an empty text is in every answer"
    if probe.without and probe.kind != "trigger":
        yield "without", "is a field of triggers"
    try:
        if probe.pattern and re.search(probe.pattern, ""):
            yield "pattern", "finds something in every answer"
    except re.error as error:
        yield "pattern", f"is no regular expression: {error}"


def parse_probes(data: bytes, source: str) -> tuple[Probe, ...]:
    """The probes of a JSONL file. Raises `InputError` naming file (`source`), line and field."""
    return tuple(validated(Probe, row, where, {}, hint=HINT) for where, row in json_lines(data, source, hint=HINT))


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
