"""supervisord for one installation: its configuration, its socket, its life. `processes` decides what runs in it."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sluice.infra import launch
from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.orphans import HOME_VARIABLE, PART_VARIABLE, SUPERVISORD
from sluice.infra.services import ServiceSpec

CONFIGURATION = "supervisord.conf"
PIDFILE = "supervisord.pid"
_SOCKET = "supervisor.sock"
# A unix socket's path has at most 108 bytes, and supervisord binds `<path>.<process id>` before it renames.
_LONGEST_SOCKET = 95
_SOCKET_LINE = re.compile(r"^file=(.+)$", re.MULTILINE)


class Unreachable(Exception):
    """supervisord does not answer: not running, killed, stopped or without its socket."""


class Fault(Exception):
    """supervisord answered with an error; `name` is its own word, such as `ALREADY_STARTED`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.name = text.partition(":")[0]


def socket_path(home: Path) -> Path:
    """Where the socket lies: in `home` when that is short enough, else in a private folder of the temporary one."""
    written = home / CONFIGURATION
    if written.is_file() and (line := _SOCKET_LINE.search(written.read_text())):
        # An earlier `up` may have seen another TMPDIR: its supervisord listens where its configuration says.
        return Path(line.group(1).replace("%%", "%"))
    inside = home / _SOCKET
    if len(os.fsencode(inside)) <= _LONGEST_SOCKET:
        return inside
    key = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):
        outside = parent / f"sluice-{os.getuid()}-{key}" / _SOCKET
        if len(os.fsencode(outside)) <= _LONGEST_SOCKET:
            return outside
    raise InputError(f"No path short enough for a unix socket: home = {str(home)!r}.", hint="Choose a shorter home.")


def private_folder(path: Path) -> None:
    """Create `path` for its owner only. Raises `UnavailableError` when somebody else put something there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if path.is_symlink() or found.st_uid != os.getuid():
        raise UnavailableError(
            f"The folder {str(path)!r} belongs to somebody else.", hint="Set TMPDIR to a folder of your own."
        )
    path.chmod(0o700)


def configuration(
    home: Path, files: Mapping[str, Path], specs: Iterable[ServiceSpec], depths: Mapping[str, int]
) -> str:
    """supervisord.conf. `files` holds each part's own file, `depths` its place in the order of dependence."""
    if any(mark in str(home) for mark in (" ;", " #", "\n")):
        raise InputError(f"home = {str(home)!r} holds ' ;', ' #' or a line break.", hint="Choose another folder.")
    logs = home / "logs"
    lines = [
        "; Written by `sluice up`; changes are lost.",
        "[unix_http_server]",
        f"file={_escaped(socket_path(home))}",
        "chmod=0600",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        "[supervisord]",
        f"logfile={_escaped(logs / 'supervisord.log')}",
        "logfile_maxbytes=5MB",
        "logfile_backups=2",
        f"pidfile={_escaped(home / PIDFILE)}",
        f"childlogdir={_escaped(logs)}",
        f"directory={_escaped(home)}",
    ]
    for spec in specs:
        command = shlex.join((sys.executable, "-P", launch.__file__, str(home), str(files[spec.name])))
        lines += [
            f"[program:{spec.name}]",
            f"command={_escaped(command)}",
            # What depends on others stops first: supervisord stops from the highest priority down.
            f"priority={100 + depths.get(spec.name, 0)}",
            "autostart=false",
            "autorestart=true",
            "startsecs=1",
            "startretries=3",
            f"stopsignal={spec.stop_signal}",
            f"stopwaitsecs={spec.stop_wait_s}",
            f"stopasgroup={str(spec.stop_group).lower()}",
            "killasgroup=true",
            "redirect_stderr=true",
            # Relative to home, where supervisord works: it expands this value twice, so no escape is safe in it.
            f"stdout_logfile=logs/{spec.name}.log",
            "stdout_logfile_maxbytes=10MB",
            "stdout_logfile_backups=3",
        ]
    return "\n".join(lines) + "\n"


def _escaped(value: object) -> str:
    return str(value).replace("%", "%%")


class SupervisordClient:
    """Calls to supervisord over its socket. Safe to share between threads: each call has its own connection."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def call(self, method: str, *arguments: Any, timeout_s: float = 10.0) -> Any:
        """`supervisor.<method>(*arguments)`. Raises `Unreachable` or `Fault`."""
        from supervisor.xmlrpc import SupervisorTransport

        path = socket_path(self.home)
        transport = SupervisorTransport(None, None, serverurl=f"unix://{path}")
        # The transport's own connection has no time-out, and would wait for ever on a stopped supervisord.
        transport._get_connection = lambda: _connection(path, timeout_s)
        try:
            proxy = xmlrpc.client.ServerProxy("http://localhost", transport=transport)
            return getattr(proxy.supervisor, method)(*arguments)
        except xmlrpc.client.Fault as error:
            raise Fault(error.faultString) from error
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise Unreachable(str(error)) from error
        finally:
            transport.close()

    def answers(self) -> bool:
        """Is there a supervisord of this home that answers?"""
        try:
            return bool(self.call("getState", timeout_s=5.0)["statename"] == "RUNNING")
        except (Unreachable, Fault):
            return False

    def start(self, *, timeout_s: float = 20.0) -> None:
        """Start supervisord as a daemon and wait for its answer. Raises `UnavailableError`."""
        if socket_path(self.home).parent != self.home:
            private_folder(socket_path(self.home).parent)
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.home / CONFIGURATION)]
        environment = os.environ | {PART_VARIABLE: SUPERVISORD, HOME_VARIABLE: str(self.home)}
        try:
            ended = subprocess.run(
                command,
                env=environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal of `sluice up` must not reach the parts.
                start_new_session=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"supervisord did not start within {timeout_s:g} s.") from error
        deadline = time.monotonic() + timeout_s
        while ended.returncode == 0 and time.monotonic() < deadline:
            if self.answers():
                return
            time.sleep(0.1)
        said = ended.stdout.decode(errors="replace").strip()[-1000:]
        raise UnavailableError(
            f"supervisord did not start: {said or 'no answer on its socket'}.",
            hint=f"Its log is {self.home / 'logs' / 'supervisord.log'}.",
        )


def _connection(path: Path, timeout_s: float) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("localhost", timeout=timeout_s)
    # Without this a connection that supervisord closed would be opened again as TCP to port 80.
    connection.auto_open = 0
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(timeout_s)
        connection.sock.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection
