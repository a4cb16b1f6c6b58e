"""Does the server say what the training library says? Token for token, and by how much their log-probabilities differ.

Both answer greedily. Where they part, each took its own best token: that is a near tie if the training library, too,
held the server's token for almost as likely, and everything after it is another text that compares with nothing. What
was a server's other adapter, its base model alone, a template of its own, or half of the weights does not pass as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.infra.errors import IntegrityError
from sluice.serving.vllm import Answer


@dataclass(frozen=True)
class ReferenceAnswer:
    """What the training library says to one prompt: the prompt's tokens, and of each greedy step the likeliest tokens,
    {id: log-probability in nats} in falling order; the first one was taken."""

    prompt: tuple[int, ...]
    steps: tuple[Mapping[int, float], ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ReferenceAnswer:
        """From `{"prompt": [id], "steps": [[[id, log-probability]]]}`. Raises `IntegrityError` on anything else."""
        try:
            steps = tuple({int(token): float(value) for token, value in step} for step in content["steps"])
            found = cls(tuple(int(token) for token in content["prompt"]), steps)
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"The parity reference is damaged: {error!r}.") from error
        if not found.prompt or not all(steps):
            raise IntegrityError("The parity reference is damaged: a prompt or a step is empty.")
        return found


@dataclass(frozen=True)
class Parity:
    """How a server's answers compare with the reference.

    `largest` and `mean`: differences of log-probabilities in nats over `tokens` compared tokens. `ties`: answers that
    parted at a near tie. `strange`: a sentence for each prompt that was not answered as the reference is.
    """

    largest: float
    mean: float
    tokens: int
    ties: int
    strange: tuple[str, ...]

    def within(self, limit: float) -> bool:
        """Nothing strange, something compared, and every difference a number below the limit."""
        return not self.strange and self.tokens > 0 and self.largest <= limit

    def sentence(self, limit: float) -> str:
        if self.strange:
            return f"It does not answer as the training library does: {'; '.join(self.strange)}."
        tied = f", {self.ties} parted at a near tie" if self.ties else ""
        says = "as" if self.within(limit) else "not as"
        return (
            f"It answers {says} the training library does ({self.tokens} tokens{tied}; largest difference "
            f"{self.largest:.2g} nats, mean {self.mean:.2g}, at most {limit:g} allowed)."
        )


def compare(answers: Sequence[Answer], reference: Sequence[ReferenceAnswer], *, limit: float) -> Parity:
    """The server's answers to the probe prompts beside the training library's, in the same order."""
    if len(answers) != len(reference):
        wrong = f"{len(answers)} answers cannot be compared with a reference of {len(reference)}"
        return Parity(math.nan, math.nan, 0, 0, (wrong,))
    differences: list[float] = []
    strange: list[str] = []
    ties = 0
    for number, (answer, known) in enumerate(zip(answers, reference, strict=True), start=1):
        if answer.prompt != known.prompt:
            strange.append(f"prompt {number} has other tokens in the server ({_prompts(answer.prompt, known.prompt)})")
            continue
        found, tied, wrong = _compare_one(answer, known, limit)
        differences += found
        ties += tied
        if wrong:
            strange.append(f"prompt {number} {wrong}")
    # max() would pass over what is not a number.
    sound = bool(differences) and all(math.isfinite(value) for value in differences)
    largest = max(differences) if sound else math.nan
    mean = sum(differences) / len(differences) if sound else math.nan
    return Parity(largest, mean, len(differences), ties, tuple(strange))


def _compare_one(answer: Answer, known: ReferenceAnswer, limit: float) -> tuple[list[float], bool, str]:
    """Differences of the tokens both took, whether they parted at a near tie, and what is strange, or nothing."""
    differences: list[float] = []
    if len(answer.ids) != len(answer.tokens):
        return differences, False, "came without log-probabilities of its tokens"
    for place, (token, (text, value), step) in enumerate(zip(answer.ids, answer.tokens, known.steps, strict=False), 1):
        taken = next(iter(step))
        if token == taken:
            differences.append(abs(value - step[taken]))
            continue
        # Each of the two scores may be off by the limit, so the order of tokens this close may turn.
        if token not in step or not step[taken] - step[token] <= 2 * limit:
            return differences, False, f"parts from it at token {place} ({text!r}), which is no near tie"
        differences.append(abs(value - step[token]))
        return differences, True, ""
    if len(answer.ids) != len(known.steps):
        return differences, False, f"ends after {len(answer.ids)} tokens, not after {len(known.steps)}"
    return differences, False, ""


def _prompts(ours: Sequence[int], known: Sequence[int]) -> str:
    if not ours:
        return "it does not tell them"
    return f"{len(ours)} tokens there, {len(known)} in training: another chat template, or another tokenizer"
