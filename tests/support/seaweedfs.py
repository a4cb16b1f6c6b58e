"""A real SeaweedFS on free ports: an object store for tests that need more than one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import SecretStr

from sluice.infra.errors import UnavailableError
from sluice.infra.object_store import S3ObjectStore
from sluice.infra.program import program
from sluice.infra.settings import ObjectStoreSettings


@contextmanager
def seaweedfs(folder: Path, secret: str) -> Iterator[ObjectStoreSettings]:
    """The settings of a store with its own keys, its bucket made; ended with all that it started."""
    servers = ("s3", "master", "volume", "filer", "admin")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2 * len(servers))]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [int(one.getsockname()[1]) for one in sockets]
    command = [program("weed"), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{server}.port={port}" for server, port in zip(servers, ports[::2], strict=True)]
    command += [f"-{server}.port.grpc={port}" for server, port in zip(servers, ports[1::2], strict=True)]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false", "-master.telemetry=false"]
    settings = ObjectStoreSettings(
        endpoint_url=f"http://127.0.0.1:{ports[0]}",
        bucket="sluice",
        access_key="test-site",
        secret_key=SecretStr(secret),
    )
    keys = {"AWS_ACCESS_KEY_ID": "test-site", "AWS_SECRET_ACCESS_KEY": secret}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **keys}, start_new_session=True, cwd=folder
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                S3ObjectStore(settings).ensure_bucket()
                S3ObjectStore(settings).put("ready", b"")
                break
            except UnavailableError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "log").read_text()[-2000:]) from None
                time.sleep(0.1)
        yield settings
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
