from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from sluice.curation import attributes as names
from sluice.curation.attributes import record_of_span
from sluice.curation.emission import ENDPOINT_VARIABLE, HEADERS_VARIABLE, ChatTracer, OtlpTarget, otlp_target
from sluice.curation.records import Context, Message
from sluice.infra.errors import InputError
from sluice.infra.settings import Settings, TraceSettings
from tests.curation.collector import Collector, http_server

RELEASE = "sha256:" + "a" * 64


@pytest.fixture
def collector() -> Collector:
    return Collector()


@pytest.fixture
def address(collector: Collector) -> Iterator[str]:
    with http_server(collector) as address:
        yield address


def make_tracer(address: str, **options: float) -> ChatTracer:
    target = OtlpTarget(f"{address}/v1/traces", lambda: {"x-mlflow-experiment-id": "7"}, ("tag.release",))
    return ChatTracer(target, service="assistant", **options)  # type: ignore[arg-type]


def ask(tracer: ChatTracer, question: str = "What?", user: str = "u1") -> str:
    with tracer.chat(session="s1", user=user, question=question, model="assistant") as span:
        messages = [Message("system", "s"), Message("user", f"Context:\n- c\n\nQuestion: {question}")]
        span.prompted(messages, version="faq-1", contexts=[Context("c1", "c")], index_digest="sha256:i")
        span.answer("That.", release=RELEASE, model="assistant-a", input_tokens=9, output_tokens=2, ttft_ms=3.5)
    return span.trace_id


def test_a_request_becomes_a_span_with_all_it_was(collector: Collector, address: str) -> None:
    tracer = make_tracer(address)
    trace_id = ask(tracer, 'Får jag?\u2028 "ja"')
    counts = tracer.flush()
    assert (counts.ended, counts.exported, counts.lost, counts.waiting, counts.faults) == (1, 1, 0, 0, 0)
    assert collector.headers[0]["x-mlflow-experiment-id"] == "7"
    assert collector.headers[0]["path"] == "/v1/traces"
    (span,) = collector.spans
    assert span["trace_id"] == trace_id
    assert span["parent"] == ""
    assert span["attributes"]["tag.release"] == RELEASE
    record = record_of_span(trace_id, 1, 2, "ok", span["attributes"], ())
    assert record.question == 'Får jag?\u2028 "ja"'
    assert [m.role for m in record.messages] == ["system", "user"]
    assert record.answer == "That."
    assert (record.session, record.user, record.environment) == ("s1", "u1", "production")
    assert (record.release, record.adapter_digest, record.index_digest) == (RELEASE, RELEASE, "sha256:i")
    assert (record.input_tokens, record.output_tokens, record.ttft_ms) == (9, 2, 3.5)
    assert record.contexts == (Context("c1", "c"),)
    tracer.close()


def test_each_request_is_a_trace_of_its_own(collector: Collector, address: str) -> None:
    tracer = make_tracer(address)
    with tracer.chat(session="s", user="u", question="outer"):
        inner = ask(tracer)
    tracer.close()
    assert len({span["trace_id"] for span in collector.spans}) == 2
    assert {span["parent"] for span in collector.spans} == {""}
    assert inner in {span["trace_id"] for span in collector.spans}


def test_an_error_of_the_caller_passes_and_marks_the_span(collector: Collector, address: str) -> None:
    tracer = make_tracer(address)
    with pytest.raises(ZeroDivisionError), tracer.chat(session="s", user="u", question="q"):
        _ = 1 / 0
    with tracer.chat(session="s", user="u", question="q") as span:
        span.fail("503", "no healthy upstream", release=RELEASE)
    tracer.close()
    assert [span["error"] for span in collector.spans] == [True, True]
    assert collector.spans[0]["attributes"][names.ERROR] == "ZeroDivisionError"
    assert collector.spans[1]["attributes"][names.ERROR_MESSAGE] == "no healthy upstream"
    assert collector.spans[1]["attributes"]["tag.release"] == RELEASE


def test_a_dead_collector_delays_no_request_and_every_loss_is_counted() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        tracer = make_tracer(address, export_timeout_s=0.2, delay_s=0.05)
        started = time.perf_counter()
        for _ in range(50):
            ask(tracer)
        assert time.perf_counter() - started < 1.0
        assert tracer.flush(timeout_s=0.5).exported == 0
        counts = tracer.close(timeout_s=0.5)
    assert (counts.ended, counts.exported, counts.lost, counts.waiting) == (50, 0, 50, 0)


def test_a_target_that_cannot_be_prepared_is_a_loss_and_no_error(collector: Collector, address: str) -> None:
    calls = []

    def headers() -> dict[str, str]:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the server is not up yet")
        return {"x-mlflow-experiment-id": "7"}

    tracer = ChatTracer(OtlpTarget(f"{address}/v1/traces", headers), service="assistant")
    ask(tracer)
    assert tracer.flush().lost == 1
    ask(tracer)
    counts = tracer.close()
    assert (counts.exported, counts.lost) == (1, 1)


def test_a_refused_batch_and_a_full_queue_are_counted(collector: Collector, address: str) -> None:
    tracer = make_tracer(address, queue_size=4, delay_s=30)
    collector.status = 400
    ask(tracer)
    assert tracer.flush().lost == 1
    tracer.close()

    collector.status = 503
    tracer = make_tracer(address, queue_size=4, delay_s=30, export_timeout_s=0.3)
    for _ in range(40):
        ask(tracer)
    counts = tracer.close(timeout_s=2)
    assert (counts.ended, counts.exported, counts.lost, counts.waiting) == (40, 0, 40, 0)


def test_what_cannot_be_described_does_not_break_the_request(collector: Collector, address: str) -> None:
    tracer = make_tracer(address)
    with tracer.chat(session="s", user="half \ud800 character", question="q\udc00") as span:
        span.prompted([None], version="v")  # type: ignore[list-item]
        span.answer("an\ud800swer", release=RELEASE)
    counts = tracer.close()
    assert (counts.exported, counts.faults) == (1, 1)
    record = record_of_span("1" * 32, 1, 2, "ok", collector.spans[0]["attributes"], ())
    assert (record.user, record.question, record.answer) == ("half ? character", "q?", "an?swer")


def test_the_settings_choose_the_collector(monkeypatch: pytest.MonkeyPatch, collector: Collector, address: str) -> None:
    with pytest.raises(InputError, match="tracking_uri = None"):
        otlp_target(Settings())
    elsewhere = Settings(traces=TraceSettings(backend="langfuse"))
    monkeypatch.delenv(ENDPOINT_VARIABLE, raising=False)
    with pytest.raises(InputError, match=ENDPOINT_VARIABLE):
        otlp_target(elsewhere)
    monkeypatch.setenv(ENDPOINT_VARIABLE, f"{address}/api/public/otel/v1/traces")
    monkeypatch.setenv(HEADERS_VARIABLE, "authorization=Basic abc")
    tracer = ChatTracer(otlp_target(elsewhere), service="assistant")
    ask(tracer)
    assert tracer.close().exported == 1
    assert collector.headers[0]["path"] == "/api/public/otel/v1/traces"
    assert collector.headers[0]["authorization"] == "Basic abc"
