"""The connection to an MLflow server: its REST API, bounded in time, with errors that end in a sentence.

We speak MLflow's documented REST API directly: importing its Python client takes 2 to 4 seconds of CPU, and a command
that only reads an approval should not pay that. The client is used for one thing, uploads to an artifact store that
the server does not proxy.

Source of the calls and fields: https://mlflow.org/docs/latest/rest-api.html
"""

from __future__ import annotations

import mimetypes
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from sluice.infra.errors import ConflictError, InputError, SluiceError, UnavailableError
from sluice.infra.progress import Report, no_report
from sluice.provenance.canonical import Json

if TYPE_CHECKING:
    import httpx

TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
DEFAULT_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
UPLOAD_TIMEOUT_S = 60.0

EXPERIMENTS = {
    "training": "Training runs: one for each adapter, with its parameters, its loss and the dataset it learned from.",
    "gates": "Gate runs: one for each comparison of a candidate with the champion, with the report people read.",
    "rollouts": "Rollouts: one for each, with its timeline: shares, metrics, verdicts, and what convicted it.",
    "releases": "What each registered version was made of. The versions themselves are under Models.",
}


class RegistryMissing(SluiceError):
    """MLflow knows no such run, model, version or alias."""


class RegistryExists(ConflictError):
    """MLflow holds something under this name already."""


class MlflowRegistry:
    """One MLflow server. Safe to share between threads; opens no connection before the first call.

    `tracking_uri` is the server's http(s) address. A dead server costs at most two attempts of `CONNECT_TIMEOUT_S`, a
    hanging one `timeout_s` seconds. Credentials not given here come from MLflow's own variables
    (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN).
    """

    def __init__(
        self,
        tracking_uri: str | None,
        *,
        timeout_s: float | None = None,
        username: str | None = None,
        password: str | None = None,
        token: str | None = None,
    ) -> None:
        if not tracking_uri:
            raise UnavailableError(
                "The MLflow server has no address: setting mlflow.tracking_uri is empty.",
                hint="Start the local parts with `sluice up`, or set SLUICE_MLFLOW__TRACKING_URI.",
            )
        if urlsplit(tracking_uri).scheme not in ("http", "https"):
            raise InputError(
                f"Setting mlflow.tracking_uri = {tracking_uri!r} is not an http(s) address.",
                hint="The registry needs a server; a folder or a database file has no page for people to look at.",
            )
        self.uri = tracking_uri.rstrip("/")
        self._timeout_s = timeout_s if timeout_s is not None else _timeout_from_environment()
        self._username, self._password, self._token = username, password, token
        self._lock = threading.Lock()
        self._http: httpx.Client | None = None
        self._experiments: dict[str, str] = {}

    def close(self) -> None:
        """Drop the kept connections."""
        with self._lock:
            if self._http is not None:
                self._http.close()
                self._http = None

    def get(self, path: str, **parameters: Json) -> dict[str, Any]:
        """GET `/api/2.0/mlflow/<path>`; parameters that are None are left out."""
        return self._json("GET", f"/api/2.0/mlflow/{path}", params=_given(parameters))

    def post(self, path: str, **body: Json) -> dict[str, Any]:
        """POST a JSON body to `/api/2.0/mlflow/<path>`; fields that are None are left out."""
        return self._json("POST", f"/api/2.0/mlflow/{path}", json=_given(body))

    def patch(self, path: str, **body: Json) -> dict[str, Any]:
        """PATCH with a JSON body."""
        return self._json("PATCH", f"/api/2.0/mlflow/{path}", json=_given(body))

    def delete(self, path: str, **body: Json) -> dict[str, Any]:
        """DELETE with a JSON body."""
        return self._json("DELETE", f"/api/2.0/mlflow/{path}", json=_given(body))

    def experiment(self, name: str) -> str:
        """The id of an experiment, made when missing and restored when somebody deleted it in the UI."""
        if name not in self._experiments:
            self._experiments[name] = self._find_experiment(name) or self._create_experiment(name)
        return self._experiments[name]

    def upload(
        self,
        files: Mapping[str, Path],
        artifact_uri: str,
        *,
        run_id: str | None = None,
        model_id: str | None = None,
        report: Report = no_report,
    ) -> None:
        """Store small files (relative POSIX path -> local file) under a run or a logged model; again is harmless."""
        for path in files.values():
            if not path.is_file():
                raise InputError(f"The file {str(path)!r} to be shown in MLflow does not exist.")
        if not artifact_uri.startswith("mlflow-artifacts:"):
            self._upload_directly(files, run_id, model_id)
            return
        root = urlsplit(artifact_uri).path.strip("/")
        for done, (name, path) in enumerate(sorted(files.items())):
            report(done, len(files), f"uploading {name}")
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            self._request(
                "PUT",
                f"/api/2.0/mlflow-artifacts/artifacts/{quote(f'{root}/{name}')}",
                content=path.read_bytes(),
                headers={"content-type": kind},
                timeout=UPLOAD_TIMEOUT_S,
            )
        report(len(files), len(files), "uploaded")

    def _upload_directly(self, files: Mapping[str, Path], run_id: str | None, model_id: str | None) -> None:
        # The server only names the place (S3, a shared folder); MLflow's client knows how to write to each of them.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            for name, path in files.items():
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            try:
                client = MlflowClient(self.uri)
                if run_id is not None:
                    client.log_artifacts(run_id, folder)
                else:
                    client.log_model_artifacts(model_id, folder)
            except (MlflowException, OSError) as error:
                raise UnavailableError(f"MLflow's artifact store refused files: {error}.") from error

    def _find_experiment(self, name: str) -> str | None:
        try:
            found = self.get("experiments/get-by-name", experiment_name=name)["experiment"]
        except RegistryMissing:
            return None
        if found.get("lifecycle_stage") == "deleted":
            self.post("experiments/restore", experiment_id=found["experiment_id"])
        return str(found["experiment_id"])

    def _create_experiment(self, name: str) -> str:
        # The kind keeps MLflow's page from asking its first reader what sort of experiment this is.
        tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": EXPERIMENTS.get(name, "")}
        try:
            created = self.post("experiments/create", name=name, tags=pairs(tags))
        except RegistryExists:
            found = self._find_experiment(name)
            if found is None:
                raise
            return found
        return str(created["experiment_id"])

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        response = self._request(method, path, **options)
        try:
            value = response.json()
        except ValueError as error:
            raise UnavailableError(
                f"{self.uri} does not answer like an MLflow server: {response.text[:80]!r}.",
                hint="Check mlflow.tracking_uri (`sluice config show`).",
            ) from error
        return value if isinstance(value, dict) else {}

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        import httpx

        for attempt in (1, 2):
            try:
                response = self._client().request(method, f"{self.uri}{path}", **options)
                break
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError) as error:
                # Without a connection nothing was processed; after one that broke off, only a read may be sent again.
                safe = method == "GET" or not isinstance(error, httpx.RemoteProtocolError)
                if attempt == 2 or not safe:
                    raise self._unreachable(str(error) or type(error).__name__) from error
            except httpx.TimeoutException as error:
                raise self._unreachable(f"no answer to {method} {path} in time") from error
            except httpx.HTTPError as error:
                raise self._unreachable(str(error) or type(error).__name__) from error
        if response.status_code >= 400:
            raise self._refused(method, path, response)
        return response

    def _client(self) -> httpx.Client:
        import httpx

        with self._lock:
            if self._http is None:
                token = self._token or os.environ.get("MLFLOW_TRACKING_TOKEN")
                user = self._username or ("" if self._token else os.environ.get("MLFLOW_TRACKING_USERNAME"))
                password = self._password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
                insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
                self._http = httpx.Client(
                    timeout=httpx.Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s)),
                    # Shorter than the server's own limit (uvicorn: 5 s), or a request meets a closing connection.
                    limits=httpx.Limits(keepalive_expiry=2.0),
                    auth=(user, password) if user else None,
                    headers={"authorization": f"Bearer {token}"} if token and not user else {},
                    verify=not insecure,
                )
            return self._http

    def _unreachable(self, cause: str) -> UnavailableError:
        return UnavailableError(
            f"The MLflow server {self.uri} does not answer: {cause}.",
            hint="Is it running? `sluice status` tells, `sluice up` mends the local one.",
        )

    def _refused(self, method: str, path: str, response: httpx.Response) -> SluiceError:
        code, message = _error_of(response)
        if code == "RESOURCE_DOES_NOT_EXIST":
            return RegistryMissing(f"MLflow at {self.uri}: {message}")
        if code == "RESOURCE_ALREADY_EXISTS":
            return RegistryExists(f"MLflow at {self.uri}: {message}")
        if response.status_code in (401, 403):
            return UnavailableError(
                f"The MLflow server {self.uri} refused {method} {path}: {response.status_code}.",
                hint="Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
            )
        if response.status_code >= 500 or response.status_code in (404, 429):
            return UnavailableError(
                f"The MLflow server {self.uri} failed on {method} {path}: {response.status_code} {message}",
                hint="Its log tells more: `sluice logs mlflow` for the local one.",
            )
        return InputError(f"MLflow at {self.uri} refused {method} {path}: {message}")


def pairs(values: Mapping[str, object]) -> list[dict[str, str]]:
    """MLflow's form of a mapping: a list of key and value, both text."""
    return [{"key": key, "value": str(value)} for key, value in values.items()]


def unpaired(entries: list[dict[str, str]] | None) -> dict[str, str]:
    """A mapping from MLflow's list of key and value."""
    return {entry["key"]: entry.get("value", "") for entry in entries or []}


def quoted(value: str) -> str:
    """A text literal of MLflow's search language, which knows no escapes."""
    if "'" in value:
        raise InputError(f"{value!r} holds a quote, which MLflow's search cannot express.")
    return f"'{value}'"


def _given(values: Mapping[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in values.items() if value is not None}


def _error_of(response: httpx.Response) -> tuple[str, str]:
    try:
        body = response.json()
        return str(body.get("error_code", "")), str(body.get("message", ""))[:500]
    except (ValueError, AttributeError):
        return "", response.text[:200].strip()


def _timeout_from_environment() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return DEFAULT_TIMEOUT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"Environment variable {TIMEOUT_VARIABLE} = {text!r} is not a number of seconds.")
    return seconds
