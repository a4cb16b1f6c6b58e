"""The code digest changes with what a step runs, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.provenance.code import code_digest, lock_digest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "sluice"
    for name, text in {
        "training/recipes.py": "r = 8",
        "training/card.j2": "{{ name }}",
        "infra/errors.py": "",
        "rag/chunk.py": "size = 1",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_it_follows_sources_templates_and_the_lock(root: Path) -> None:
    seen = [code_digest("training", "infra", root=root)]
    assert code_digest("infra", "training", root=root) == seen[0], "order does not matter"
    for path, text in (
        (root / "training" / "recipes.py", "r = 16"),
        (root / "training" / "card.j2", "{{ other }}"),
        (root / "training" / "new.py", ""),
        (root.parent / "requirements" / "main.lock", "torch==2.9"),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        seen.append(code_digest("training", "infra", root=root))
    assert len(set(seen)) == len(seen)
    assert lock_digest("main", root=root) is not None
    assert lock_digest("serve", root=root) is None


def test_it_ignores_other_rooms_and_byte_code(root: Path) -> None:
    before = code_digest("training", root=root)
    (root / "rag" / "chunk.py").write_text("size = 2")
    (root / "training" / "__pycache__").mkdir()
    (root / "training" / "__pycache__" / "recipes.pyc").write_bytes(b"x")
    assert code_digest("training", root=root) == before


def test_one_module_alone(root: Path) -> None:
    before = code_digest("training.recipes", root=root)
    (root / "training" / "new.py").write_text("")
    assert code_digest("training.recipes", root=root) == before
    (root / "training" / "recipes.py").write_text("r = 1")
    assert code_digest("training.recipes", root=root) != before


def test_the_real_sources_have_a_digest() -> None:
    assert code_digest("provenance", "infra") != code_digest("provenance")


@pytest.mark.parametrize("package", ["nothing", "../etc", "training/recipes", ""])
def test_a_name_that_is_no_part_is_refused(root: Path, package: str) -> None:
    with pytest.raises(InputError, match="package = "):
        code_digest(package, root=root)


def test_no_name_is_refused() -> None:
    with pytest.raises(InputError, match="at least one package"):
        code_digest()
