"""A judge: a model at an OpenAI-compatible endpoint that gives the scores of RAGAS, pinned by a digest.

Two judges with one digest were asked the same texts, for the same schemas, in the same way, of the same model. Scores
of judges with different digests are never compared.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sluice.evaluation.outcomes import Sampling
from sluice.infra.errors import InputError, UnavailableError
from sluice.provenance.canonical import digest_file, digest_json

_PROMPT_SOURCES = (
    "prompt/metrics",
    "metrics/collections/answer_relevancy",
    "metrics/collections/context_precision",
    "metrics/collections/context_recall",
    "metrics/collections/factual_correctness",
    "metrics/collections/faithfulness",
)


@dataclass(frozen=True)
class JudgeLimits:
    """How a judge is asked: requests at once, seconds and attempts of one, pause in seconds before its second attempt
    (doubled each time), retries of a whole run as a share of the requests planned, and the number of attempts in a
    row without any HTTP answer after which it counts as dead. They change no score, so they are not in the digest."""

    concurrency: int = 8
    timeout_s: float = 120.0
    attempts: int = 3
    pause_s: float = 0.5
    retry_budget: float = 0.2
    dead_after: int = 10


@dataclass(frozen=True)
class Judge:
    """One judge. `base_url` ends in `/v1`, `model` is its name there.

    `identity` says which weights that name stands for: the model's digest, or, for an endpoint that tells none, the
    name and revision that its owner promises not to change.
    """

    base_url: str
    model: str
    identity: str
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=1024))
    limits: JudgeLimits = JudgeLimits()
    api_key: str = field(default="unused", repr=False)

    def __post_init__(self) -> None:
        # Clients put what they refuse into their message, and a key or password must not get there.
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InputError("judge.api_key holds a character that no HTTP header may hold.")
        if "@" in self.base_url.partition("://")[2].partition("/")[0]:
            raise InputError("judge.url holds a name or password.", hint="The key goes into SLUICE_JUDGE__API_KEY.")

    @property
    def digest(self) -> str:
        """Identity of the judge: its weights, what it is told and must answer, and how it samples."""
        return digest_json(
            {
                "identity": self.identity,
                "prompts": prompts_digest(),
                "sampling": {
                    "max_tokens": self.sampling.max_tokens,
                    "temperature": self.sampling.temperature,
                    "seed": self.sampling.seed,
                },
            }
        )


@cache
def prompts_digest() -> str:
    """Digest of what a judge is told: RAGAS's version and its files that hold prompts, schemas and how a score is made
    of the answers, and our own. Read as files, because importing RAGAS takes seconds.

    Raises `UnavailableError` when RAGAS is not installed.
    """
    spec = importlib.util.find_spec("ragas")
    try:
        release = version("ragas")
    except PackageNotFoundError:
        release = ""
    if spec is None or spec.origin is None or not release:
        raise UnavailableError("RAGAS is not installed.", hint="Install requirements/main.lock.")
    root = Path(spec.origin).parent
    files = {
        str(path.relative_to(root)): digest_file(path)
        for folder in _PROMPT_SOURCES
        for path in sorted((root / folder).glob("*.py"))
    }
    here = Path(__file__).parent
    ours = {name: digest_file(here / name) for name in ("judge_client.py", "judge_pairs.py", "judged_scores.py")}
    return digest_json({"ragas": release, "files": files, "sluice": ours})


def reach(judge: Judge) -> None:
    """Does the judge answer, and know its model? Raises `UnavailableError` or `InputError` that says what is wrong."""
    import httpx

    try:
        response = httpx.get(
            f"{judge.base_url}/models", headers={"Authorization": f"Bearer {judge.api_key}"}, timeout=10.0
        )
        listed = [str(entry["id"]) for entry in response.json()["data"]] if response.status_code == 200 else None
    except httpx.InvalidURL as error:
        raise InputError(f"judge.url = {judge.base_url!r} is no address: {error}.") from error
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"The judge at {judge.base_url} does not answer: {error or type(error).__name__}.",
            hint="Setting judge.url says where it is; empty is the local vLLM (`sluice status`).",
        ) from error
    except (ValueError, KeyError, TypeError):
        return  # not every endpoint lists its models; the first request will tell
    if response.status_code in (401, 403):
        raise UnavailableError(
            f"The judge at {judge.base_url} refuses us: HTTP {response.status_code}.",
            hint="Set its key: SLUICE_JUDGE__API_KEY.",
        )
    if listed is not None and judge.model not in listed:
        raise InputError(
            f"judge.model = {judge.model!r} is not served at {judge.base_url}; there are {', '.join(listed[:10])}."
        )
