"""What a release must show before it gets a user: it is there, it answers as it was trained to, it does something, it
disturbs nobody, and it does so on every server that will serve it.

Answers are compared by the log-probabilities of greedy decoding: of the most likely first tokens, and of the common
beginning of the two answers. Two runs of one model agree to some hundredths of a nat in bfloat16 (the batch changes
the order of sums); an adapter that was trained moves them by tenths and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sluice.infra.errors import UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.serving.parity import ReferenceAnswer, compare
from sluice.serving.policy import ProbePolicy
from sluice.serving.vllm import Answer, VllmClient
from sluice.serving.warm_up import first_token_s, warm_up


@dataclass(frozen=True)
class ProbeCheck:
    """One probe: its name, whether it passed, a sentence, the server it is about (empty: all, or the gateway) and what
    was measured, by name (nats, seconds, bytes or counts)."""

    name: str
    passed: bool
    sentence: str
    server: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ProbeCheck:
        """The inverse of `asdict`, also where a figure that is no number was written as text."""
        figures = {name: float(value) for name, value in content["figures"].items()}
        return cls(**{**content, "figures": figures})


@dataclass(frozen=True)
class ProbeReport:
    """All probes of one release: a table of name, server, passed, sentence and figures."""

    served_name: str
    checks: tuple[ProbeCheck, ...]

    @property
    def passed(self) -> bool:
        """Every probe passed, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def sentence(self) -> str:
        """The failures, or that there were none."""
        failures = [f"{_at(check)}{check.sentence}" for check in self.checks if not check.passed]
        return " ".join(failures) or f"All {len(self.checks)} probes passed."

    @property
    def text(self) -> str:
        """The table in words, a line for each probe."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = (
            f"{'passed' if check.passed else 'FAILED'}  {check.name:{width}}  {_at(check)}{check.sentence}"
            for check in self.checks
        )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        for check in checks:
            # What is not a number is not JSON either.
            figures = check["figures"].items()
            check["figures"] = {name: value if math.isfinite(value) else str(value) for name, value in figures}
        return {"served_name": self.served_name, "passed": self.passed, "sentence": self.sentence, "checks": checks}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ProbeReport:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` on foreign content."""
        return cls(str(content["served_name"]), tuple(ProbeCheck.from_json(check) for check in content["checks"]))


@dataclass(frozen=True)
class Served:
    """A model at a server."""

    client: VllmClient
    name: str

    def answers(self, policy: ProbePolicy) -> tuple[Answer, ...]:
        """Its answers to the probe prompts: take the base model's before an adapter is loaded beside it."""
        return tuple(_ask(self.client, self.name, prompt, policy) for prompt in policy.prompts)


def run_probes(
    replicas: Sequence[Served],
    *,
    stable: Served,
    bases: Sequence[Served],
    policy: ProbePolicy,
    reference: Sequence[ReferenceAnswer],
    parity_within: float,
    before: Sequence[tuple[Answer, ...]] = (),
    report: Report = no_report,
) -> ProbeReport:
    """Probe a release at each server that holds it, against `stable` and the base models, directly at the servers.

    `reference` is what the training library says to the policy's prompts. `bases` are the base models whose answers it
    may not move, `before` what they said before it was loaded (empty: they are not looked at again). When a
    replica does not answer, the base model and stable are asked: `UnavailableError` when they do not either, since that
    says nothing about the release.
    """
    probing = _Probing(replicas[0].name, policy, report, 1 + 6 * len(replicas) + len(before) + (len(replicas) > 1))
    try:
        probing.run(replicas, stable, bases, reference, parity_within, before)
    except UnavailableError as error:
        for other in dict.fromkeys((bases[0], stable)):
            _ask(other.client, other.name, policy.prompts[0], policy)
        probing.note("reachable", False, error.message)
    return ProbeReport(replicas[0].name, tuple(probing.checks))


class _Probing:
    """Gathers the checks of one release."""

    def __init__(self, name: str, policy: ProbePolicy, report: Report, total: int) -> None:
        self.checks: list[ProbeCheck] = []
        self._name, self._policy, self._report, self._total = name, policy, report, total

    def note(self, name: str, passed: bool, sentence: str, server: str = "", **figures: float) -> None:
        self.checks.append(ProbeCheck(name, passed, sentence, server, figures))
        self._report(len(self.checks), max(self._total, len(self.checks)), name)

    def run(
        self,
        replicas: Sequence[Served],
        stable: Served,
        bases: Sequence[Served],
        reference: Sequence[ReferenceAnswer],
        parity_within: float,
        before: Sequence[tuple[Answer, ...]],
    ) -> None:
        policy, first = self._policy, replicas[0]
        listed = [self._listed(replica) for replica in replicas]
        if not all(listed):
            return
        # The very first question to the adapter: what a user would pay without the warming up.
        cold = [first_token_s(replica.client, replica.name, f"0. {policy.prompts[0]}") for replica in replicas]
        answers = [replica.answers(policy) for replica in replicas]
        for replica, said in zip(replicas, answers, strict=True):
            self._sound(replica, said)
            parity = compare(said, reference, limit=parity_within)
            figures = {"largest": parity.largest, "mean": parity.mean, "tokens": parity.tokens, "ties": parity.ties}
            sentence = parity.sentence(parity_within)
            self.note("parity", parity.within(parity_within), sentence, replica.client.url, **figures)
        others = {other: other.answers(policy) for other in dict.fromkeys((stable, bases[0]))}
        effects = [max_difference(answers[0], said) for said in others.values()]
        least = math.nan if any(math.isnan(effect) for effect in effects) else min(effects)
        acts = least > policy.effect_above
        text = "changes" if acts else "does not change"
        sentence = f"The adapter {text} the answers (by {least:.3f} nats; {policy.effect_above:g} needed)."
        self.note("effect", acts, sentence, first.client.url, from_champion=effects[0], from_base=effects[-1])
        for base, earlier in zip(bases, before, strict=False):
            moved = max_difference(earlier, others.get(base) or base.answers(policy))
            kept = moved <= policy.base_within
            text = "as before" if kept else "not as before"
            sentence = f"The base model answers {text} (by {moved:.3f} nats)."
            self.note("base unchanged", kept, sentence, base.client.url, moved=moved)
        if len(replicas) > 1:
            apart = [max_difference(answers[0], said) for said in answers[1:]]
            furthest = math.nan if any(math.isnan(value) for value in apart) else max(apart)
            same = furthest <= policy.base_within
            text = "the same" if same else "different things"
            sentence = f"All {len(replicas)} servers say {text} (differing by {furthest:.3f} nats)."
            self.note("replicas agree", same, sentence, furthest=furthest)
        if all(check.passed for check in self.checks):
            for replica, seconds in zip(replicas, cold, strict=True):
                self._warm(replica, seconds)

    def _listed(self, replica: Served) -> bool:
        listed = replica.name in {model.name for model in replica.client.models()}
        text = "lists" if listed else "does not list"
        self.note("listed", listed, f"vLLM {text} {replica.name}.", replica.client.url)
        return listed

    def _sound(self, replica: Served, answers: Sequence[Answer]) -> None:
        texts = sum(bool(answer.text.strip()) for answer in answers)
        enough = texts >= self._policy.answered * len(answers)
        sentence = f"{texts} of {len(answers)} probe prompts got an answer."
        self.note("answers", enough, sentence, replica.client.url, answered=texts, asked=len(answers))
        numbers = [value for answer in answers for _, value in answer.tokens]
        sound = bool(numbers) and all(math.isfinite(value) for value in numbers)
        sentence = f"Its log-probabilities are {'' if sound else 'not '}all finite numbers."
        self.note("finite", sound, sentence, replica.client.url, numbers=len(numbers))

    def _warm(self, replica: Served, cold_s: float) -> None:
        policy = self._policy
        found = warm_up(
            replica.client,
            replica.name,
            policy.prompts,
            before_s=cold_s,
            at_once=policy.at_once,
            max_tokens=policy.max_tokens,
        )
        self.note("warm-up", not found.lost, found.sentence, replica.client.url, **asdict(found))


def probe_gateway(
    gateway: VllmClient,
    server: VllmClient,
    *,
    application: str,
    candidate: str,
    release: str,
    headers: Mapping[str, str],
    policy: ProbePolicy,
) -> ProbeReport:
    """Does the gateway's canary route lead to this release, and does the same answer come out?

    `headers` are the router's probe headers for the canary; `candidate` its served name at `server`.
    """
    checks: list[ProbeCheck] = []
    try:
        prompt = policy.prompts[0]
        direct = _ask(server, candidate, prompt, policy)
        routed, answered = gateway.ask(
            application, _messages(prompt), max_tokens=policy.max_tokens, headers=dict(headers)
        )
        named = answered.get("x-sluice-release", "nothing")
        checks.append(ProbeCheck("routed", named == release, f"The gateway's canary route leads to {named}."))
        difference = max_difference((direct,), (routed,))
        same = difference <= policy.base_within
        text = "the same answer" if same else "another answer"
        sentence = f"Through the gateway comes {text} (by {difference:.3f} nats)."
        checks.append(ProbeCheck("same answer", same, sentence, figures={"difference": difference}))
    except UnavailableError as error:
        checks.append(ProbeCheck("reachable", False, error.message))
    return ProbeReport(candidate, tuple(checks))


def max_difference(one: tuple[Answer, ...], other: tuple[Answer, ...]) -> float:
    """The largest difference of log-probabilities (nats) over pairs of answers.

    Compared are the most likely first tokens that both name, and the tokens of the common beginning. Infinite where
    two answers share no first token; not a number where there is nothing to compare (which passes no check).
    """
    if len(one) != len(other) or not one:
        return math.nan
    differences = [_difference(a, b) for a, b in zip(one, other, strict=True)]
    return math.nan if any(math.isnan(value) for value in differences) else max(differences)


def _difference(one: Answer, other: Answer) -> float:
    values = [*one.first.values(), *other.first.values(), *(value for _, value in (*one.tokens, *other.tokens))]
    if not one.tokens or not other.tokens or not all(math.isfinite(value) for value in values):
        return math.nan
    shared = one.first.keys() & other.first.keys()
    if not shared:
        return math.inf
    largest = max(abs(one.first[token] - other.first[token]) for token in shared)
    for (a, a_value), (b, b_value) in zip(one.tokens, other.tokens, strict=False):
        largest = max(largest, abs(a_value - b_value))
        if a != b:
            # Where the two part, each took its own best token: a near tie if both were about equally sure.
            break
    return largest


def _at(check: ProbeCheck) -> str:
    return f"{check.server}: " if check.server else ""


def _ask(client: VllmClient, model: str, prompt: str, policy: ProbePolicy) -> Answer:
    return client.ask(model, _messages(prompt), max_tokens=policy.max_tokens)[0]


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
