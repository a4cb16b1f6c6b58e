"""Emission, feedback and harvest against a real MLflow server on SQLite."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.curation.curate import curate
from sluice.curation.dataset import DatasetSources, write_dataset
from sluice.curation.emission import ChatTracer, otlp_target
from sluice.curation.harvest import Harvest, harvest
from sluice.curation.records import CORRECTION, THUMB, Context, Message, latest_scores
from sluice.curation.trace_store import (
    Feedback,
    TraceMissing,
    TraceStore,
    Window,
    add_feedback,
    now_ms,
    open_trace_store,
)
from sluice.infra.settings import MlflowSettings, Settings, TraceSettings

pytestmark = pytest.mark.integration

CHAMPION, CHALLENGER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
INDEX = "sha256:" + "c" * 64
COUNT = 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def mlflow_address(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[str]:
    home = tmp_path_factory.mktemp("mlflow")
    # The migrations of an empty database take most of the first start: keep a migrated one, by version.
    version = importlib.metadata.version("mlflow")
    cache = pytestconfig.cache
    template = cache.mkdir("mlflow-database") / f"{version}.db" if cache else home / "none.db"
    if template.is_file():
        shutil.copyfile(template, home / "mlflow.db")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = (home / "server.log").open("wb")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")),
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    try:
        deadline = time.monotonic() + 150
        while not answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"MLflow did not start:\n{(home / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)
        if not template.is_file():
            staging = template.with_suffix(f".{os.getpid()}")
            shutil.copyfile(home / "mlflow.db", staging)
            staging.replace(template)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()


@pytest.fixture
def settings(mlflow_address: str, request: pytest.FixtureRequest) -> Settings:
    """An experiment of its own for each test."""
    name = request.node.name
    return Settings(mlflow=MlflowSettings(tracking_uri=mlflow_address), traces=TraceSettings(experiment=name))


@pytest.fixture
def tracer(settings: Settings) -> Iterator[ChatTracer]:
    tracer = ChatTracer(otlp_target(settings), service="assistant")
    yield tracer
    tracer.close()


@pytest.fixture
def store(settings: Settings) -> TraceStore:
    return open_trace_store(settings)


def question(number: int) -> str:
    # The first are texts that a store may take for something else.
    awkward = ["42", '"quoted" {"a": 1}', "Får jag?\u2028 åäö 🏠", "null", "[1, 2]"]
    return awkward[number] if number < len(awkward) else f"What does rule {number} say?"


def ask(tracer: ChatTracer, number: int) -> str:
    with tracer.chat(session=f"s-{number // 3}", user=f"u-{number % 4}", question=question(number), model="m") as span:
        messages = [Message("system", "You answer."), Message("user", f"Context:\n- c\n\nQuestion: {question(number)}")]
        contexts = [Context(f"c{number}", f"Answer {number}. Corrected {number}: 1 2")]
        span.prompted(messages, version="faq-1", contexts=contexts, index_digest=INDEX)
        span.answer(
            f"Answer {number}.",
            release=CHALLENGER if number % 2 else CHAMPION,
            model=f"m-{number % 2}",
            input_tokens=100 + number,
            output_tokens=number,
            ttft_ms=10.5 + number,
        )
    return span.trace_id


def read(store: TraceStore, since_ms: int) -> Harvest:
    return harvest(store, Window(since_ms, now_ms() + 60_000), as_of_ms=now_ms(), settle_s=0)


def test_what_was_sent_is_what_is_harvested(tracer: ChatTracer, store: TraceStore, tmp_path: Path) -> None:
    since = now_ms() - 1
    ids = [ask(tracer, number) for number in range(COUNT)]
    counts = tracer.flush()
    assert (counts.exported, counts.lost, counts.faults) == (COUNT, 0, 0)
    said = [
        Feedback(trace_id, f"u-{n % 4}", up=n % 3 != 0, correction=f"Corrected {n}: 1\n2" if n % 3 == 0 else "")
        for n, trace_id in enumerate(ids)
    ]
    written = add_feedback(store, said)
    assert (written.thumbs, written.corrections, written.missing) == (30, 10, ())

    found = read(store, since)
    assert found.counts.records == COUNT
    by_id = {record.id: record for record in found.records}
    assert set(by_id) == set(ids)
    for number, trace_id in enumerate(ids):
        record = by_id[trace_id]
        release = CHALLENGER if number % 2 else CHAMPION
        assert (record.release, record.adapter_digest, record.index_digest) == (release, release, INDEX)
        assert record.question == question(number)
        assert [m.role for m in record.messages] == ["system", "user"]
        assert record.messages[1].content == f"Context:\n- c\n\nQuestion: {question(number)}"
        assert (record.answer, record.finish_reason, record.status) == (f"Answer {number}.", "stop", "ok")
        assert (record.session, record.user) == (f"s-{number // 3}", f"u-{number % 4}")
        assert (record.prompt_version, record.environment, record.model) == ("faq-1", "production", f"m-{number % 2}")
        assert (record.input_tokens, record.output_tokens, record.ttft_ms) == (100 + number, number, 10.5 + number)
        assert record.contexts == (Context(f"c{number}", f"Answer {number}. Corrected {number}: 1 2"),)
        (thumb,) = latest_scores(record.scores, THUMB)
        assert (thumb.value, thumb.source, thumb.author) == (number % 3 != 0, "user", f"u-{number % 4}")
        corrections = [score.value for score in latest_scores(record.scores, CORRECTION)]
        assert corrections == ([f"Corrected {number}: 1\n2"] if number % 3 == 0 else [])

    # The same moment again: the same records; and a dataset comes out of them.
    again = harvest(store, found.window, as_of_ms=found.as_of_ms, settle_s=0)
    assert again.records == found.records
    curation = curate(found.records, (), existing=store.exists(ids))
    sources = DatasetSources("sha256:" + "1" * 64, "sha256:" + "2" * 64, found.summary())
    summary = write_dataset(curation, tmp_path / "dataset", sources, minimum=20)
    # Of ten corrections one belongs to the question "42", which the policy finds too short.
    assert summary.by_rule == {"correction": 9, "thumbs up": 20}
    assert summary.by_reason == {"question too short or too long": 1}


def test_a_flipped_thumb_is_seen_in_its_last_state_and_counted_by_release(
    tracer: ChatTracer, store: TraceStore
) -> None:
    since = now_ms() - 1
    ids = [ask(tracer, number) for number in range(6)]
    tracer.flush()
    for trace_id in ids:
        store.add_thumb(trace_id, True, "u")
    store.add_thumb(ids[1], False, "u")
    store.add_thumb(ids[3], False, "u")
    store.add_thumb(ids[3], True, "u")
    store.add_thumb(ids[5], False, "somebody else")
    votes = {r.id: [s.value for s in latest_scores(r.scores, THUMB)] for r in read(store, since).records}
    assert [votes[trace_id] for trace_id in ids] == [[True], [False], [True], [True], [True], [True, False]]
    assert len(next(r for r in read(store, since).records if r.id == ids[3]).scores) == 3
    challenged = {r.id: r for r in store.answers_of(CHALLENGER, since, known=[ids[1]])}
    assert set(challenged) == {ids[1], ids[3], ids[5]}
    assert [s.value for s in latest_scores(challenged[ids[5]].scores, THUMB)] == [True, False]
    # What was read before comes with its scores alone.
    assert (challenged[ids[1]].answer, len(challenged[ids[1]].scores)) == ("", 2)
    assert challenged[ids[3]].answer
    assert {r.id for r in store.answers_of(CHAMPION, since)} == {ids[0], ids[2], ids[4]}
    assert list(store.answers_of(CHAMPION, now_ms() + 1)) == []


def test_a_half_written_trace_waits_for_its_root(tracer: ChatTracer, store: TraceStore) -> None:
    since = now_ms() - 1
    whole = ask(tracer, 7)
    with tracer.chat(session="s", user="u", question="Slow?") as span:
        # A span inside the request ends, and is sent, before its root.
        tracer._tracer.start_span("retrieval").end()
        tracer.flush()
        first = read(store, since)
        assert [r.id for r in first.records] == [whole]
        assert (first.counts.unfinished, first.watermark.pending) == (1, (span.trace_id,))
        span.prompted([Message("user", "Slow?")], version="faq-1")
        span.answer("Yes.", release=CHAMPION)
    tracer.flush()
    second = harvest(store, Window(0, now_ms() + 60_000), as_of_ms=now_ms(), settle_s=0, previous=first.watermark)
    assert [(r.id, r.answer) for r in second.records] == [(span.trace_id, "Yes.")]
    assert second.counts.recovered == 1


def test_feedback_for_an_unknown_trace_is_told(tracer: ChatTracer, store: TraceStore) -> None:
    known = ask(tracer, 8)
    tracer.flush()
    assert store.exists([known, "0" * 32]) == frozenset({known})
    with pytest.raises(TraceMissing, match="0" * 32):
        store.add_thumb("0" * 32, True, "u")
    written = add_feedback(store, [Feedback(known, "u", up=True), Feedback("0" * 32, "u", up=True)])
    assert (written.thumbs, written.missing) == (1, ("0" * 32,))


def test_a_failed_request_is_an_error_in_the_record(tracer: ChatTracer, store: TraceStore) -> None:
    since = now_ms() - 1
    with tracer.chat(session="s", user="u", question="Will it fail?") as span:
        span.prompted([Message("user", "Will it fail?")], version="faq-1")
        span.fail("503", "no healthy upstream", release=CHALLENGER)
    tracer.flush()
    (record,) = read(store, since).records
    assert (record.status, record.error, record.release, record.answer) == (
        "error",
        "no healthy upstream",
        CHALLENGER,
        "",
    )
    assert [r.id for r in store.answers_of(CHALLENGER, since)] == [record.id]
