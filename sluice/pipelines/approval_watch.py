"""Approvals made in MLflow start their release: by looking now and then, and when MLflow calls (its webhooks).

Both do the same take-over (`approvals.take_over`), of one version or of all; a release is started once for each
complete approval, however many look at the same time (`runs.start_run` with the approval's ledger entry as its key).
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sluice.components.aliases import follow_ledger
from sluice.components.workspace import Workspace
from sluice.infra.errors import SluiceError, UnavailableError
from sluice.infra.settings import Settings
from sluice.pipelines.approvals import Decided, take_over
from sluice.pipelines.runs import Run, start_run
from sluice.registry.webhooks import HEADERS, LARGEST_BODY, CallRefused, Deliveries, hint_of

PATH = "/webhooks/mlflow"
LOOPBACK = "127.0.0.1"
CALL_TIMEOUT_S = 5.0
CALLS_AT_ONCE = 16
_ALL = 0
"""No version has this number."""


def start_release(settings: Settings, decided: Decided, policy: str = "default") -> Run:
    """The release of a complete approval: started by the first who asks, found by everybody else."""
    parameters = {"adapter": decided.version.digest, "policy": policy, "allow_override": decided.overridden}
    return start_run(settings, "release", parameters, key=decided.approval)


class Watch:
    """Looks at MLflow every `every_s` seconds and when it is asked to; `tell` hears each new sentence once.

    An MLflow or a store that does not answer is told, and looked at again: a watch outlives its parts.
    """

    def __init__(self, workspace: Workspace, tell: Callable[[str], None], *, every_s: float) -> None:
        self._workspace = workspace
        self._tell = tell
        self._every_s = every_s
        self._asked: set[int] = set()
        self._changed = threading.Condition()
        self._stopped = False
        self._told: set[str] = set()

    def look_at(self, version: int) -> None:
        """Look at one version soon. Returns at once."""
        with self._changed:
            self._asked.add(version)
            self._changed.notify()

    def stop(self) -> None:
        """End `run` after what it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def run(self) -> None:
        """Look until `stop`."""
        due = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._asked, max(0.0, due - time.monotonic()))
                if self._stopped:
                    return
                asked, self._asked = self._asked or {_ALL}, set()
            if time.monotonic() >= due:
                asked, due = {_ALL}, time.monotonic() + self._every_s
            for number in asked:
                self._look(number)

    def _look(self, number: int) -> None:
        def start(decided: Decided) -> None:
            run = start_release(self._workspace.settings, decided)
            self._say(f"version {decided.version.number}: release {run.id} is {run.state}")

        sentences: list[str] = []
        try:
            if number == _ALL:
                sentences = follow_ledger(self._workspace)
            taken, problems = take_over(self._workspace, start, only=number or None)
            sentences += problems
            sentences += [f"version {d.version.number} {d.state} by {d.approver}: {d.sentence}" for d in taken]
        except (SluiceError, OSError) as error:
            # A full disk too: who watches goes on, and the next look tries again.
            sentences.append(str(error))
        for sentence in sentences:
            self._say(sentence)

    def _say(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._tell(sentence)


class _Server(ThreadingHTTPServer):
    """At most `CALLS_AT_ONCE` callers, each for `CALL_TIMEOUT_S` seconds in all, however slowly it sends."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *where: Any) -> None:
        self._slots = threading.BoundedSemaphore(CALLS_AT_ONCE)
        super().__init__(*where)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Whoever comes while all are taken waits in the kernel's queue; a slot is free after CALL_TIMEOUT_S at most.
        self._slots.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        ends = threading.Timer(CALL_TIMEOUT_S, _break_off, [request])
        ends.daemon = True
        ends.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            ends.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that breaks off is no event."""


def _break_off(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class Receiver:
    """An HTTP server for MLflow's webhook calls: `POST /webhooks/mlflow`, answered before anything is done.

    `wanted` hears the version of each admitted call about `application`. Any other call changes nothing.
    """

    def __init__(
        self,
        application: str,
        deliveries: Deliveries,
        wanted: Callable[[int], None],
        *,
        host: str = LOOPBACK,
        port: int = 0,
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = CALL_TIMEOUT_S
            server_version, sys_version = "sluice", ""

            def do_POST(self) -> None:
                try:
                    self._answer(202, self._take())
                except CallRefused as error:
                    self._answer(error.status, error.message)
                except OSError:
                    # The caller is gone, or takes its time.
                    self.close_connection = True

            def do_GET(self) -> None:
                self._answer(405 if self.path == PATH else 404, "MLflow's webhook calls go here, by POST.")

            do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_GET

            def _take(self) -> str:
                if self.path != PATH:
                    raise CallRefused(404, "There is nothing here.")
                length = self.headers.get("content-length") or ""
                if not re.fullmatch("[0-9]+", length):
                    raise CallRefused(411, "The call has no length.")
                if len(length) > 9 or int(length) > LARGEST_BODY:
                    raise CallRefused(413, "The call is too large.")
                body = self.rfile.read(int(length))
                deliveries.admit({name: self.headers.get(name, "") for name in HEADERS}, body)
                hint = hint_of(body)
                if hint is None or hint.model != application:
                    return "Nothing to do."
                wanted(hint.version)
                return "Looking."

            def _answer(self, status: int, words: str) -> None:
                data = f"{words}\n".encode()
                self.send_response(status)
                self.send_header("content-type", "text/plain; charset=utf-8")
                self.send_header("content-length", str(len(data)))
                # A refused call's body may not have been read: the connection ends with it.
                self.send_header("connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        try:
            self._http = _Server((host, port), Handler)
        except OSError as error:
            raise UnavailableError(
                f"{host}:{port} cannot be listened on: {error.strerror or error}.", hint="Choose another --port."
            ) from error
        self.port = int(self._http.server_port)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
