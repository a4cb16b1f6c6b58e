"""Asks the processes that carry the traffic themselves: every address behind a name, each on a connection of its own.

Behind a headless Service each proxy has an address, so what all of them say is what users get. Behind one address
(a load balancer) only the proxy that happens to answer is heard.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sluice.infra.errors import InputError, UnavailableError

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Answer:
    """`address` is who said it; header names are in lower case."""

    address: str
    status: int
    headers: Mapping[str, str]
    body: str


class DataPlane:
    """The proxies behind `url` (`http(s)://host:port`). `host` is the name clients ask for, where it is another."""

    def __init__(self, url: str, *, host: str = "", timeout_s: float = 5.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is not an address such as http://gateway-proxies.ml-serving:8080.")
        self.url = url
        self._secure = parts.scheme == "https"
        self._name = parts.hostname
        self._port = parts.port or (443 if self._secure else 80)
        self._host = host or self._name
        self._timeout_s = timeout_s

    def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None
    ) -> tuple[Answer, ...]:
        """What each address answers. Raises `UnavailableError` when one does not, or when there is none."""
        try:
            found = socket.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise UnavailableError(f"The address {self.url} is not known: {error}.") from error
        addresses = sorted({str(entry[4][0]) for entry in found})
        return tuple(self._ask_one(address, method, path, dict(headers or {}), body) for address in addresses)

    def metric(self, name: str, labels: Mapping[str, str], path: str) -> float:
        """The sum of a Prometheus metric over all addresses. `UnavailableError` when no address knows the metric with
        those labels' names: nothing said is not zero."""
        total, known = 0.0, False
        for answer in self.ask("GET", path):
            if answer.status != 200:
                raise UnavailableError(f"The metrics at {self.url}{path} answer {answer.status}.")
            for line in answer.body.splitlines():
                if not line.startswith(name) or line[len(name) : len(name) + 1] not in ("{", " "):
                    continue
                said, _, value = line[len(name) :].rpartition("} ")
                found = dict(_LABEL.findall(said))
                known = known or all(label in found for label in labels)
                if all(found.get(label) == wanted for label, wanted in labels.items()):
                    total += float(value.split()[0])
        if not known:
            raise UnavailableError(f"The metrics at {self.url}{path} have no {name} by {', '.join(labels)}.")
        return total

    def _ask_one(self, address: str, method: str, path: str, headers: dict[str, str], body: Any) -> Answer:
        connection = http.client.HTTPConnection(address, self._port, timeout=self._timeout_s)
        try:
            if self._secure:
                plain = socket.create_connection((address, self._port), self._timeout_s)
                connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self._host)
            data = None if body is None else json.dumps(body).encode()
            sent = {"host": self._host, "connection": "close", **headers}
            connection.request(method, path, data, sent | ({"content-type": "application/json"} if data else {}))
            answer = connection.getresponse()
            found = {key.lower(): value for key, value in answer.getheaders()}
            return Answer(address, answer.status, found, answer.read().decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"The gateway at {self.url} ({address}) does not answer: {error}.") from error
        finally:
            connection.close()
