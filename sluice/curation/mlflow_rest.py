"""MLflow's trace endpoints over HTTP, as far as Sluice uses them (REST API 3.0; seen on MLflow 3.17).

Plain HTTP and not `mlflow.MlflowClient`: importing that costs 2-3 CPU seconds in every process, and one pooled
connection per thread makes a feedback call about as cheap as the server lets it be.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sluice.infra.errors import InputError, SluiceError, UnavailableError
from sluice.provenance.canonical import Json

if TYPE_CHECKING:
    import httpx

SEARCH_PAGE = 500  # the server's own maximum
SPANS_PAGE = 50  # whole traces a call: about 6 KB each as JSON, 0.1-0.2 s a call on SQLite


class MlflowRefusal(SluiceError):
    """The server answered that the request cannot be done; `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class MlflowTraceApi:
    """One experiment's traces. Safe to share between threads; connects at the first call."""

    def __init__(self, tracking_uri: str | None, experiment: str, *, timeout_s: float = 60.0) -> None:
        uri = (tracking_uri or "").rstrip("/")
        if urlsplit(uri).scheme not in ("http", "https"):
            raise InputError(
                f"Setting mlflow.tracking_uri = {tracking_uri!r} is not an http address.",
                hint="`sluice up` starts the local server and writes its address down.",
            )
        self.tracking_uri = uri
        self._experiment = experiment
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._experiment_id: str | None = None

    @property
    def experiment_id(self) -> str:
        """Id of the experiment, which is created when it is not there."""
        with self._lock:
            known = self._experiment_id
        if known is None:
            known = self._find_experiment() or self._create_experiment()
            with self._lock:
                self._experiment_id = known
        return known

    def search(self, condition: str) -> Iterator[Json]:
        """Infos (with assessments, without spans) of all traces that match, oldest first, each once.

        Walks by time and not by the server's offset: a trace that appears while we page shifts every offset behind
        it, and one would be passed over.
        """
        where = {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": self.experiment_id}}
        seen: set[str] = set()
        cursor = 0
        token = ""
        while True:
            body = {
                "locations": [where],
                "filter": f"{condition} AND attributes.timestamp_ms >= {cursor}",
                "order_by": ["timestamp_ms ASC"],
                "max_results": SEARCH_PAGE,
                **({"page_token": token} if token else {}),
            }
            answer = self._call("POST", "/api/3.0/mlflow/traces/search", json=body)
            page = answer.get("traces", [])
            for info in page:
                if info["trace_id"] not in seen:
                    seen.add(info["trace_id"])
                    yield info
            if len(page) < SEARCH_PAGE:
                return
            last = milliseconds(page[-1]["request_time"])
            # A whole page within one millisecond: only the offset leads on.
            token = answer.get("next_page_token", "") if last == cursor else ""
            if last == cursor and not token:
                return
            cursor = last

    def batch_get(self, ids: Sequence[str]) -> list[Json]:
        """Info and spans of the *complete* traces among `ids`; the server leaves out the others."""
        found: list[Json] = []
        for start in range(0, len(ids), SPANS_PAGE):
            params = [("trace_ids", trace_id) for trace_id in ids[start : start + SPANS_PAGE]]
            found += self._call("GET", "/api/3.0/mlflow/traces/batchGet", params=params).get("traces", [])
        return found

    def batch_get_infos(self, ids: Sequence[str]) -> list[Json]:
        """Infos of those of `ids` that exist."""
        found: list[Json] = []
        for start in range(0, len(ids), SEARCH_PAGE):
            body = {"trace_ids": list(ids[start : start + SEARCH_PAGE])}
            answer = self._call("POST", "/api/3.0/mlflow/traces/batchGetInfos", json=body)
            found += answer.get("trace_infos", [])
        return found

    def create_assessment(self, trace_id: str, assessment: Mapping[str, Json]) -> None:
        """Add one assessment to a trace. Raises `MlflowRefusal` with status 404 when the trace is not there."""
        body = {"assessment": {"trace_id": trace_id, **assessment}}
        self._call("POST", f"/api/3.0/mlflow/traces/{trace_id}/assessments", json=body)

    def _find_experiment(self) -> str | None:
        try:
            params = [("experiment_name", self._experiment)]
            answer = self._call("GET", "/api/2.0/mlflow/experiments/get-by-name", params=params)
        except MlflowRefusal as error:
            if error.status == 404:
                return None
            raise
        found = answer["experiment"]
        if found.get("lifecycle_stage") == "deleted":
            raise InputError(
                f"Setting traces.experiment = {self._experiment!r} names an experiment that was deleted in MLflow.",
                hint="Restore it in MLflow, or choose another name.",
            )
        return str(found["experiment_id"])

    def _create_experiment(self) -> str:
        try:
            answer = self._call("POST", "/api/2.0/mlflow/experiments/create", json={"name": self._experiment})
            return str(answer["experiment_id"])
        except MlflowRefusal:
            # Somebody else may have made it meanwhile; if not, the refusal is the news.
            found = self._find_experiment()
            if found is None:
                raise
            return found

    def _call(
        self, method: str, path: str, *, params: Sequence[tuple[str, str]] = (), json: Json = None
    ) -> dict[str, Json]:
        import httpx

        try:
            answer = self._connection().request(method, path, params=tuple(params), json=json)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"MLflow at {self.tracking_uri} does not answer: {str(error) or type(error).__name__}.",
                hint="Is it running? `sluice status` tells, `sluice up` mends the local one.",
            ) from error
        if answer.status_code >= 500:
            raise UnavailableError(f"MLflow at {self.tracking_uri} failed on {path}: {answer.status_code}.")
        if answer.status_code in (401, 403):
            raise UnavailableError(
                f"MLflow at {self.tracking_uri} refused {path}: {answer.status_code}.",
                hint="Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
            )
        if answer.status_code >= 400:
            raise MlflowRefusal(f"MLflow refused {path}: {answer.text[:300]}", answer.status_code)
        parsed = answer.json()
        return parsed if isinstance(parsed, dict) else {}

    def _connection(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                import os

                import httpx

                host = urlsplit(self.tracking_uri).hostname or ""
                user = os.environ.get("MLFLOW_TRACKING_USERNAME")
                self._client = httpx.Client(
                    base_url=self.tracking_uri,
                    timeout=self._timeout_s,
                    auth=(user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None,
                    # A proxy of the user's environment has no business between us and a server on this machine.
                    trust_env=host not in ("127.0.0.1", "localhost", "::1"),
                    limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
                )
            return self._client


def milliseconds(timestamp: str) -> int:
    """Milliseconds since the epoch of a protobuf timestamp in JSON (`2026-11-21T10:00:00.123Z`)."""
    from datetime import datetime

    moment = datetime.fromisoformat(timestamp)
    return int(moment.replace(microsecond=0).timestamp()) * 1000 + moment.microsecond // 1000
