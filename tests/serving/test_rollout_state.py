"""One rollout at a time: the second waits for the first, and a dead holder lets go."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from sluice.serving.rollout_state import FileRolloutStore

HOLD = """
import sys, time
from pathlib import Path
from sluice.serving.rollout_state import FileRolloutStore
with FileRolloutStore(Path(sys.argv[1])).exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_waits_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    entered, waiting = threading.Event(), threading.Event()

    def second() -> None:
        with FileRolloutStore(tmp_path).exclusive(lambda *_: waiting.set()):
            entered.set()

    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        assert waiting.wait(10)
        assert not entered.is_set()
    finally:
        holder.kill()
        holder.communicate()
    assert entered.wait(10)
