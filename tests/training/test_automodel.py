"""The translation of a recipe into AutoModel's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.training.automodel import automodel_config
from sluice.training.recipe import Recipe, load_recipe, parse_recipe

PATHS = (Path("/base"), Path("/work"))
CLUSTER = """\
name: cluster
schedule: {max_steps: 100, global_batch_size: 64, micro_batch_size: 1}
data: {max_length: 4096}
parallelism: {nodes: 2, processes: 8, backend: nccl}
precision: {compute: bfloat16}
"""


def cluster(**overrides: Any) -> Recipe:
    return parse_recipe(CLUSTER, "cluster").with_overrides(
        {name.replace("__", "."): value for name, value in overrides.items()}
    )


def translated(recipe: Recipe) -> Any:
    return automodel_config(recipe, *PATHS)


def test_every_number_of_the_recipe_arrives() -> None:
    recipe = load_recipe("tiny").with_overrides(
        {"schedule.max_steps": 9, "lora.rank": 5, "optimizer.learning_rate": 0.25, "precision.compute": "bfloat16"}
    )
    config = translated(recipe)
    assert config["step_scheduler"]["max_steps"] == 9
    assert config["step_scheduler"]["val_every_steps"] == 9
    assert config["peft"]["dim"] == 5
    assert config["peft"]["target_modules"] == ["*.q_proj", "*.v_proj"]
    assert config["optimizer"]["lr"] == 0.25
    assert config["distributed"]["mp_policy"]["param_dtype"] == "bfloat16"
    assert config["model"]["pretrained_model_name_or_path"] == "/base"
    assert config["checkpoint"]["checkpoint_dir"] == "/work/automodel"


def test_small_numbers_stay_numbers_through_yaml() -> None:
    # YAML 1.1 reads "1e-08" as a string; only "1.0e-08" is a number there.
    recipe = load_recipe("tiny").with_overrides({"optimizer.epsilon": 1e-8, "optimizer.minimum_learning_rate": 1e-5})
    read = yaml.safe_load(yaml.safe_dump(translated(recipe)))
    assert read["optimizer"]["eps"] == 1e-8
    assert read["lr_scheduler"]["min_lr"] == 1e-5


def test_packs_are_announced_with_their_length() -> None:
    packed = translated(load_recipe("tiny").with_overrides({"data.packing": True, "data.pack_length": 640}))
    assert packed["packed_sequence"] == {"packed_sequence_size": 640, "packing_strategy": "neat"}
    assert translated(load_recipe("tiny"))["packed_sequence"]["packed_sequence_size"] == 0


def test_processors_get_plain_kernels_whose_bits_are_known() -> None:
    config = translated(load_recipe("demo"))
    assert config["model"]["attn_implementation"] == "sdpa"
    assert config["model"]["backend"]["rms_norm"] == "torch"
    assert config["loss_fn"]["_target_"].endswith("MaskedCrossEntropy")
    assert (config["peft"]["use_triton"], config["peft"]["use_dora"]) == (False, False)
    assert "fused" not in config["optimizer"]
    assert not config["distributed"]["enable_fsdp2_prefetch"]


def test_accelerators_get_fast_kernels_where_the_cut_allows_them() -> None:
    config = translated(cluster())
    assert config["peft"]["use_triton"] is True
    assert config["optimizer"]["fused"] is True
    assert config["loss_fn"]["_target_"].endswith("ChunkedCrossEntropy")
    assert config["model"]["attn_implementation"] == "sdpa"
    assert translated(cluster(data__packing=True))["model"]["attn_implementation"] == "flash_attention_2"
    for cut in ("parallelism__tp", "parallelism__pp"):
        config = translated(cluster(**{cut: 2}))
        assert config["peft"]["use_triton"] is False
        assert config["loss_fn"]["_target_"].endswith("MaskedCrossEntropy")


def test_methods() -> None:
    full = translated(cluster(method="full"))
    assert "peft" not in full
    assert "quantization" not in full
    assert full["distributed"]["defer_fsdp_grad_sync"] is False
    dora = translated(cluster(method="dora"))
    assert (dora["peft"]["use_dora"], dora["peft"]["use_triton"]) == (True, False)
    qlora = translated(cluster(method="qlora"))
    assert qlora["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert (qlora["model"]["torch_dtype"], qlora["model"]["force_hf"]) == ("bfloat16", True)
    assert "backend" not in qlora["model"]
    assert "quantization" not in dora


def test_a_pipeline_takes_the_share_of_a_whole_step() -> None:
    config = translated(cluster(parallelism__pp=4, schedule__micro_batch_size=2))
    # 16 processes, 4 stages: 4 pipelines share 64 rows, and cut 16 rows into 8 micro-batches.
    assert config["step_scheduler"]["local_batch_size"] == 16
    assert config["distributed"]["pipeline"]["pp_microbatch_size"] == 2
    assert "pipeline" not in translated(cluster())["distributed"]


def test_float8_leaves_projections_with_a_low_rank_pair_alone() -> None:
    config = translated(cluster(precision__fp8=True))
    assert config["fp8"]["filter_fqns"] == ["lm_head", "q_proj", "v_proj"]
    assert config["fp8"]["enable_fsdp_float8_all_gather"] is False
    full = translated(cluster(precision__fp8=True, method="full"))
    assert full["fp8"]["filter_fqns"] == ["lm_head"]
    assert full["fp8"]["enable_fsdp_float8_all_gather"] is True
    assert "fp8" not in translated(cluster())


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"method": "full", "precision__fp8": True, "precision__compile": True},
        {"method": "dora", "parallelism__tp": 2, "parallelism__activation_checkpointing": True},
        {"method": "qlora", "parallelism__cp": 2},
        {"parallelism__pp": 4, "parallelism__tp": 2, "parallelism__reshard_after_forward": False},
    ],
)
def test_the_whole_is_plain_yaml(overrides: dict[str, Any]) -> None:
    config = translated(cluster(**overrides))
    assert yaml.safe_load(yaml.safe_dump(config)) == config


def test_a_schedule_of_one_step_has_no_warm_up() -> None:
    """AutoModel refuses a warm-up that is as long as the schedule."""
    recipe = load_recipe("tiny").with_overrides({"schedule.max_steps": 1})
    assert automodel_config(recipe, Path("/base"), Path("/work"))["lr_scheduler"]["lr_warmup_steps"] == 0
