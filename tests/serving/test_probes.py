from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sluice.infra.errors import UnavailableError
from sluice.serving.policy import default_policy
from sluice.serving.probes import ProbeReport, max_difference, record_answers, run_probes
from sluice.serving.vllm import Answer, ServedModel, VllmClient

POLICY = default_policy().probes
BASE = Answer("a b", "length", (("a", -0.5), ("b", -0.4)), {"a": -0.5, "x": -2.0})
OTHER = Answer("c d", "length", (("c", -0.1), ("d", -0.2)), {"c": -0.1, "a": -3.0})


class Scripted(VllmClient):
    """A client whose server is a table of answers."""

    def __init__(self, answers: dict[str, Answer], *, listed: bool = True) -> None:
        super().__init__("http://127.0.0.1:9")
        self.answers = answers
        self._listed = listed

    def models(self) -> tuple[ServedModel, ...]:
        return tuple(ServedModel(name, None, "") for name in self.answers if self._listed)

    def ask(self, model: str, messages: Any, *, max_tokens: int, headers: Any = None) -> tuple[Answer, dict[str, str]]:
        if model not in self.answers:
            raise UnavailableError(f"no {model}")
        return self.answers[model], {}


def probe(client: Scripted, before: tuple[Answer, ...] | None = None) -> ProbeReport:
    return run_probes(client, candidate="new", stable="old", base="base", policy=POLICY, base_before=before)


def failed(report: ProbeReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def test_a_working_adapter_passes() -> None:
    client = Scripted({"new": OTHER, "old": BASE, "base": BASE})
    report = probe(client, record_answers(client, "base", POLICY))
    assert report.passed
    assert [check.name for check in report.checks] == ["listed", "answers", "finite", "effect", "base unchanged"]


def test_an_adapter_that_does_nothing_fails() -> None:
    report = probe(Scripted({"new": BASE, "old": BASE, "base": BASE}))
    assert failed(report) == ["effect"]
    assert "does not change" in report.sentence
    # The same as the base model, though not as stable: it does nothing either.
    assert failed(probe(Scripted({"new": BASE, "old": OTHER, "base": BASE}))) == ["effect"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_passes_nothing(value: float) -> None:
    sick = dataclasses.replace(OTHER, tokens=(("c", value),))
    assert {"finite", "effect"} <= set(failed(probe(Scripted({"new": sick, "old": BASE, "base": BASE}))))


def test_silence_a_missing_name_and_a_moved_base_fail() -> None:
    mute = dataclasses.replace(OTHER, text="  ")
    assert failed(probe(Scripted({"new": mute, "old": BASE, "base": BASE}))) == ["answers"]
    assert failed(probe(Scripted({"new": OTHER, "old": BASE, "base": BASE}, listed=False))) == ["listed"]
    moved = Scripted({"new": OTHER, "old": BASE, "base": dataclasses.replace(BASE, first={"a": -1.5})})
    assert failed(probe(moved, (BASE,) * len(POLICY.prompts))) == ["base unchanged"]


def test_a_server_that_is_down_is_not_the_release_s_failure() -> None:
    with pytest.raises(UnavailableError):
        probe(Scripted({"new": OTHER, "old": BASE}))
    assert failed(probe(Scripted({"new": OTHER, "base": BASE}))) == ["reachable"]


def test_differences() -> None:
    assert max_difference((BASE,), (BASE,)) == 0
    assert max_difference((BASE,), (OTHER,)) == pytest.approx(2.5)
    assert math.isnan(max_difference((), ()))
    assert math.isnan(max_difference((BASE,), (Answer("", "stop"),)))
    assert max_difference((BASE,), (dataclasses.replace(BASE, first={"z": -1.0}),)) == math.inf
