"""The sections of a suite: what is measured, and how. `suite.py` reads them from a file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sluice.evaluation.outcomes import Patience, Sampling
from sluice.evaluation.policy import Section

Names = Annotated[tuple[str, ...], Field(strict=False)]


class Items(Section):
    """Which items are asked."""

    source: Literal["holdout", "file"] = "holdout"
    file: str = Field("", description="JSONL of items beside the suite, for source: file (docs/evaluation.md)")
    limit: int | None = Field(None, ge=1, description="ask only so many, chosen by the digest of their ids")


class Generation(Section):
    """How the items are asked."""

    max_tokens: int = Field(80, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int = 0
    concurrency: int = Field(32, ge=1, le=1024)
    timeout_s: float = Field(60.0, gt=0)
    attempts: int = Field(3, ge=1, le=10)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.seed)

    @property
    def patience(self) -> Patience:
        return Patience(timeout_s=self.timeout_s, attempts=self.attempts)


class Sequential(Section):
    """Stop measuring items when the decision is certain. Intervals are then always-valid, and so wider at each n."""

    batch: int = Field(32, ge=1, description="items between two looks")


class Judged(Section):
    """Metrics that a judge gives, by RAGAS."""

    metrics: Names = Field(min_length=1, description="names that start with `judged.`")
    limit: int | None = Field(None, ge=1, description="judge only so many items: the first in the order of asking")
    max_tokens: int = Field(1024, ge=16)
    temperature: float = Field(0.0, ge=0, le=2)
    seed: int = 0
    concurrency: int = Field(8, ge=1, le=256, description="requests at once")
    timeout_s: float = Field(120.0, gt=0)
    attempts: int = Field(3, ge=1, le=10, description="of one request")
    retry_budget: float = Field(0.2, ge=0, le=5, description="retries in all, as a share of the requests planned")
    calibration: str = Field("", description="JSONL of labelled items beside the suite; empty: the judge never gates")
    repeats: int = Field(3, ge=2, le=10, description="times that each calibration item is judged")


class Benchmarks(Section):
    """Tasks of lm-evaluation-harness, each a YAML file in the folder `tasks` beside the suite, or one of Sluice's."""

    tasks: Names = Field(min_length=1)
    limit: int | None = Field(None, ge=1, description="items of each task")
    concurrency: int = Field(8, ge=1, le=256)
    timeout_s: float = Field(120.0, gt=0)


Probe = Literal["leakage", "personal_data", "refusal", "toxicity", "triggers"]


class Safety(Section):
    """Probes and scans (docs/evaluation.md)."""

    probes: Annotated[tuple[Probe, ...], Field(strict=False)] = Field(min_length=1)
    file: str = Field("", description="JSONL of probes beside the suite, in addition to Sluice's and the dataset's own")


class Speed(Section):
    """Candidate and champion asked in turn, so that both meet the same machine."""

    requests: int = Field(48, ge=8, description="requests to each release")
    concurrency: int = Field(4, ge=1, le=256)
    price_per_hour: float = Field(0.0, ge=0, description="of the server, in any currency; 0: cost is not shown")
    currency: str = "USD"
