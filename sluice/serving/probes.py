"""What a release must show before it gets a user: it is there, it answers, it does something, it disturbs nobody.

Answers are compared by the log-probabilities of greedy decoding: of the most likely first tokens, and of the common
beginning of the two answers. Two runs of one model agree to some hundredths of a nat in bfloat16 (the batch changes
the order of sums); an adapter that was trained moves them by tenths and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sluice.infra.errors import UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.serving.policy import ProbePolicy
from sluice.serving.vllm import Answer, VllmClient


@dataclass(frozen=True)
class ProbeCheck:
    """One probe: its name, whether it passed, and a sentence."""

    name: str
    passed: bool
    sentence: str


@dataclass(frozen=True)
class ProbeReport:
    """All probes of one release."""

    served_name: str
    checks: tuple[ProbeCheck, ...]

    @property
    def passed(self) -> bool:
        """Every probe passed, and there was one."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def sentence(self) -> str:
        """The failures, or that there were none."""
        failures = [check.sentence for check in self.checks if not check.passed]
        return " ".join(failures) or f"All {len(self.checks)} probes passed."

    def to_json(self) -> dict[str, Any]:
        return {"served_name": self.served_name, "passed": self.passed, "checks": [asdict(c) for c in self.checks]}


def record_answers(client: VllmClient, model: str, policy: ProbePolicy) -> tuple[Answer, ...]:
    """A model's answers to the probe prompts: take the base model's before an adapter is loaded beside it."""
    return tuple(_ask(client, model, prompt, policy) for prompt in policy.prompts)


def run_probes(
    client: VllmClient,
    *,
    candidate: str,
    stable: str,
    base: str,
    policy: ProbePolicy,
    base_before: tuple[Answer, ...] | None = None,
    report: Report = no_report,
) -> ProbeReport:
    """Probe `candidate` against `stable` and `base` (served names) directly at the server.

    `base_before` are the base model's answers from before the candidate was loaded; without them that check is left
    out. Raises `UnavailableError` when the server does not answer for the base model either.
    """
    checks: list[ProbeCheck] = []
    total = 5 if base_before else 4

    def note(name: str, passed: bool, sentence: str) -> None:
        checks.append(ProbeCheck(name, passed, sentence))
        report(len(checks), total, name)

    try:
        names = {model.name for model in client.models()}
        note("listed", candidate in names, f"vLLM {'lists' if candidate in names else 'does not list'} {candidate}.")
        if candidate not in names:
            return ProbeReport(candidate, tuple(checks))
        answers = record_answers(client, candidate, policy)
        empty = sum(not answer.text.strip() for answer in answers)
        enough = len(answers) - empty >= policy.answered * len(answers)
        note("answers", enough, f"{len(answers) - empty} of {len(answers)} probe prompts got an answer.")
        numbers = [value for answer in answers for _, value in answer.tokens]
        sound = bool(numbers) and all(math.isfinite(value) for value in numbers)
        note("finite", sound, f"Its log-probabilities are {'' if sound else 'not '}all finite numbers.")
        against = {name: record_answers(client, name, policy) for name in dict.fromkeys((stable, base))}
        effects = [max_difference(answers, others) for others in against.values()]
        least = math.nan if any(math.isnan(effect) for effect in effects) else min(effects)
        acts = least > policy.effect_above
        text = "changes" if acts else "does not change"
        note("effect", acts, f"The adapter {text} the answers (by {least:.3f} nats; {policy.effect_above:g} needed).")
        if base_before:
            moved = max_difference(base_before, against[base])
            kept = moved <= policy.base_within
            text = "as before" if kept else "not as before"
            note("base unchanged", kept, f"The base model answers {text} (by {moved:.3f} nats).")
    except UnavailableError as error:
        # A server that is down says nothing about the release; one that answers for the base model does.
        _ask(client, base, policy.prompts[0], policy)
        note("reachable", False, error.message)
    return ProbeReport(candidate, tuple(checks))


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
        checks.append(ProbeCheck("parity", same, f"Through the gateway comes {text} (by {difference:.3f} nats)."))
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


def _ask(client: VllmClient, model: str, prompt: str, policy: ProbePolicy) -> Answer:
    return client.ask(model, _messages(prompt), max_tokens=policy.max_tokens)[0]


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
