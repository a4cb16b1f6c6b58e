"""A launcher whose training processes are forked from one process that has imported everything.

torch and NeMo AutoModel take half a minute of CPU to import in each process. Where a test starts many runs, that is
paid once: `warm_ranks` keeps that process, `WarmLauncher` is the product's launcher with an agent in torchrun's place,
which does what torchrun does without restarts: starts the processes, ends all when one dies, passes its exit code on.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sluice.training.torchrun import TorchrunLauncher

READY = "ready"
LARGEST_FILE_VARIABLE = "TEST_LARGEST_FILE_BYTES"


@dataclass(frozen=True)
class WarmLauncher(TorchrunLauncher):
    """`address` is the Unix socket of a `WarmRanks`."""

    address: Path = Path()

    def _command(self, lock: Path) -> list[str]:
        return [
            sys.executable,
            "-m",
            "tests.support.warm_ranks",
            "agent",
            str(self.address),
            str(self.job.recipe.parallelism.processes),
            str(self.job.work_dir),
            str(lock),
        ]


@contextmanager
def warm_ranks(folder: Path) -> Iterator[Path]:
    """The socket of a process that forks training processes; ended with the block."""
    address = folder / "warm"
    with (folder / "warm.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_ranks", "server", str(address)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == READY, (folder / "warm.log").read_text()[-2000:]
        try:
            yield address
        finally:
            process.kill()
            process.wait()


def serve(address: Path) -> None:
    """Import, then fork one set of processes for each connection: its first line says which, its end ends them."""
    from sluice.training import cpu_compatibility
    from sluice.training.entry import NOT_NEEDED

    for name in NOT_NEEDED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    cpu_compatibility.install()
    import sluice.training.finetuning  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(address))
    server.listen()
    print(READY, flush=True)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            supervise(connection)
        connection.close()


def supervise(connection: socket.socket) -> None:
    """Run one set of processes; never returns. Tells their pids, then the exit code."""
    with connection.makefile("rw") as stream:
        wanted = json.loads(stream.readline())
        log = os.open(wanted["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        children = {}
        for rank in range(wanted["processes"]):
            pid = os.fork()
            if pid == 0:
                run_rank(rank, wanted)
            children[pid] = rank
        stream.write(json.dumps(sorted(children)) + "\n")
        stream.flush()
        worst = 0
        connection.setblocking(False)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if code:
                    print(f"failed (exitcode: {code}) local_rank: {children[pid]} (pid: {pid})", flush=True)
                children.pop(pid)
                worst = worst or code
                if code:
                    for other in children:
                        os.kill(other, signal.SIGKILL)
            elif _closed(connection):
                for other in children:
                    os.kill(other, signal.SIGKILL)
            else:
                time.sleep(0.02)
        try:
            connection.setblocking(True)
            stream.write(f"{worst}\n")
            stream.flush()
        except OSError:
            pass
    os._exit(0)


def run_rank(rank: int, wanted: dict[str, object]) -> None:
    """One training process, as torchrun starts it; never returns."""
    import torch

    from sluice.training.entry import main

    environment = wanted["environment"]
    assert isinstance(environment, dict)
    os.environ.update(environment)
    # What OMP_NUM_THREADS does at the import of torch, which lies behind: it decides the order of float additions.
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    if limit := environment.get(LARGEST_FILE_VARIABLE):
        # A disk that is full, as far as a process can tell: writing past the limit fails with EFBIG.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    code = 1
    try:
        main([str(wanted["work_dir"]), str(wanted["lock"])])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 a forked process must not go on in its parent's code
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def be_agent(address: Path, processes: int, work_dir: str, lock: str) -> int:
    """Stands where torchrun stands: the launcher's child, which ends when the training processes have ended.

    A notice goes to torchrun's children, past torchrun itself; so a child of this one stands for all of them.
    """
    if (child := os.fork()) != 0:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ) | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(address))
        stream = connection.makefile("rw")
        request = {
            "processes": processes,
            "work_dir": work_dir,
            "lock": lock,
            "environment": environment,
            "log": os.readlink("/proc/self/fd/1"),
        }
        stream.write(json.dumps(request) + "\n")
        stream.flush()
        pids = json.loads(stream.readline())

        def forward(number: int, frame: object) -> None:
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass

        # The training processes are the server's children, which the launcher does not see.
        signal.signal(signal.SIGTERM, forward)
        answer = stream.readline()
    return 0 if answer.strip() == "0" else 1


def _closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(Path(sys.argv[2]))
    else:
        sys.exit(be_agent(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]))
