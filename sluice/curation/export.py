"""OpenTelemetry's exporter with a count of the spans that did not get there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from sluice.curation.emission import OtlpTarget

_logger = logging.getLogger(__name__)


class CountingExporter(SpanExporter):
    """Hands batches to OpenTelemetry's exporter. A batch that fails is counted, and never raises."""

    def __init__(self, target: OtlpTarget, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._delegate: SpanExporter | None = None
        self._given_up = False
        self._exported = 0
        self._failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        if not self._given_up:
            try:
                result = self._open().export(spans)
            except Exception as error:  # noqa: BLE001
                # Anything at all: this runs in the background of somebody's request.
                _logger.warning("%d spans were not sent to %s: %s", len(spans), self._target.endpoint, error)
        with self._lock:
            if result is SpanExportResult.SUCCESS:
                self._exported += len(spans)
            else:
                self._failed += len(spans)
        return result

    def counts(self) -> tuple[int, int]:
        """Spans that were accepted, and spans that were refused or not reachable."""
        with self._lock:
            return self._exported, self._failed

    def give_up(self) -> None:
        """Fail whatever is still handed over, at once; a retry under way ends."""
        if not self._given_up:
            self._given_up = True
            if self._delegate is not None:
                self._delegate.shutdown()

    def shutdown(self) -> None:
        self.give_up()

    def _open(self) -> SpanExporter:
        # Called by the batch processor only, which holds a lock of its own around every export.
        if self._delegate is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            self._delegate = OTLPSpanExporter(
                endpoint=self._target.endpoint,
                headers=dict(self._target.headers()) or None,
                timeout=self._timeout_s,
            )
        return self._delegate
