"""The cache: what is put is on disk, two processes share it, and a damaged one says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sluice.evaluation.cache import open_cache
from sluice.infra.errors import UnavailableError

WRITER = """
import os
import sys
from pathlib import Path
from sluice.evaluation.cache import open_cache

path, name = Path(sys.argv[1]), sys.argv[2]
for n in range(40):
    with open_cache(path) as cache:
        cache.put(f"{name}-{n}", {"by": name, "n": n})
        cache.put("shared", n)
print("done")
"""


def test_what_is_put_is_there_for_the_next_and_the_last_wins(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "cache.sqlite"
    with open_cache(path) as cache:
        assert cache.get("a") is None
        cache.put("a", {"text": "å\u2028", "n": [1, None, 0.5]})
        cache.put("b", 1)
        cache.put("b", 2)
    with open_cache(path) as cache:
        assert cache.get("a") == {"text": "å\u2028", "n": [1, None, 0.5]}
        assert cache.get("b") == 2


def test_processes_that_open_and_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    names = ("one", "two", "three")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE) for name in names
    ]
    assert [(writer.communicate(timeout=60)[0].strip(), writer.returncode) for writer in writers] == [(b"done", 0)] * 3
    with open_cache(path) as cache:
        assert all(cache.get(f"{name}-{n}") == {"by": name, "n": n} for name in names for n in range(40))
        assert cache.get("shared") == 39


def test_a_killed_writer_loses_nothing_that_it_had_put(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    killed = WRITER.replace('put("shared", n)', 'put("shared", n); n == 20 and os.kill(os.getpid(), 9)')
    writer = subprocess.run([sys.executable, "-c", killed, str(path), "one"], check=False)
    assert writer.returncode == -9
    with open_cache(path) as cache:
        assert [cache.get(f"one-{n}") is not None for n in range(22)] == [True] * 21 + [False]
        cache.put("another", 1)


def test_a_damaged_cache_and_an_unreadable_value_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_bytes(b"this is no database, and long enough to be sure of it" * 50)
    with pytest.raises(UnavailableError, match="cannot be used") as raised, open_cache(path):
        pass
    assert "remove it" in raised.value.hint
    path.unlink()
    with open_cache(path) as cache:
        cache.put("a", 1)
        cache._connection.execute("UPDATE entries SET value = '{torn'")
        assert cache.get("a") is None
