"""Judging a candidate against a champion to the same decision: ours against `ragas.evaluate()`, same judge, one run.

    .venv/bin/python -m benchmarks.evaluation [--items 150] [--errors 0.03] [--out benchmarks/results/evaluation.json]

The judge is scripted (`scripted_judge.py`): it answers the same to everybody after 100 to 200 ms and holds 16 requests
at once, so what differs is how it is asked. Five metrics of RAGAS 0.4.3, three passages an item. The candidate is
better. Each line takes one thing more into account:

    ragas                 both releases with ragas.evaluate(), 16 workers
    ragas, its cache      the same with RAGAS's DiskCacheBackend, the champion judged before
    ours, nothing known   both releases, no memory of anything
    ours, champion known  the champion was judged before, as after every earlier candidate
    ours, sequential      and measuring stops when the gate's decision is certain

Then the same judge fails in a share of its requests (half HTTP 500, half prose), and the items that end without a
score are counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.scripted_judge import Reply, scripted_judge
from sluice.evaluation.cache import open_cache
from sluice.evaluation.comparison import compare
from sluice.evaluation.gate import Subjects, decide
from sluice.evaluation.head_to_head import head_to_head
from sluice.evaluation.items import Item
from sluice.evaluation.judge import Judge, JudgeLimits
from sluice.evaluation.judged import judge_samples, planned_requests, samples_of
from sluice.evaluation.judged_metrics import JUDGED
from sluice.evaluation.outcomes import Answer, Sampling
from sluice.evaluation.scores import Column, Scores, column, scores_of
from sluice.evaluation.suite import Suite, parse_suite
from sluice.infra.progress import Report
from sluice.provenance.canonical import digest_json
from sluice.rag.embed import MiniLmEmbedder

METRICS = tuple(JUDGED)
SLOTS = 16
SUITE = """
name: benchmark
title: Candidate against champion by a judge
metrics: [answer_rate]
judged:
  metrics: [{metrics}]
  calibration: labels.jsonl
{sequential}
policy:
  minimum_n: 50
  error_budget: 0.02
  checks:
    - {{metric: judged.factual_correctness, rule: superiority}}
    - {{metric: judged.faithfulness, rule: non_inferiority, margin: 0.05}}
    - {{metric: judged.answer_relevancy, rule: non_inferiority, margin: 0.05}}
"""


@dataclass(frozen=True)
class Setup:
    """What is judged: items, and each release's answers."""

    items: tuple[Item, ...]
    champion: tuple[Answer, ...]
    candidate: tuple[Answer, ...]
    embed: MiniLmEmbedder


@dataclass(frozen=True)
class Measured:
    """One way to the decision. `lost` scores ended without a value, of `scores`."""

    seconds: float
    cpu_s: float
    requests: int
    verdict: str
    asked: int
    scores: int
    lost: int
    causes: dict[str, int]


def setup(count: int, seed: int = 0) -> Setup:
    """Items with three passages; the champion says 60% of the facts right, the candidate 85%."""
    draw = random.Random(seed)
    items, answers = [], {"champion": list[Answer](), "candidate": list[Answer]()}
    for number in range(count):
        facts = [
            f"The fee of permit {number} is {draw.randrange(20, 900)} euros.",
            f"Permit {number} is granted within {draw.randrange(2, 30)} weeks.",
            f"Permit {number} is valid for {draw.randrange(2, 9)} years.",
        ]
        question = f"What does permit {number} cost, how long does it take, and how long is it valid?"
        items.append(
            Item(f"i{number:04}", question, " ".join(facts), ({"role": "user", "content": question},), tuple(facts))
        )
        for name, share in (("champion", 0.6), ("candidate", 0.85)):
            said = [fact if draw.random() < share else f"Nobody knows about that here, {number}." for fact in facts]
            answers[name].append(Answer(f"i{number:04}", " ".join(said), "stop", 9, 9, 0.1, 0.2))
    return Setup(tuple(items), tuple(answers["champion"]), tuple(answers["candidate"]), MiniLmEmbedder())


def suite(*, sequential: bool) -> Suite:
    folder = Path(tempfile.mkdtemp())
    (folder / "labels.jsonl").write_text("{}")
    text = SUITE.format(metrics=", ".join(METRICS), sequential="sequential: {batch: 32}" if sequential else "")
    return parse_suite(text, "benchmark", folder)


# --- the judge, in a process of its own


def serve(pipe: Connection, errors: float) -> None:
    def plan(prompt: str, times: int) -> Reply:
        draw = random.Random(f"{prompt}{times}")
        pause = draw.uniform(0.1, 0.2)
        if draw.random() < errors:
            return Reply(status=500, pause_s=pause) if draw.random() < 0.5 else Reply("I think so.", pause_s=pause)
        return Reply(pause_s=pause)

    with scripted_judge(plan, slots=SLOTS) as server:
        pipe.send(server.url)
        while pipe.recv() == "count":
            pipe.send(len(server.requests))
            server.requests.clear()
            server.prompts.clear()


@dataclass
class RunningJudge:
    url: str
    pipe: Connection

    def count(self) -> int:
        """Requests since the last count; prompts are forgotten too, so that each run meets the same judge."""
        self.pipe.send("count")
        return int(self.pipe.recv())


@contextmanager
def running_judge(errors: float = 0.0) -> Iterator[RunningJudge]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, errors))
    process.start()
    try:
        yield RunningJudge(ours.recv(), ours)
    finally:
        ours.send("stop")
        process.join(10)
        process.kill()


# --- ours


@dataclass(frozen=True)
class Judging:
    judge: Judge
    cache: Any
    embed: MiniLmEmbedder

    def columns(self, items: Sequence[Item], answers: Sequence[Answer], report: Report) -> list[Column]:
        samples = samples_of(items, answers)
        return judge_samples(samples, METRICS, self.judge, cache=self.cache, embed=self.embed, report=report)

    def requests(self, items: Sequence[Item]) -> int:
        return planned_requests(samples_of(items, []), METRICS, self.judge)


def ours(given: Setup, judge_at: RunningJudge, cache_file: Path, *, sequential: bool = False) -> Measured:
    limits = JudgeLimits(concurrency=SLOTS, timeout_s=60.0, retry_budget=0.2)
    judge = Judge(judge_at.url, "judge", "scripted", Sampling(1024), limits)
    by_id = {name: {one.item_id: one for one in getattr(given, name)} for name in ("champion", "candidate")}

    def asking(name: str) -> Callable[[Sequence[Item], Report], list[Answer]]:
        return lambda items, _: [by_id[name][item.id] for item in items]

    chosen = suite(sequential=sequential)
    judge_at.count()
    started, cpu = time.monotonic(), time.process_time()
    with open_cache(cache_file) as cache:
        found = head_to_head(
            given.items,
            chosen,
            candidate=asking("candidate"),
            champion=asking("champion"),
            judging=Judging(judge, cache, given.embed),
        )
    verdict = decided(chosen, found.champion.scores, found.candidate.scores)
    spent = time.monotonic() - started, time.process_time() - cpu
    sides = (found.champion.scores, found.candidate.scores)
    return measured(spent, judge_at.count(), verdict, found.stopping.asked, sides)


def know_champion(given: Setup, judge_at: RunningJudge, cache_file: Path) -> None:
    """What an earlier gate run left behind."""
    judge = Judge(judge_at.url, "judge", "scripted", Sampling(1024), JudgeLimits(concurrency=SLOTS))
    with open_cache(cache_file) as cache:
        Judging(judge, cache, given.embed).columns(given.items, given.champion, lambda *_: None)


# --- RAGAS


def ragas_evaluate(given: Setup, judge_at: RunningJudge, cache_folder: Path | None = None) -> Measured:
    judge_at.count()
    started, cpu = time.monotonic(), time.process_time()
    sides = [ragas_scores(given, getattr(given, name), judge_at, cache_folder) for name in ("champion", "candidate")]
    verdict = decided(suite(sequential=False), *sides)
    spent = time.monotonic() - started, time.process_time() - cpu
    return measured(spent, judge_at.count(), verdict, len(given.items), sides)


def ragas_scores(given: Setup, answers: Sequence[Answer], judge_at: RunningJudge, cache_folder: Path | None) -> Scores:
    """`ragas.evaluate()` as its documentation has it; NaN becomes the cause `NaN`."""
    import instructor
    from langchain_core.embeddings import Embeddings
    from openai import AsyncOpenAI
    from ragas import EvaluationDataset, SingleTurnSample, evaluate
    from ragas.cache import DiskCacheBackend
    from ragas.llms.base import InstructorLLM, InstructorModelArgs
    from ragas.metrics._answer_relevance import AnswerRelevancy
    from ragas.metrics._context_precision import ContextPrecision
    from ragas.metrics._context_recall import ContextRecall
    from ragas.metrics._factual_correctness import FactualCorrectness
    from ragas.metrics._faithfulness import Faithfulness
    from ragas.run_config import RunConfig

    class MiniLm(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[float(value) for value in row] for row in given.embed.embed(texts)]

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    client = instructor.from_openai(
        AsyncOpenAI(base_url=judge_at.url, api_key="unused"), mode=instructor.Mode.JSON_SCHEMA
    )
    model = InstructorLLM(
        client,
        "judge",
        "openai",
        InstructorModelArgs(temperature=0.0, max_tokens=1024),
        cache=DiskCacheBackend(str(cache_folder)) if cache_folder else None,
    )
    metrics = {
        "judged.faithfulness": Faithfulness(),
        "judged.answer_relevancy": AnswerRelevancy(),
        "judged.context_precision": ContextPrecision(),
        "judged.context_recall": ContextRecall(),
        "judged.factual_correctness": FactualCorrectness(),
    }
    samples = [
        SingleTurnSample(
            user_input=item.question,
            response=answer.answer,
            retrieved_contexts=list(item.contexts),
            reference=item.reference,
        )
        for item, answer in zip(given.items, answers, strict=True)
    ]
    result = evaluate(
        EvaluationDataset(samples),
        metrics=list(metrics.values()),
        llm=model,
        embeddings=MiniLm(),
        run_config=RunConfig(max_workers=SLOTS),
        show_progress=False,
        allow_nest_asyncio=False,
    )
    columns = []
    for position, name in enumerate(metrics):
        values = [float(list(row.values())[position]) for row in result.scores]
        told = {
            item.id: "NaN" if math.isnan(value) else min(max(value, 0.0), 1.0)
            for item, value in zip(given.items, values, strict=True)
        }
        columns.append(column(JUDGED[name].metric, told))
    return scores_of(columns)


# --- both


def decided(chosen: Suite, champion: Scores, candidate: Scores) -> str:
    comparison = compare(champion, candidate, chosen.policy)
    nobody = digest_json(None)
    anybody = Subjects(nobody, nobody, nobody, nobody)
    return decide(comparison, chosen.policy, anybody, datetime(2026, 1, 1, tzinfo=UTC)).verdict


def measured(spent: tuple[float, float], requests: int, verdict: str, asked: int, sides: Sequence[Scores]) -> Measured:
    columns = [one for side in sides for name, one in side.columns.items() if name in METRICS]
    causes = Counter(cause for one in columns for cause in one.causes.values())
    scores = sum(len(one.values) for one in columns)
    seconds, cpu_s = (round(one, 2) for one in spent)
    return Measured(seconds, cpu_s, requests, verdict, asked, scores, causes.total(), dict(causes))


def row(found: Measured, items: int, base: Measured | None) -> dict[str, Any]:
    return {
        "seconds": found.seconds,
        "cpu_s": found.cpu_s,
        "times_faster": round(base.seconds / found.seconds, 2) if base else 1.0,
        "items_per_s": round(items / found.seconds, 2),
        "requests": found.requests,
        "requests_per_item": round(found.requests / items, 2),
        "items_asked": found.asked,
        "verdict": found.verdict,
        "scores": found.scores,
        "scores_lost": found.lost,
        "causes": found.causes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=150)
    parser.add_argument("--errors", type=float, default=0.03, help="share of requests that fail in the second part")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluation.json"))
    arguments = parser.parse_args()
    os.environ["RAGAS_DO_NOT_TRACK"] = "true"
    warnings.simplefilter("ignore")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # RAGAS's loop ends before its client is closed
    logging.getLogger("ragas").setLevel(logging.CRITICAL)  # a line for each answer with one question instead of three
    given = setup(arguments.items)
    given.embed.embed(["warm"])
    with tempfile.TemporaryDirectory() as name, running_judge() as judge_at:
        place = Path(name)
        small = Setup(given.items[:4], given.champion[:4], given.candidate[:4], given.embed)
        ragas_evaluate(small, judge_at)  # both sides import RAGAS before the clock runs
        ours(small, judge_at, place / "warm.sqlite")
        found = {"ragas": ragas_evaluate(given, judge_at)}
        ragas_scores(given, given.champion, judge_at, place / "ragas")
        found["ragas, its cache"] = ragas_evaluate(given, judge_at, place / "ragas")
        found["ours, nothing known"] = ours(given, judge_at, place / "cold.sqlite")
        know_champion(given, judge_at, place / "known.sqlite")
        (place / "sequential.sqlite").write_bytes((place / "known.sqlite").read_bytes())
        found["ours, champion known"] = ours(given, judge_at, place / "known.sqlite")
        found["ours, sequential"] = ours(given, judge_at, place / "sequential.sqlite", sequential=True)
    with tempfile.TemporaryDirectory() as name, running_judge(arguments.errors) as judge_at:
        failing = {
            "ragas": ragas_evaluate(given, judge_at),
            "ours, nothing known": ours(given, judge_at, Path(name) / "cold.sqlite"),
        }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "judge": f"scripted, 100 to 200 ms an answer, {SLOTS} at once",
        "items": arguments.items,
        "metrics": list(METRICS),
        "to_the_decision": {name: row(one, arguments.items, found["ragas"]) for name, one in found.items()},
        "with_failing_requests": {
            "share": arguments.errors,
            **{name: row(one, arguments.items, failing["ragas"]) for name, one in failing.items()},
        },
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
