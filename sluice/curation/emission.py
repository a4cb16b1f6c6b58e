"""Every answer given to a user becomes one span, sent in batches in the background.

    tracer = ChatTracer(otlp_target(settings), service=settings.application)
    with tracer.chat(session=..., user=..., question=...) as span:
        span.prompted(messages, version="faq-1", contexts=chunks, index_digest=index)
        ... ask the gateway ...
        span.answer(text, release=release, input_tokens=..., output_tokens=..., ttft_ms=...)
    tracer.close()

Tracing never breaks a request: whatever fails here is counted (`counts()`), and the request goes on. An exception of
the caller passes through and marks the span as failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice.curation import attributes as names
from sluice.curation.records import Context, Message, valid_text
from sluice.infra.errors import InputError
from sluice.provenance.canonical import Json

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from sluice.infra.settings import Settings

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
HEADERS_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_HEADERS"


@dataclass(frozen=True)
class OtlpTarget:
    """A collector. `headers` is asked before the first batch, not at the start: the server may not be up yet.

    `trace_attributes` are attributes that this store turns into searchable properties of the trace; each is given
    the release's digest.
    """

    endpoint: str
    headers: Callable[[], Mapping[str, str]]
    trace_attributes: tuple[str, ...] = ()


def otlp_target(settings: Settings) -> OtlpTarget:
    """The collector that the settings name: MLflow's, or any OTLP endpoint by OpenTelemetry's own variables."""
    if settings.traces.backend == "mlflow":
        from sluice.curation.mlflow_rest import MlflowTraceApi

        api = MlflowTraceApi(settings.mlflow.tracking_uri, settings.traces.experiment)
        return OtlpTarget(
            endpoint=f"{api.tracking_uri}/v1/traces",
            headers=lambda: {"x-mlflow-experiment-id": api.experiment_id},
            trace_attributes=("mlflow.traceTag.sluice.release",),
        )
    endpoint = os.environ.get(ENDPOINT_VARIABLE, "")
    if not endpoint:
        raise InputError(
            f"Setting traces.backend = {settings.traces.backend!r} needs the collector's address, and the environment "
            f"variable {ENDPOINT_VARIABLE} is empty.",
            hint=f"Set it to https://<host>/api/public/otel/v1/traces, and {HEADERS_VARIABLE} to the credentials.",
        )
    # The exporter reads the headers' variable itself, so that the credentials pass through no code of ours.
    return OtlpTarget(endpoint=endpoint, headers=dict)


@dataclass(frozen=True)
class EmissionCounts:
    """Spans since the start. `ended` = `exported` + `lost` + `waiting`; `faults` are attributes that were refused."""

    ended: int
    exported: int
    lost: int
    waiting: int
    faults: int


class ChatTracer:
    """Makes chat spans. Safe to share between threads; starting one costs no network."""

    def __init__(
        self,
        target: OtlpTarget,
        *,
        service: str,
        environment: str = "production",
        delay_s: float = 0.5,
        queue_size: int = 8192,
        export_timeout_s: float = 10.0,
    ) -> None:
        """`queue_size` spans wait at most; when the collector is down, the oldest beyond that are lost and counted."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        from sluice.curation.export import CountingExporter

        self._environment = environment
        self._lock = threading.Lock()
        self._ended = 0
        self._faults = 0
        self._dropped = 0
        self._exporter = CountingExporter(target, export_timeout_s)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=queue_size,
            schedule_delay_millis=delay_s * 1000,
            # MLflow on SQLite takes about 15 ms for a span: a batch has to end well within the time-out.
            max_export_batch_size=min(64, queue_size),
        )
        # Not the global provider: an application that has its own tracing keeps it, and spans here are always roots.
        # Always on: a sampled-away answer could never be corrected by its user.
        self._provider = TracerProvider(
            resource=Resource({"service.name": service}), sampler=ALWAYS_ON, shutdown_on_exit=False
        )
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("sluice")
        self._trace_attributes = target.trace_attributes

    @contextlib.contextmanager
    def chat(self, *, session: str, user: str, question: str, model: str = "") -> Iterator[ChatSpan]:
        """One request. `model` is the name that the client asked for."""
        from opentelemetry.context import Context as Root

        with self._tracer.start_as_current_span(
            f"{names.CHAT} {model}".strip(), context=Root(), record_exception=False, set_status_on_exception=False
        ) as raw:
            span = ChatSpan(self, raw)
            span.put(
                {
                    names.OPERATION: names.CHAT,
                    names.REQUEST_MODEL: model,
                    names.SESSION: session,
                    names.USER: user,
                    names.ENVIRONMENT: self._environment,
                }
            )
            with self._guarded():
                span.put({names.REQUEST: names.format_request(question)})
            try:
                yield span
            except BaseException as error:
                span.fail(type(error).__name__, str(error))
                raise
            finally:
                with self._lock:
                    self._ended += 1

    def flush(self, timeout_s: float = 30.0) -> EmissionCounts:
        """Send what waits now, for at most `timeout_s` seconds; what is still waiting then is in the counts."""
        # The SDK's force_flush takes a time-out and ignores it (opentelemetry-python issue 4568).
        flushing = threading.Thread(target=self._processor.force_flush, name="flush-spans", daemon=True)
        flushing.start()
        flushing.join(timeout_s)
        return self.counts()

    def close(self, timeout_s: float = 10.0) -> EmissionCounts:
        """Send what waits, for at most `timeout_s` seconds, and end. What could not be sent is lost, and counted."""
        self.flush(timeout_s)
        self._exporter.give_up()
        self._provider.shutdown()
        counts = self.counts()
        with self._lock:
            self._dropped += counts.waiting
        return self.counts()

    def counts(self) -> EmissionCounts:
        """How many spans went where so far. A span that the full queue pushed out counts as waiting until the end."""
        with self._lock:
            ended, faults, dropped = self._ended, self._faults, self._dropped
        exported, failed = self._exporter.counts()
        return EmissionCounts(ended, exported, failed + dropped, max(0, ended - exported - failed - dropped), faults)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Nothing that describes a request may break it."""
        try:
            yield
        except Exception:  # noqa: BLE001
            with self._lock:
                self._faults += 1


class ChatSpan:
    """The span of one request. No method raises."""

    def __init__(self, tracer: ChatTracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def trace_id(self) -> str:
        """The id that feedback refers to: 32 hexadecimal digits."""
        return f"{self._span.get_span_context().trace_id:032x}"

    @property
    def traceparent(self) -> str:
        """The request header by which the gateway's log names this trace (W3C Trace Context)."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def prompted(
        self,
        messages: Sequence[Message],
        *,
        version: str,
        contexts: Sequence[Context] = (),
        index_digest: str = "",
        output_type: str = "",
        tools: Sequence[Mapping[str, Json]] = (),
    ) -> None:
        """The prompt as it is sent: all messages verbatim, the prompt's version, and what it was built from.
        `output_type` is "json" where JSON is asked for; `tools` are the definitions of those offered."""
        with self._tracer._guarded():
            self.put({names.PROMPT_VERSION: version, names.INDEX: index_digest})
            self.put({names.INPUT_MESSAGES: names.format_messages(messages)})
            self.put({names.CONTEXTS: names.format_contexts(contexts)})
            self.put({names.OUTPUT_TYPE: output_type, names.TOOLS: json.dumps(list(tools)) if tools else ""})

    def answer(
        self,
        text: str,
        *,
        release: str,
        adapter: str = "",
        model: str = "",
        finish_reason: str = "stop",
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        ttft_ms: float | None = None,
        tool_calls: Sequence[Mapping[str, Json]] = (),
    ) -> None:
        """What the user got, and from which release. `adapter` is the release unless said otherwise; `tool_calls` have
        a `name` and `arguments` each."""
        with self._tracer._guarded():
            self.put(
                {
                    names.RELEASE: release,
                    names.ADAPTER: adapter or release,
                    names.RESPONSE_MODEL: model,
                    names.INPUT_TOKENS: input_tokens,
                    names.OUTPUT_TOKENS: output_tokens,
                    names.TTFT_MS: ttft_ms,
                }
            )
            self.put(dict.fromkeys(self._tracer._trace_attributes, release))
            said = names.format_messages([Message("assistant", text)], finish_reason, tool_calls)
            self.put({names.OUTPUT_MESSAGES: said})

    def fail(self, kind: str, message: str = "", *, release: str = "") -> None:
        """The request ended without an answer; `kind` is a short word, as a status code or a class of error."""
        with self._tracer._guarded():
            from opentelemetry.trace import Status, StatusCode

            self.put({names.ERROR: kind, names.ERROR_MESSAGE: message or kind, names.RELEASE: release})
            if release:
                self.put(dict.fromkeys(self._tracer._trace_attributes, release))
            self._span.set_status(Status(StatusCode.ERROR, valid_text(message or kind)))

    def put(self, values: Mapping[str, str | int | float | None]) -> None:
        """Set attributes; empty texts and None are left out."""
        for key, value in values.items():
            if value is None or value == "":
                continue
            with self._tracer._guarded():
                # One half character would make the exporter refuse the whole batch.
                self._span.set_attribute(key, valid_text(value) if isinstance(value, str) else value)
