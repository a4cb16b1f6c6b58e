from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sluice.infra.health import probe
from sluice.infra.services import HealthCheck


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """Accepts connections; answers each with `answer`, or never when None."""
    listening = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            held.append(connection)
            if answer is not None:
                connection.recv(1000)
                connection.sendall(answer)
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for connection in held:
            connection.close()


def test_http() -> None:
    with server(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as port:
        url = f"http://127.0.0.1:{port}/healthz?x=1"
        assert probe(HealthCheck.http(url)) == f"{url} answers 403"
        assert probe(HealthCheck.http(url, statuses=(403,))) is None
    assert "refused" in (probe(HealthCheck.http(url)) or "")
    with server(b"nonsense\r\n\r\n") as port:
        assert "nonsense" in (probe(HealthCheck.http(f"http://127.0.0.1:{port}")) or "")


def test_a_server_that_accepts_and_says_nothing_is_not_well() -> None:
    with server(None) as port:
        silent = [
            HealthCheck.http(f"http://127.0.0.1:{port}/", timeout_s=0.2),
            HealthCheck.grpc("127.0.0.1", port, timeout_s=0.2),
        ]
        assert [probe(check) for check in silent] == ["no answer within 0.2 s"] * 2
        assert probe(HealthCheck.tcp("127.0.0.1", port)) is None, "a bare connection cannot tell"


def test_http2() -> None:
    with server(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))) as port:
        assert probe(HealthCheck.grpc("127.0.0.1", port)) is None
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert "does not speak HTTP/2" in (probe(HealthCheck.grpc("127.0.0.1", port)) or "")
    with server(b"") as port:
        assert "closed" in (probe(HealthCheck.grpc("127.0.0.1", port)) or "")
