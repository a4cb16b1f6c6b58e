"""What a local part is: the command to run, the ports it listens on, and how to tell that it is well.

Every room that brings a server of its own (vLLM, Envoy) describes it with these values; `processes.Supervisor` runs
whatever it is given and knows no part by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["stopped", "starting", "running", "backoff", "stopping", "exited", "fatal", "unknown", "lost"]
"""supervisord's states in lower case; `lost` is a part whose supervisord is dead while the part still runs."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}")


@dataclass(frozen=True)
class HealthCheck:
    """How a part shows that it serves, not only that its process lives.

    `kind` "http": a GET of `target` (a URL) must answer with a status in `statuses` (empty: any 2xx).
    `kind` "tcp": `target` is `host:port` and must accept a connection. The kernel accepts for a process that hangs,
    so prefer the other two.
    `kind` "grpc": `target` is `host:port` and must answer the opening of an HTTP/2 connection.
    `timeout_s` bounds one probe. A part that is up and fails its probes for `hang_s` seconds counts as hanging.
    """

    kind: Literal["http", "tcp", "grpc"]
    target: str
    statuses: tuple[int, ...] = ()
    timeout_s: float = 5.0
    hang_s: float = 15.0

    @classmethod
    def http(cls, url: str, *, statuses: tuple[int, ...] = (), timeout_s: float = 5.0) -> HealthCheck:
        """A GET of `url` must answer."""
        return cls("http", url, statuses, timeout_s)

    @classmethod
    def tcp(cls, host: str, port: int, *, timeout_s: float = 5.0) -> HealthCheck:
        """`host:port` must accept a connection."""
        return cls("tcp", f"{host}:{port}", (), timeout_s)

    @classmethod
    def grpc(cls, host: str, port: int, *, timeout_s: float = 5.0) -> HealthCheck:
        """`host:port` must open an HTTP/2 connection."""
        return cls("grpc", f"{host}:{port}", (), timeout_s)


@dataclass(frozen=True)
class ServiceSpec:
    """One local part. Equal specs are left running; any difference in a running part restarts that part only.

    `command` is an argument list: no shell reads it. `environment` is added to a copy of the environment of whoever
    started supervision; secrets belong there and never in `command`. `ports` are names in the port book
    (`ports.PortBook`). `depends_on` names parts of the same `up` that must be healthy before this one starts.
    `stop_group` sends the stop signal to the part's whole process group; False sends it to the first process only,
    for a server that drains and ends its own workers. What is left after `stop_wait_s` is killed as a group.
    """

    name: str
    command: tuple[str, ...]
    health: HealthCheck
    environment: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[str, ...] = ()
    ready_timeout_s: float = 60.0
    stop_wait_s: int = 10
    stop_signal: Literal["TERM", "INT", "QUIT"] = "TERM"
    stop_group: bool = True
    directory: Path | None = None
    depends_on: tuple[str, ...] = ()
    url: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a part's name must match {_NAME.pattern}, not {self.name!r}")
        if not self.command:
            raise ValueError(f"the part {self.name!r} has no command")

    def to_json(self) -> dict[str, Any]:
        """Everything about the part, secrets included: for a file that only the owner reads."""
        content = asdict(self)
        content["environment"] = dict(self.environment)
        content["directory"] = str(self.directory) if self.directory else None
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ServiceSpec:
        """The inverse of `to_json`. Raises `TypeError`, `KeyError` or `ValueError` on foreign content."""
        health = dict(content["health"])
        health["statuses"] = tuple(health["statuses"])
        fields = dict(content)
        fields.update(
            command=tuple(fields["command"]),
            health=HealthCheck(**health),
            ports=tuple(fields["ports"]),
            depends_on=tuple(fields["depends_on"]),
            directory=Path(fields["directory"]) if fields["directory"] else None,
        )
        return cls(**fields)


@dataclass(frozen=True)
class ServiceStatus:
    """One part as it is now. `pid` and `uptime_s` (seconds) are None when no process runs."""

    name: str
    state: State
    pid: int | None
    uptime_s: float | None
    url: str | None
    healthy: bool
    detail: str = ""
