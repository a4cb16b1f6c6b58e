from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from sluice.infra.errors import UnavailableError
from sluice.serving.parity import ReferenceAnswer
from sluice.serving.policy import default_policy
from sluice.serving.probes import ProbeReport, Served, max_difference, run_probes
from sluice.serving.vllm import Answer, ServedModel, VllmClient
from sluice.serving.warm_up import warm_up

POLICY = default_policy().probes.model_copy(update={"at_once": 2})
BASE = Answer("a b", "length", (("a", -0.5), ("b", -0.4)), {"a": -0.5, "x": -2.0}, (1,), (1, 2))
OTHER = Answer("c d", "length", (("c", -0.1), ("d", -0.2)), {"c": -0.1, "a": -3.0}, (1,), (3, 4))
KNOWN = (ReferenceAnswer((1,), ({3: -0.1, 1: -3.0}, {4: -0.2})),) * len(POLICY.prompts)


class Scripted(VllmClient):
    """A client whose server is a table of answers."""

    def __init__(self, answers: dict[str, Answer], *, listed: bool = True, number: int = 9) -> None:
        super().__init__(f"http://127.0.0.1:{number}")
        self.answers = answers
        self._listed = listed
        self.questions: list[tuple[str, str]] = []

    def models(self) -> tuple[ServedModel, ...]:
        return tuple(ServedModel(name, None, "") for name in self.answers if self._listed)

    def ask(self, model: str, messages: Any, *, max_tokens: int, headers: Any = None) -> tuple[Answer, dict[str, str]]:
        if model not in self.answers:
            raise UnavailableError(f"no {model}")
        self.questions.append((model, messages[-1]["content"]))
        return self.answers[model], {}


def probe(
    *clients: Scripted, before: Sequence[tuple[Answer, ...]] = (), known: Sequence[ReferenceAnswer] = KNOWN
) -> ProbeReport:
    return run_probes(
        [Served(client, "new") for client in clients],
        stable=Served(clients[0], "old"),
        bases=[Served(client, "base") for client in clients],
        policy=POLICY,
        reference=known,
        parity_within=0.001,
        before=before,
    )


def failed(report: ProbeReport) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def test_a_working_adapter_passes_and_is_warm() -> None:
    client = Scripted({"new": OTHER, "old": BASE, "base": BASE})
    report = probe(client, before=[Served(client, "base").answers(POLICY)])
    assert report.passed, report.sentence
    names = ["listed", "answers", "finite", "parity", "effect", "base unchanged", "warm-up"]
    assert [check.name for check in report.checks] == names
    assert report.checks[3].figures == {"largest": 0, "mean": 0, "tokens": 6, "ties": 0}
    assert "a first token took" in report.checks[-1].sentence
    # The timed questions are new ones, and so is each that warms: a server answers what it knows from its cache.
    asked = [question for model, question in client.questions if model == "new" and question[0].isdigit()]
    assert len(set(asked)) == len(asked) == 2 + POLICY.at_once * len(POLICY.prompts)
    again = ProbeReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    assert [line.split()[0] for line in report.text.splitlines()] == ["passed"] * 7


def test_an_adapter_that_does_nothing_fails() -> None:
    same_as_base = (ReferenceAnswer((1,), ({1: -0.5}, {2: -0.4})),) * 3
    report = probe(Scripted({"new": BASE, "old": BASE, "base": BASE}), known=same_as_base)
    assert failed(report) == ["effect"]
    assert "does not change" in report.sentence
    # The same as the base model, though not as stable; and the same as stable, though not as the base: nothing new.
    assert failed(probe(Scripted({"new": BASE, "old": OTHER, "base": BASE}), known=same_as_base)) == ["effect"]
    assert failed(probe(Scripted({"new": OTHER, "old": OTHER, "base": BASE}))) == ["effect"]


def test_another_adapter_under_the_name_fails() -> None:
    wrong = Answer("e f", "length", (("e", -0.1), ("f", -0.2)), {"e": -0.1}, (1,), (5, 6))
    report = probe(Scripted({"new": wrong, "old": BASE, "base": BASE}))
    assert failed(report) == ["parity"]
    assert "no near tie" in report.sentence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_passes_nothing(value: float) -> None:
    sick = dataclasses.replace(OTHER, tokens=(("c", value), ("d", -0.2)))
    report = probe(Scripted({"new": sick, "old": BASE, "base": BASE}))
    assert {"finite", "effect", "parity"} <= set(failed(report))
    # And what is no number is told in JSON all the same.
    assert "nan" in json.dumps(report.to_json(), allow_nan=False)


def test_silence_a_missing_name_and_a_moved_base_fail() -> None:
    mute = dataclasses.replace(OTHER, text="  ")
    assert failed(probe(Scripted({"new": mute, "old": BASE, "base": BASE}))) == ["answers"]
    assert failed(probe(Scripted({"new": OTHER, "old": BASE, "base": BASE}, listed=False))) == ["listed"]
    moved = Scripted({"new": OTHER, "old": BASE, "base": dataclasses.replace(BASE, first={"a": -1.5})})
    assert failed(probe(moved, before=[(BASE,) * len(POLICY.prompts)])) == ["base unchanged"]


def test_each_replica_is_probed_and_all_agree() -> None:
    def replica(number: int, answer: Answer, **more: Any) -> Scripted:
        return Scripted({"new": answer, "old": BASE, "base": BASE}, number=number, **more)

    report = probe(replica(1, OTHER), replica(2, OTHER))
    assert report.passed, report.sentence
    assert [check.server[-1] for check in report.checks if check.name == "parity"] == ["1", "2"]
    assert [check.server[-1] for check in report.checks if check.name == "warm-up"] == ["1", "2"]
    # The second one holds another adapter under the name: it is named.
    report = probe(replica(1, OTHER), replica(2, BASE))
    assert failed(report) == ["parity", "replicas agree"]
    assert "http://127.0.0.1:2: It does not answer as" in report.sentence
    assert failed(probe(replica(1, OTHER), replica(2, OTHER, listed=False))) == ["listed"]


def test_a_server_that_is_down_is_not_the_release_s_failure() -> None:
    with pytest.raises(UnavailableError):
        probe(Scripted({"new": OTHER, "old": BASE}))
    with pytest.raises(UnavailableError, match="no old"):
        probe(Scripted({"new": OTHER, "base": BASE}))

    class Deaf(Scripted):
        def ask(self, model: str, *args: Any, **more: Any) -> tuple[Answer, dict[str, str]]:
            if model == "new":
                raise UnavailableError("it hangs")
            return super().ask(model, *args, **more)

    assert failed(probe(Deaf({"new": OTHER, "old": BASE, "base": BASE}))) == ["reachable"]


def test_questions_that_are_lost_while_warming_up_are_counted() -> None:
    class Flaky(Scripted):
        def ask(self, model: str, messages: Any, **more: Any) -> tuple[Answer, dict[str, str]]:
            if messages[-1]["content"].startswith("3."):
                raise UnavailableError("lost")
            return super().ask(model, messages, **more)

    found = warm_up(Flaky({"new": OTHER}), "new", ["a", "b"], before_s=0.5, at_once=2, max_tokens=4)
    assert (found.asked, found.lost, found.before_s) == (4, 1, 0.5)
    assert "1 without an answer" in found.sentence


def test_differences() -> None:
    assert max_difference((BASE,), (BASE,)) == 0
    assert max_difference((BASE,), (OTHER,)) == pytest.approx(2.5)
    assert math.isnan(max_difference((), ()))
    assert math.isnan(max_difference((BASE,), (Answer("", "stop"),)))
    assert max_difference((BASE,), (dataclasses.replace(BASE, first={"z": -1.0}),)) == math.inf
