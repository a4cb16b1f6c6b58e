"""What the integration tests of the index share: a milvus-lite server to kill, and the real model, once a text."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sluice.infra.progress import Report, no_report
from sluice.provenance.artifacts import describe_directory
from sluice.rag.embed import MiniLmEmbedder
from sluice.rag.index import IndexContent
from sluice.rag.queries import LabelledQuery

if TYPE_CHECKING:
    from sluice.rag.embed import Vectors


class RememberingEmbedder:
    """The real model; a text that several tests embed is computed once."""

    def __init__(self) -> None:
        self._model = MiniLmEmbedder()
        self._known: dict[str, Vectors] = {}
        self.digest, self.dimension = self._model.digest, self._model.dimension

    def embed(self, texts: Sequence[str], report: Report = no_report) -> Vectors:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known.update(zip(new, self._model.embed(new, report), strict=True))
        return np.stack([self._known[text] for text in texts])


class Server:
    """A milvus-lite server that can be killed and started again on the same port and folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = Path(sys.executable).parent / "milvus-lite"
        command = [
            str(program),
            "server",
            "--data-dir",
            str(self.folder),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, "milvus-lite ended"
                assert time.monotonic() < deadline, "milvus-lite does not listen"
                time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass(frozen=True)
class Index:
    """An index artifact on disk with its digest and the queries that its chunks answer."""

    folder: Path
    content: IndexContent
    digest: str
    queries: list[LabelledQuery]


def digest_of(folder: Path, content: IndexContent) -> str:
    return describe_directory(folder, "index", content.metadata).digest
