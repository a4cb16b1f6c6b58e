"""Collecting an adapter: what is wrong with it is found, what remains has one set of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sluice.infra.errors import IntegrityError
from sluice.provenance.artifacts import describe_directory
from sluice.training.adapter import CONFIG, WEIGHTS, check_adapter, collect_adapter, read_config
from sluice.training.recipe import Recipe, load_recipe
from sluice.training.safetensors_file import write_tensors

Arrays = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
PREFIX = "base_model.model."


def write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, arrays)


def lora(layers: int = 2, rank: int = 4) -> Arrays:
    values = np.random.default_rng(0)
    arrays: Arrays = {}
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            name = f"{PREFIX}model.layers.{layer}.self_attn.{module}"
            arrays[f"{name}.lora_A.weight"] = values.standard_normal((rank, 8), dtype=np.float32)
            arrays[f"{name}.lora_B.weight"] = values.standard_normal((6, rank), dtype=np.float32)
    return arrays


@pytest.fixture
def base(tmp_path: Path) -> Path:
    names = [f"model.layers.{n}.self_attn.{m}.weight" for n in range(2) for m in ("q_proj", "v_proj", "o_proj")]
    write(tmp_path / "base/model.safetensors", {name: np.zeros((6, 8), dtype=np.float32) for name in names})
    return tmp_path / "base"


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("tiny")


def test_two_files_without_a_path_and_equal_bytes(tmp_path: Path, base: Path, recipe: Recipe) -> None:
    digests = []
    for run in ("one", "two"):
        arrays = lora()
        source = tmp_path / run / "model"
        write(source / WEIGHTS, dict(reversed(arrays.items())) if run == "two" else arrays)
        (source / "tokenizer.json").write_text(run)
        (source / CONFIG).write_text(json.dumps({"base_model_name_or_path": str(tmp_path / run)}))
        adapter = collect_adapter(source, base, recipe, tmp_path / run / "adapter")
        assert sorted(path.name for path in adapter.iterdir()) == [CONFIG, WEIGHTS]
        assert str(tmp_path) not in (adapter / CONFIG).read_text()
        digests.append(describe_directory(adapter, "adapter").digest)
    assert digests[0] == digests[1]
    config = read_config(adapter)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "v_proj"])


def test_a_second_collection_replaces_the_first(tmp_path: Path, base: Path, recipe: Recipe) -> None:
    write(tmp_path / "m" / WEIGHTS, lora())
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "leftover").write_text("x")
    collect_adapter(tmp_path / "m", base, recipe, target)
    assert not (target / "leftover").exists()


def broken(kind: str) -> Arrays:
    arrays = lora()
    first = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    match kind:
        case "nan":
            arrays[first][0, 0] = np.nan
        case "shape":
            arrays[first] = np.zeros((4, 9), dtype=np.float32)
        case "half":
            del arrays[first]
        case "layer":
            arrays = lora(layers=1)
        case "module":
            arrays[f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight"] = np.ones((4, 8), dtype=np.float32)
        case "outside":
            arrays[f"{PREFIX}model.layers.0.self_attn.o_proj.lora_A.weight"] = np.ones((4, 8), dtype=np.float32)
        case "foreign":
            arrays["lm_head.weight"] = np.ones((4, 8), dtype=np.float32)
        case "untrained":
            arrays = {name: a * np.float32("lora_A" in name) for name, a in arrays.items()}
    return arrays


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nan", "not finite"),
        ("shape", r"\(4, 9\); rank and base model give \(4, 8\)"),
        ("half", "incomplete"),
        ("layer", r"lacks a weight of 'model.layers.1.*2 modules"),
        ("module", "'model.layers.7.*does not have"),
        ("outside", "outside lora.target_modules"),
        ("foreign", "no weight of an adapter made by lora"),
        ("untrained", "nothing was trained"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, base: Path, recipe: Recipe, kind: str, says: str) -> None:
    write(tmp_path / "m" / WEIGHTS, broken(kind))
    with pytest.raises(IntegrityError, match=says):
        collect_adapter(tmp_path / "m", base, recipe, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, base: Path, recipe: Recipe) -> None:
    with pytest.raises(IntegrityError, match=f"holds no {WEIGHTS}"):
        collect_adapter(tmp_path / "m", base, recipe, tmp_path / "adapter")
    write(tmp_path / "m" / WEIGHTS, lora())
    whole = (tmp_path / "m" / WEIGHTS).read_bytes()
    for damaged in (whole[:-4], whole + b"x", b"\xff" * 64, whole[:9] + b"}" + whole[10:]):
        (tmp_path / "m" / WEIGHTS).write_bytes(damaged)
        with pytest.raises(IntegrityError, match="not a safetensors file"):
            collect_adapter(tmp_path / "m", base, recipe, tmp_path / "adapter")


@pytest.fixture
def adapter(tmp_path: Path, base: Path, recipe: Recipe) -> Path:
    write(tmp_path / "m" / WEIGHTS, lora())
    return collect_adapter(tmp_path / "m", base, recipe, tmp_path / "adapter")


def test_an_adapter_is_what_its_recipe_declares(adapter: Path, base: Path, recipe: Recipe) -> None:
    check_adapter(adapter, base, recipe)
    for overrides, says in (
        ({"lora.alpha": 16}, "says lora_alpha = 8; its recipe declares 16"),
        ({"lora.rank": 8}, r"rank and base model give \(8, 8\)"),
        ({"lora.target_modules": ["q_proj"]}, "outside lora.target_modules"),
        ({"lora.target_modules": ["q_proj", "v_proj", "o_proj"]}, "incomplete"),
    ):
        with pytest.raises(IntegrityError, match=says):
            check_adapter(adapter, base, recipe.with_overrides(overrides))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "model.py", "adapter_model.bin", ".git/config"]
)
def test_a_file_that_no_recipe_declares_is_refused(adapter: Path, base: Path, recipe: Recipe, name: str) -> None:
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_text("{}")
    with pytest.raises(IntegrityError, match=f"holds {name}, which no recipe declares"):
        check_adapter(adapter, base, recipe)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"auto_mapping": {"a": "b"}}, "says auto_mapping = {'a': 'b'}; its recipe declares nothing"),
        ({"use_rslora": True}, "says use_rslora = True; its recipe declares False"),
        ({"base_model_name_or_path": "evil/model"}, "evil/model"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
    ],
)
def test_an_undeclared_value_of_the_configuration_is_refused(
    adapter: Path, base: Path, recipe: Recipe, change: dict[str, object], says: str
) -> None:
    (adapter / CONFIG).write_text(json.dumps(read_config(adapter) | change))
    with pytest.raises(IntegrityError, match=says):
        check_adapter(adapter, base, recipe)
    (adapter / CONFIG).write_text(json.dumps({k: v for k, v in read_config(adapter).items() if k != "r"}))
    with pytest.raises(IntegrityError):
        check_adapter(adapter, base, recipe)


def test_another_base_model_is_told(adapter: Path, tmp_path: Path, recipe: Recipe) -> None:
    names = [f"model.layers.{n}.self_attn.{m}.weight" for n in range(2) for m in ("q_proj", "v_proj")]
    write(tmp_path / "wider/model.safetensors", {name: np.zeros((6, 16), dtype=np.float32) for name in names})
    with pytest.raises(IntegrityError, match="rank and base model give"):
        check_adapter(adapter, tmp_path / "wider", recipe)


def dora() -> Arrays:
    arrays = lora()
    modules = {name.rpartition(".lora_")[0] for name in arrays}
    return arrays | {f"{module}.lora_magnitude_vector": np.ones(6, dtype=np.float32) for module in modules}


def test_an_adapter_of_dora_has_a_magnitude_for_each_module(tmp_path: Path, base: Path, recipe: Recipe) -> None:
    magnitude = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_magnitude_vector"
    as_dora = recipe.with_overrides({"method": "dora"})
    write(tmp_path / "m" / WEIGHTS, dora())
    adapter = collect_adapter(tmp_path / "m", base, as_dora, tmp_path / "adapter")
    assert read_config(adapter)["use_dora"] is True
    check_adapter(adapter, base, as_dora)
    with pytest.raises(IntegrityError, match="magnitude_vector', which is no weight of an adapter made by lora"):
        check_adapter(adapter, base, recipe)
    for change, says in (
        ({magnitude: np.ones(8, dtype=np.float32)}, r"has shape \(8,\); rank and base model give \(6,\)"),
        ({magnitude: np.full(6, np.inf, dtype=np.float32)}, "not finite"),
        ({magnitude: None}, "lacks a weight of 'model.layers.1.self_attn.v_proj' .1 modules"),
        ({magnitude + ".weight": np.ones(6, dtype=np.float32)}, "no weight of an adapter made by dora"),
    ):
        arrays = {name: values for name, values in (dora() | change).items() if values is not None}
        write(tmp_path / "m" / WEIGHTS, arrays)
        with pytest.raises(IntegrityError, match=says):
            collect_adapter(tmp_path / "m", base, as_dora, tmp_path / "adapter")


def test_an_adapter_of_qlora_looks_as_loras_does(tmp_path: Path, base: Path, recipe: Recipe) -> None:
    write(tmp_path / "m" / WEIGHTS, lora())
    there = {"parallelism.backend": "nccl", "precision.compute": "bfloat16"}
    folders = [
        collect_adapter(tmp_path / "m", base, recipe.with_overrides({"method": method, **there}), tmp_path / method)
        for method in ("lora", "qlora")
    ]
    assert len({describe_directory(folder, "adapter").digest for folder in folders}) == 1
