"""Servers of single releases: what is started, what is remembered, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sluice.infra.errors import InputError, UnavailableError
from sluice.serving.adapters import AdapterShelf
from sluice.serving.servers import (
    GIB,
    ServerBook,
    is_release_server,
    memory_needed,
    part_name,
    release_service,
    require_memory,
)
from sluice.serving.vllm import VllmSettings
from tests.serving.samples import digest

A, B = digest("a"), digest("b")


@pytest.fixture
def settings(tmp_path: Path) -> VllmSettings:
    (tmp_path / "python").touch()
    (tmp_path / "config.json").touch()
    return VllmSettings(
        tmp_path / "python", tmp_path, "app-a", None, 20001, part=part_name(A), also_named=("app",), kv_cache_gib=2
    )


def test_a_server_of_one_release_takes_no_adapter_and_answers_to_both_names(settings: VllmSettings) -> None:
    spec = release_service(settings)
    command = list(spec.command)
    assert not [word for word in command if "lora" in word.lower() or word in ("--config", "--worker-extension-cls")]
    assert not [name for name in spec.environment if "LORA" in name or name == "PYTHONPATH"]
    place = command.index("--served-model-name")
    assert command[place + 1 : place + 4] == ["app-a", "app", "--host"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    # It ends by itself, streams first, before supervision would kill it.
    assert int(command[command.index("--shutdown-timeout") + 1]) < spec.stop_wait_s
    assert (spec.name, spec.ports, spec.stop_group) == (part_name(A), (part_name(A),), False)
    assert is_release_server(spec.name)
    assert not is_release_server("vllm")


def test_servers_are_not_bound_to_the_same_cores(settings: VllmSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, "1"), (2, "1"), (16, "7")):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        environment = release_service(settings).environment
        assert (environment["VLLM_CPU_OMP_THREADS_BIND"], environment["OMP_NUM_THREADS"]) == ("nobind", threads)


def test_a_shelf_is_refused(settings: VllmSettings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shelf"):
        release_service(replace(settings, shelf=AdapterShelf(tmp_path)))


def test_the_book_remembers_across_processes_and_a_damaged_one_is_empty(tmp_path: Path) -> None:
    book = ServerBook(tmp_path / "home" / "servers.json")
    assert book.read() == {}
    book.remember(A, B)
    book.remember(B, B)
    book.remember(A, A)
    assert ServerBook(book.file).read() == {A: A, B: B}
    book.forget(A)
    book.forget(A)
    assert book.read() == {B: B}
    for content in ("{", "[]", '{"x": "y"}', '{"' + A + '": 3}'):
        book.file.write_text(content)
        assert book.read() == {}
    book.remember(A, A)
    assert book.read() == {A: A}
    book.file.unlink()
    book.file.mkdir()
    # Not readable now is not empty: the next one to write would forget everybody.
    with pytest.raises(UnavailableError, match=r"servers\.json' cannot be read"):
        book.remember(B, B)


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 24)
    needed = memory_needed(tmp_path, 2)
    assert needed == 4 * GIB + 1024
    require_memory(A, needed, needed)
    with pytest.raises(UnavailableError, match=r"needs 4\.0 GiB of memory, and 2\.5 GiB are available") as refused:
        require_memory(A, needed, int(2.5 * GIB))
    assert "serving.kv_cache_gib" in (refused.value.hint or "")
