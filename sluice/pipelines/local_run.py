"""The process of one local run: `python -m sluice.pipelines.local_run RUN_FOLDER STARTER`.

KFP's local orchestrator runs here, apart from the command line, so that a run has a process group and a log of its own
and goes on when the terminal that started it is closed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from pathlib import Path

from sluice.infra.errors import SluiceError
from sluice.pipelines.dags import dag_of, pipeline_of
from sluice.pipelines.runs import Run, load_run


def main(folder: Path, starter: int) -> int:
    run = _wait_for_pid(folder, starter)
    if run is None:
        return 1
    from kfp import local

    try:
        function, parameters = pipeline_of(run.pipeline, run.parameters)
        (folder / "dag.json").write_text(json.dumps(dag_of(function)))
        local.init(
            runner=local.SubprocessRunner(use_venv=False),
            pipeline_root=str(folder / "pipeline-root"),
            workspace_root=str(folder / "workspace"),
            raise_on_error=True,
        )
        function(**parameters)
        run.state, run.exit_code = "done", 0
    except SluiceError as error:
        run.state, run.error, run.hint, run.exit_code = "failed", error.message, error.hint, error.exit_code
    except Exception as error:  # noqa: BLE001  (whatever ends a run is written down)
        traceback.print_exc()
        _explain(run, error)
    run.finished = time.time()
    run.save()
    return run.exit_code


def _wait_for_pid(folder: Path, starter: int) -> Run | None:
    """The starter writes our process id after it started us: wait for it, so that neither overwrites the other.

    None when the starter (a process id) was killed before it did: nobody can find this run, so the next to ask starts
    another, and two releases at once would fail each other.
    """
    while True:
        orphaned = os.getppid() != starter
        run = load_run(folder)
        if run.pid is not None or orphaned:
            return run if run.pid == os.getpid() else None
        time.sleep(0.02)


def _explain(run: Run, error: Exception) -> None:
    """The cause as the failed task wrote it down; KFP itself knows only that a task failed."""
    failed = [state for state in run.tasks().values() if state.state == "failed"]
    run.state, run.exit_code = "failed", 7
    if failed:
        first = min(failed, key=lambda state: state.started)
        run.error, run.hint = f"{first.task}: {first.error}", first.hint
        run.exit_code = first.exit_code or 7
        return
    silent = [state for state in run.tasks().values() if state.state == "running"]
    if silent:
        run.error = f"{silent[0].task}: its process ended without a word (killed, or out of memory)."
        run.hint = "Run it again: it goes on where it was."
    else:
        run.error, run.hint = _cause_in(run.log) or f"{type(error).__name__}: {error}", f"The log is {run.log}."


def _cause_in(log: Path) -> str:
    """The first exception that a task printed: what happened before any of our code could write it down."""
    found = re.search(r"^    ([A-Za-z_.]+(?:Error|Exception): .*)$", log.read_text(errors="replace"), re.MULTILINE)
    return found[1] if found else ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
