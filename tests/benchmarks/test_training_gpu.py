"""The benchmark that needs a GPU, as far as it runs without one: its formula, its model, its rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import random_llama
from benchmarks.random_llama import LLAMA_8B, build_random_llama, count_parameters, tensor_shapes
from benchmarks.training_gpu import (
    PUBLISHED,
    ROWS,
    SEQUENCE,
    flops_per_token,
    pairs_parameters,
    peak_tflops,
    prepare,
    recipe_of,
    require_gpu,
    result_of,
    table,
)
from benchmarks.training_rows import write_chats
from benchmarks.training_run import Run
from sluice.training.base_model import LlamaShape
from sluice.training.examples import read_split
from sluice.training.full_model import INDEX, open_model
from sluice.training.recipe import load_recipe

SMALL = LlamaShape(32, 2, 4, 2, 64, 49_152, 512, 10_000.0, 1e-5)
ROW = {row.name: row for row in ROWS}


def test_the_formula_gives_the_published_pair_of_figures() -> None:
    recipe = recipe_of(ROW["baseline"], [])
    trained = pairs_parameters(LLAMA_8B, recipe)
    assert (count_parameters(LLAMA_8B, tied=False), trained) == (8_030_261_248, 20_971_520)
    flops = flops_per_token(LLAMA_8B, 4096, trained / count_parameters(LLAMA_8B, tied=False))
    assert PUBLISHED["tokens_per_s"] * flops / 1e12 == pytest.approx(PUBLISHED["tflops"], rel=0.005)  # type: ignore[operator]
    # All weights trained: half as much again.
    assert flops_per_token(LLAMA_8B, 4096) / flops == pytest.approx(1.5, rel=0.005)
    assert (peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("cpu")) == (
        989.0,
        989.0,
        None,
    )


def test_a_random_model_is_a_folder_that_is_read_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_llama, "SHARD_BYTES", 2 * 2**20)
    folder = build_random_llama(tmp_path, SMALL, tied=False, dtype="BF16")
    found = open_model(folder)
    assert {name: one.shape for name, one in found.items()} == tensor_shapes(SMALL, tied=False)
    assert {one.dtype for one in found.values()} == {"BF16"}
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert json.loads((folder / INDEX).read_text())["weight_map"].keys() == found.keys()
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["tie_word_embeddings"], config["dtype"]) == (32, False, "bfloat16")
    assert np.std(found["lm_head.weight"].float32()) == pytest.approx(0.02, rel=0.02)
    assert (found["model.norm.weight"].float32() == 1).all()
    assert (folder / "tokenizer.json").is_file()


def test_full_rows_fill_the_sequence_and_nearly_all_of_it_is_answer(tmp_path: Path) -> None:
    base, full, _ = prepare(tmp_path, SMALL)
    split = read_split(full / "train.jsonl", base, SEQUENCE + 1)
    # One more than the sequence: the last token is a label only.
    assert set(split.lengths) == {SEQUENCE + 1}
    assert (len(split.lengths), split.too_long) == (64, 0)
    equal = write_chats(tmp_path / "equal", [(30, 10)] * 3)
    assert len(set(read_split(equal / "train.jsonl", base, 512).lengths)) == 1


def test_rows_add_up_and_a_change_that_costs_is_left_out() -> None:
    first = recipe_of(ROW["baseline"], [])
    assert (first.parallelism.activation_checkpointing, first.precision.fused_loss) == (True, False)
    done = [{"name": "baseline", "kept": True}, {"name": "no activation checkpointing", "kept": True}]
    done += [{"name": "compile", "kept": False}, {"name": "micro batch 2", "kept": True}]
    recipe = recipe_of(ROW["micro batch 4"], done)
    assert not recipe.parallelism.activation_checkpointing
    assert (recipe.precision.compile, recipe.schedule.micro_batch_size) == (False, 4)
    # Every row is a recipe without mistakes, whichever rows before it were kept.
    kept = [{"name": row.name, "kept": True} for row in ROWS]
    assert [recipe_of(row, kept).name for row in ROWS] == ["benchmark-8b"] * len(ROWS)
    assert recipe_of(ROW["fp8"], kept).precision.fp8
    assert not recipe_of(ROW["mixed lengths, packed"], kept).precision.fp8


def test_a_result_says_speed_gain_and_memory() -> None:
    run = Run([10.0, 10.0, 11.0], 60.0, 11.7, 70.25, 3 * 130_000, 3 * 131_072)
    recipe = recipe_of(ROW["compile"], [])
    row = result_of(ROW["compile"], run, recipe, LLAMA_8B, "NVIDIA H200", 10_000.0)
    assert (row["tokens_per_s"], row["gain"], row["kept"], row["memory_gib"]) == (12_684, 1.268, True, 70.2)
    assert (row["tflops"], row["mfu"]) == (408.5, 0.413)
    slower = result_of(ROW["compile"], run, recipe, LLAMA_8B, "a new board", 20_000.0)
    assert (slower["kept"], slower["mfu"]) == (False, None)
    mixed = result_of(ROW["mixed lengths, packed"], run, recipe, LLAMA_8B, "NVIDIA H200", None)
    assert (mixed["tflops"], mixed["kept"]) == (None, False)
    shown = table([row, mixed, {"name": "micro batch 4", "failed": "Out of memory", "kept": False}])
    assert "12,473" in shown
    assert "Out of memory" in shown


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        require_gpu()


def test_a_recipe_may_do_without_the_fused_loss() -> None:
    from sluice.training.automodel import automodel_config

    fused, plain = (
        automodel_config(
            load_recipe("tiny").with_overrides({"parallelism.backend": "nccl", "precision.fused_loss": wanted}),
            Path("base"),
            Path("work"),
        )["loss_fn"]["_target_"]
        for wanted in (True, False)
    )
    assert (fused.rpartition(".")[2], plain.rpartition(".")[2]) == ("ChunkedCrossEntropy", "MaskedCrossEntropy")
