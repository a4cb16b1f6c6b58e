"""Programs that come with the locked environment: SeaweedFS, Envoy, milvus-lite and the like."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def find_program(name: str) -> str | None:
    """The program's path: beside this interpreter first, so that an environment need not be activated."""
    # Not resolved: the interpreter of a virtual environment is a link that leads out of it.
    beside = Path(sys.executable).absolute().parent / name
    return shutil.which(str(beside)) or shutil.which(name)


def program(name: str) -> str:
    """As `find_program`; where there is none, the place where it should be, for whoever reports that it is missing."""
    return find_program(name) or str(Path(sys.executable).absolute().parent / name)
