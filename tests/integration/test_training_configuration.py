"""AutoModel's own classes take every key that a recipe becomes: none is unknown to them, none refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.training.automodel import automodel_config
from tests.training.test_automodel import cluster

pytest.importorskip("nemo_automodel")

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full in float8, compiled": {"method": "full", "precision__fp8": True, "precision__compile": True},
    "lora in float8": {"precision__fp8": True},
    "dora, cut layers": {"method": "dora", "parallelism__tp": 2, "parallelism__activation_checkpointing": True},
    "qlora, cut rows": {"method": "qlora", "parallelism__cp": 2},
    "pipeline": {"parallelism__pp": 4, "schedule__micro_batch_size": 2},
}


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_automodel_knows_every_key(kind: str, tmp_path: Path) -> None:
    from nemo_automodel._transformers import NeMoAutoModelForCausalLM
    from nemo_automodel.components._peft.lora import PeftConfig
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.components.quantization.fp8 import FP8Config, build_fp8_config
    from nemo_automodel.recipes._dist_utils import parse_distributed_section
    from nemo_automodel.recipes._typed_config import RecipeConfig

    recipe = cluster(**RECIPES[kind])
    file = tmp_path / "automodel.yaml"
    values = automodel_config(recipe, tmp_path, tmp_path)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    config = RecipeConfig(load_yaml_config(file))

    parsed = parse_distributed_section(config.distributed.to_dict())
    assert (parsed["tp_size"], parsed["pp_size"], parsed["cp_size"]) == (
        recipe.parallelism.tp,
        recipe.parallelism.pp,
        recipe.parallelism.cp,
    )
    assert parsed["activation_checkpointing"] is recipe.parallelism.activation_checkpointing
    assert parsed["strategy_config"].enable_compile is recipe.precision.compile
    assert str(parsed["strategy_config"].mp_policy.param_dtype) == "torch.bfloat16"
    assert parsed["pp_enabled"] is (recipe.parallelism.pp > 1)
    assert config.loss_fn is not None
    assert config.optimizer is not None
    assert config.lr_scheduler is not None
    assert config.step_scheduler.max_steps == recipe.schedule.max_steps
    assert config.model._target_ == NeMoAutoModelForCausalLM.from_pretrained
    if recipe.method == "full":
        assert config.get("peft", None) is None
    else:
        peft = config.peft.instantiate()
        assert isinstance(peft, PeftConfig)
        assert (peft.dim, peft.use_dora) == (recipe.lora.rank, recipe.method == "dora")
    if recipe.method != "qlora":
        assert config.model.backend.instantiate().linear == "torch"
    if recipe.precision.fp8:
        built = build_fp8_config(config.fp8)
        assert built.enabled
        # `from dict` ignores what it does not know, so the names are compared.
        assert set(values["fp8"]) == set(vars(FP8Config()))


def test_float8_takes_no_low_rank_pair_away() -> None:
    """What AutoModel does to a projection that is not left out, and what our list of those that are keeps."""
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules
    from nemo_automodel.components.quantization.fp8 import FP8Config, apply_fp8_to_model
    from torch import nn

    def trained(filtered: list[str]) -> list[str]:
        model = nn.Module()
        model.q_proj, model.up_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        apply_lora_to_linear_modules(model, PeftConfig(target_modules=["*q_proj"], dim=16))
        config = FP8Config(enabled=True, recipe_name="tensorwise", emulate=True, filter_fqns=filtered)
        model = apply_fp8_to_model(model, config=config)
        assert "Float8" in type(model.up_proj).__name__
        return [name for name, _ in model.named_parameters() if "lora" in name]

    recipe = cluster(precision__fp8=True)
    values: Any = automodel_config(recipe, Path("/b"), Path("/w"))
    assert trained(values["fp8"]["filter_fqns"]) == ["q_proj.lora_A.weight", "q_proj.lora_B.weight"]
    assert trained([]) == []


def test_preference_tuning_is_still_not_offered() -> None:
    """The sentence that refuses `method: dpo` says so; when AutoModel offers it, this fails and the sentence goes."""
    import importlib.util

    found = importlib.util.find_spec("nemo_automodel")
    assert found is not None
    root = Path(str((found.submodule_search_locations or [""])[0]))
    names = [path.stem for folder in ("recipes", "components/loss") for path in (root / folder).rglob("*.py")]
    assert len(names) > 20
    assert not [name for name in names if any(word in name for word in ("dpo", "orpo", "kto", "preference"))]
