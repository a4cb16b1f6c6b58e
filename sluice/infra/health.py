"""Probes: does a part serve? Every answer is None (it does) or a few words that say what happened instead."""

from __future__ import annotations

import http.client
import socket
from urllib.parse import urlsplit

from sluice.infra.services import HealthCheck

# RFC 9113 section 3.4: a client opens with this text and a SETTINGS frame; a server must answer with its own.
_HTTP2_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_FRAME_HEADER = 9
_HTTP2_SETTINGS = 4


def probe(check: HealthCheck) -> str | None:
    """One probe, bounded by `check.timeout_s` for each socket operation; never raises on a sick part."""
    try:
        if check.kind == "http":
            return _probe_http(check)
        if check.kind == "grpc":
            return _probe_http2(check)
        with _connect(check):
            return None
    except TimeoutError:
        return f"no answer within {check.timeout_s:g} s"
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _probe_http(check: HealthCheck) -> str | None:
    # Not urllib: it would hand a request for 127.0.0.1 to the proxy of the user's environment.
    parts = urlsplit(check.target)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port or 80, timeout=check.timeout_s)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        status = connection.getresponse().status
    finally:
        connection.close()
    fine = status in check.statuses if check.statuses else 200 <= status < 300
    return None if fine else f"{check.target} answers {status}"


def _probe_http2(check: HealthCheck) -> str | None:
    with _connect(check) as connection:
        connection.sendall(_HTTP2_OPENING)
        answer = b""
        while len(answer) < _HTTP2_FRAME_HEADER:
            received = connection.recv(_HTTP2_FRAME_HEADER - len(answer))
            if not received:
                return f"{check.target} closed the connection"
            answer += received
    return None if answer[3] == _HTTP2_SETTINGS else f"{check.target} does not speak HTTP/2"


def _connect(check: HealthCheck) -> socket.socket:
    host, _, port = check.target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=check.timeout_s)
