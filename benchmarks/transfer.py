"""Files to and from the object store: our resumable transfers against boto3's own, in one run.

    .venv/bin/python benchmarks/transfer.py [--mib 1024] [--rounds 3] [--out FILE.json]

Starts a SeaweedFS of its own, moves one file up and down by each in turns, every measurement in a process of its own
so that its peak memory is known, and prints medians. What counts are the ratios of the same run: both sides share the
disk and the processors with the server. Ours pays for a SHA-256 of every part and for journals; both end on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import secrets
import signal
import statistics
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from sluice.infra.errors import UnavailableError
from sluice.infra.object_store import S3ObjectStore
from sluice.infra.ports import PortBook
from sluice.infra.program import program
from sluice.infra.settings import ObjectStoreSettings
from sluice.infra.transfer import Transfers

MIB = 2**20


def measure(url: str, keys: tuple[str, str], side: str, direction: str, folder: str, answer: Any) -> None:
    """Seconds and peak memory in MiB of one transfer, into the pipe `answer`."""
    place = Path(folder)
    objects = open_store(url, keys, place / "journal")
    client = objects.client
    begun = time.monotonic()
    if (side, direction) == ("ours", "up"):
        objects.put_file("ours", place / "file")
    elif (side, direction) == ("ours", "down"):
        objects.get_file("ours", place / "back")
    elif direction == "up":
        client.upload_file(str(place / "file"), objects.bucket, "boto3")
    else:
        client.download_file(objects.bucket, "boto3", str(place / "back"))
    answer.send((time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def open_store(url: str, keys: tuple[str, str], journal: Path) -> S3ObjectStore:
    settings = ObjectStoreSettings(endpoint_url=url, bucket="bench", access_key=keys[0], secret_key=SecretStr(keys[1]))
    return S3ObjectStore(settings, Transfers(journal=journal))


def start_server(folder: Path, keys: tuple[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    """A SeaweedFS in `folder`, and its address."""
    names = [f"{server}{kind}" for server in ("s3", "master", "volume", "filer", "admin") for kind in ("", ".grpc")]
    ports = PortBook(folder, {}).allocate(names)
    command = [program("weed"), "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [
        f"-{name.replace('.', '.port.') if '.' in name else f'{name}.port'}={port}" for name, port in ports.items()
    ]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false", "-master.telemetry=false"]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
    url = f"http://127.0.0.1:{ports['s3']}"
    deadline = time.monotonic() + 60
    while True:
        try:
            store = open_store(url, keys, folder / "journal")
            store.ensure_bucket()
            store.put("ready", b"")
            return process, url
        except UnavailableError:
            if time.monotonic() > deadline or process.poll() is not None:
                raise
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/transfer.json"))
    arguments = parser.parse_args()
    keys = (secrets.token_hex(8), secrets.token_hex(16))
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "file").open("wb") as stream:
            for _ in range(arguments.mib):
                stream.write(os.urandom(MIB))
        process, url = start_server(Path(folder), keys)
        try:
            for turn in range(arguments.rounds):
                for direction in ("up", "down"):
                    sides = ("ours", "boto3") if turn % 2 else ("boto3", "ours")
                    for side in sides:
                        receiver, sender = context.Pipe(duplex=False)
                        child = context.Process(target=measure, args=(url, keys, side, direction, folder, sender))
                        child.start()
                        found.setdefault(f"{side} {direction}", []).append(receiver.recv())
                        child.join()
                        (Path(folder) / "back").unlink(missing_ok=True)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rows = {
        name: {
            "mib_per_s": round(arguments.mib / statistics.median(seconds for seconds, _ in values), 1),
            "peak_mib": round(max(peak for _, peak in values)),
        }
        for name, values in found.items()
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "mib": arguments.mib,
        "rounds": arguments.rounds,
        "measured": rows,
        "ratio_up": round(rows["ours up"]["mib_per_s"] / rows["boto3 up"]["mib_per_s"], 2),
        "ratio_down": round(rows["ours down"]["mib_per_s"] / rows["boto3 down"]["mib_per_s"], 2),
    }
    print(json.dumps(result, indent=2))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
