"""The judge of an installation, from its settings and a suite, and what it says of answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice.infra.errors import InputError

if TYPE_CHECKING:
    from sluice.components.workspace import Workspace
    from sluice.evaluation.cache import Cache
    from sluice.evaluation.items import Item
    from sluice.evaluation.judge import Judge
    from sluice.evaluation.judged import Embedder
    from sluice.evaluation.outcomes import Answer
    from sluice.evaluation.scores import Column
    from sluice.evaluation.suite import Suite
    from sluice.evaluation.suite_sections import Judged
    from sluice.infra.progress import Report


def judge_of(workspace: Workspace, judged: Judged) -> Judge:
    """The judge that the settings name; without an address the base model judges, in the local vLLM.

    Raises `InputError` for an address without a model, or a model without a digest or revision, and `UnavailableError`
    when there is no local vLLM.
    """
    from sluice.components.champion import base_digest
    from sluice.components.served import release_name, vllm_url
    from sluice.evaluation.judge import Judge, JudgeLimits
    from sluice.evaluation.outcomes import Sampling
    from sluice.provenance.canonical import digest_json

    settings = workspace.settings
    chosen = settings.judge
    sampling = Sampling(judged.max_tokens, judged.temperature, judged.seed)
    limits = JudgeLimits(
        concurrency=judged.concurrency,
        timeout_s=judged.timeout_s,
        attempts=judged.attempts,
        retry_budget=judged.retry_budget,
    )
    if not chosen.url:
        if chosen.model:
            raise InputError(
                f"judge.model = {chosen.model!r} needs an address in judge.url.",
                hint="Without both the base model judges, in the local vLLM.",
            )
        base = base_digest(workspace)
        identity = digest_json({"model": base, "dtype": settings.serving.dtype})
        return Judge(f"{vllm_url(settings)}/v1", release_name(settings, base), identity, sampling, limits)
    for name in ("model", "model_digest"):
        if not getattr(chosen, name):
            raise InputError(
                f"judge.{name} is empty, and judge.url = {chosen.url!r}: nobody could say which weights judged.",
                hint="judge.model is its name there; judge.model_digest a digest of its weights, or a revision that "
                "its owner promises not to change.",
            )
    # A key that was read from a file often ends with the file's newline.
    key = chosen.api_key.get_secret_value().strip() if chosen.api_key else "unused"
    identity = digest_json({"model": chosen.model, "revision": chosen.model_digest})
    return Judge(chosen.url.rstrip("/"), chosen.model, identity, sampling, limits, key)


@dataclass(frozen=True)
class SuiteJudge:
    """The judge of a suite at work, with its memory and an embedding model."""

    judge: Judge
    metrics: tuple[str, ...]
    cache: Cache
    embed: Embedder

    def columns(self, items: Sequence[Item], answers: Sequence[Answer], report: Report) -> list[Column]:
        """Columns of the suite's judged metrics over these answers."""
        from sluice.evaluation.judged import judge_samples, samples_of

        samples = samples_of(items, answers)
        return judge_samples(samples, self.metrics, self.judge, cache=self.cache, embed=self.embed, report=report)

    def requests(self, items: Sequence[Item]) -> int:
        """Requests that judging one answer to each of these items takes, when none is known."""
        from sluice.evaluation.judged import planned_requests, samples_of

        return planned_requests(samples_of(items, []), self.metrics, self.judge)


def suite_judge(workspace: Workspace, suite: Suite, cache: Cache) -> SuiteJudge | None:
    """The judge of a suite, None when it asks for none. Raises as `judge_of` does."""
    from sluice.rag.embed import MiniLmEmbedder

    if suite.judged is None:
        return None
    return SuiteJudge(judge_of(workspace, suite.judged), suite.judged.metrics, cache, MiniLmEmbedder())


def demoted_metrics(workspace: Workspace, suite: Suite, calibration: str) -> Mapping[str, str]:
    """The judged metrics of a suite that may not gate, each with the reason in words; `calibration` is the digest of
    the judge's, or empty. One of another judge counts as none."""
    from sluice.components.calibrate import read_calibration
    from sluice.evaluation.calibration import demoted_without_calibration

    if suite.judged is None:
        return {}
    if not calibration:
        return demoted_without_calibration(suite.judged.metrics)
    found = read_calibration(workspace, calibration)
    judge = judge_of(workspace, suite.judged)
    if found.judge != judge.digest:
        return dict.fromkeys(suite.judged.metrics, f"the calibration is of another judge ({found.model})")
    return found.demoted(suite.policy.judge, suite.judged.metrics)
