"""A whole model's folder: what is wrong with it is found, what remains has one set of bytes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.infra.errors import IntegrityError, StepFailed
from sluice.provenance.artifacts import describe_directory
from sluice.training import full_model, merge
from sluice.training.full_model import INDEX, SINGLE, check_model, collect_model, open_model, write_model
from sluice.training.recipe import load_recipe
from sluice.training.round_trip import check_round_trip, tolerance
from sluice.training.safetensors_file import RawTensor, open_tensors, read_header, write_raw

Arrays = dict[str, RawTensor]
FIRST = "model.layers.0.mlp.up_proj.weight"


def bf16(values: Any) -> RawTensor:
    array = np.asarray(values, dtype=np.float32)
    upper = (array.view("<u4") >> 16).astype("<u2")
    return RawTensor("BF16", array.shape, upper.reshape(-1).view(np.uint8))


def weights(seed: int) -> Arrays:
    drawn = np.random.default_rng(seed)
    names = {FIRST: (6, 4), "model.layers.0.mlp.down_proj.weight": (4, 6), "model.embed_tokens.weight": (8, 4)}
    return {name: bf16(drawn.standard_normal(shape, dtype=np.float32)) for name, shape in names.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    write_raw(folder / SINGLE, weights(0))
    config = {"model_type": "llama", "tie_word_embeddings": True, "dtype": "bfloat16", "_name_or_path": str(tmp_path)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"of": "the base"}')
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "README.md").write_text("not taken")
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Callable[[Arrays], Path]:
    def make(tensors: Arrays) -> Path:
        folder = tmp_path / "checkpoint" / "consolidated"
        folder.mkdir(parents=True, exist_ok=True)
        write_raw(folder / "model-00001-of-00001.safetensors", tensors)
        (folder / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path), "output_attentions": True}))
        (folder / "tokenizer.json").write_text('{"of": "the trainer"}')
        return folder.parent

    return make


def test_a_model_is_the_bases_files_and_the_trained_weights(
    base: Path, export: Callable[[Arrays], Path], tmp_path: Path
) -> None:
    trained = weights(1)
    model = collect_model(export(trained), base, tmp_path / "model")
    assert sorted(path.name for path in model.iterdir()) == ["LICENSE", "config.json", SINGLE, "tokenizer.json"]
    assert str(tmp_path) not in (model / "config.json").read_text()
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert (model / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    found = open_model(model)
    assert {one.dtype for one in found.values()} == {"BF16"}
    assert all(np.array_equal(found[name].data, trained[name].data) for name in trained)
    check_model(model, base)
    # Another order of tensors, a head written beside the embedding it is tied to: the same bytes.
    mixed = dict(reversed(trained.items())) | {"lm_head.weight": trained["model.embed_tokens.weight"]}
    again = collect_model(export(mixed), base, tmp_path / "again")
    assert describe_directory(model, "model").digest == describe_directory(again, "model").digest


def test_a_large_model_is_cut_into_files_that_readers_find(base: Path, tmp_path: Path) -> None:
    folder, trained = tmp_path / "cut", weights(1)
    folder.mkdir()
    write_model(folder, trained, base, shard_bytes=100)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * (24 + 24 + 32)
    assert set(index["weight_map"].values()) == set(names)
    assert all(name in read_header(folder / file) for name, file in index["weight_map"].items())
    check_model(folder, base)
    (folder / INDEX).unlink()
    with pytest.raises(IntegrityError, match=f"holds no {INDEX}"):
        check_model(folder, base)


def broken(kind: str) -> Arrays:
    tensors = weights(1)
    match kind:
        case "missing":
            del tensors[FIRST]
        case "foreign":
            tensors["model.layers.9.weight"] = bf16(np.zeros((2, 2)))
        case "shape":
            tensors[FIRST] = bf16(np.zeros((4, 6)))
        case "dtype":
            tensors[FIRST] = RawTensor("F32", (6, 4), np.ones(24, dtype="<f4").view(np.uint8))
        case "nan":
            tensors[FIRST] = bf16(np.full((6, 4), np.nan))
        case "untrained":
            tensors = weights(0)
    return tensors


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", f"lacks '{FIRST}'"),
        ("foreign", r"holds 'model.layers.9.weight', which the base model does not have"),
        ("shape", r"has shape \(4, 6\); the base model's has \(6, 4\)"),
        ("dtype", "is F32; the base model's is BF16"),
        ("nan", "not finite"),
        ("untrained", "nothing was trained"),
    ],
)
def test_what_is_wrong_is_named(
    base: Path, export: Callable[[Arrays], Path], tmp_path: Path, kind: str, says: str
) -> None:
    with pytest.raises(IntegrityError, match=says):
        collect_model(export(broken(kind)), base, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "model.partial").exists()


def test_an_export_that_is_not_there_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="holds no consolidated model"):
        collect_model(tmp_path / "nothing", base, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.py", "import os", "holds model.py, which its base model does not have"),
        ("tokenizer.json", "{}", "tokenizer.json of the model .* is not its base model's"),
        ("config.json", '{"auto_map": {}}', "says other things"),
        ("LICENSE", None, "holds no LICENSE"),
    ],
)
def test_a_file_that_training_does_not_make_is_refused(
    base: Path, export: Callable[[Arrays], Path], tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    model = collect_model(export(weights(1)), base, tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    if content is not None:
        (model / name).write_text(content)
    with pytest.raises(IntegrityError, match=says):
        check_model(model, base)


def test_bytes_of_every_dtype_survive_a_file(tmp_path: Path) -> None:
    values = np.array([[0.5, -2.0, 3.0]], dtype=np.float32)
    tensors = {
        "a": RawTensor("F32", (1, 3), values.reshape(-1).view(np.uint8)),
        "b": RawTensor("F16", (1, 3), values.astype("<f2").reshape(-1).view(np.uint8)),
        "c": bf16(values),
    }
    write_raw(tmp_path / "x.safetensors", tensors)
    found = open_tensors(tmp_path / "x.safetensors")
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in tensors.items()
    }
    for one in found.values():
        np.testing.assert_array_equal(one.float32(), values)


def test_rounding_of_stored_weights_is_part_of_the_tolerance(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    assert tolerance(tmp_path, recipe) == 1e-3
    assert tolerance(base, recipe) == 0.251
    assert tolerance(base, recipe.with_overrides({"precision.compute": "bfloat16"})) == 0.75


def test_a_difference_above_the_tolerance_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, probes = load_recipe("tiny"), tmp_path / "probes.json"
    with pytest.raises(StepFailed, match="no scores of the probe prompts"):
        check_round_trip(base, base, probes, recipe)
    probes.write_text("[]")
    for said, error, says in (
        ('{"prompt": "p", "difference": NaN}', IntegrityError, "differs by nan; its precision explains 0.251"),
        ('{"prompt": "p", "difference": 0.26}', IntegrityError, "differs by 0.26"),
        (None, StepFailed, "cannot be loaded: boom"),
    ):
        answer = subprocess.CompletedProcess([], said is None, said or "", "boom")
        monkeypatch.setattr("sluice.training.round_trip.run_isolated", lambda *_, answer=answer: answer)
        with pytest.raises(error, match=says):
            check_round_trip(base, base, probes, recipe)


ALIKE = {"exact": 0.0, "stored": 0.0, "answers": 0.0, "agreement": 1.0}


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"exact": 0.002}, "in float32, a score .* differs by 0.002"),
        ({"stored": 0.3}, "as it is stored, a score .* explains 0.251"),
        ({"answers": 0.6}, "a log-probability .* differs by 0.6; its precision explains 0.502"),
        ({"exact": float("nan")}, "differs by nan"),
        ({"answers": float("nan")}, "differs by nan"),
    ],
)
def test_a_merged_model_that_scores_otherwise_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, float], says: str
) -> None:
    told = json.dumps(ALIKE | said)
    monkeypatch.setattr(merge, "run_isolated", lambda *_: subprocess.CompletedProcess([], 0, told, ""))
    with pytest.raises(IntegrityError, match=says):
        merge.merge_adapter(base, tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_merging_writes_is_checked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(module: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        full_model.write_model(Path(arguments[2]), weights(int(module == "sluice.training.merge")), base)
        return subprocess.CompletedProcess([], 0, json.dumps(ALIKE | {"stored": 0.05}), "")

    monkeypatch.setattr(merge, "run_isolated", writes)
    merged = merge.merge_adapter(base, tmp_path, tmp_path / "merged")
    assert (merged.model_dir, merged.stored_difference) == (tmp_path / "merged", 0.05)
    check_model(merged.model_dir, base)
    monkeypatch.setattr(merge, "run_isolated", lambda _, arguments: writes("other", arguments))
    with pytest.raises(IntegrityError, match="nothing was trained"):
        merge.merge_adapter(base, tmp_path, tmp_path / "merged")
