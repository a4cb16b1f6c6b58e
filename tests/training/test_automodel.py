"""The translation of a recipe into AutoModel's configuration."""

from __future__ import annotations

from pathlib import Path

import yaml

from sluice.training.automodel import automodel_config
from sluice.training.recipe import load_recipe

PATHS = (Path("/base"), Path("/data/train.jsonl"), Path("/data/validation.jsonl"), Path("/work"))


def test_every_number_of_the_recipe_arrives() -> None:
    recipe = load_recipe("tiny").with_overrides(
        {"schedule.max_steps": 9, "lora.rank": 5, "optimizer.learning_rate": 0.25, "precision.compute": "bfloat16"}
    )
    config = automodel_config(recipe, *PATHS)
    assert config["step_scheduler"]["max_steps"] == 9
    assert config["step_scheduler"]["val_every_steps"] == 9
    assert config["peft"]["dim"] == 5
    assert config["peft"]["target_modules"] == ["*.q_proj", "*.v_proj"]
    assert config["optimizer"]["lr"] == 0.25
    assert config["distributed"]["mp_policy"]["param_dtype"] == "bfloat16"
    assert config["dataset"]["path_or_dataset_id"] == "/data/train.jsonl"
    assert config["validation_dataset"]["path_or_dataset_id"] == "/data/validation.jsonl"
    assert config["checkpoint"]["checkpoint_dir"] == "/work/checkpoints"


def test_small_numbers_stay_numbers_through_yaml() -> None:
    # YAML 1.1 reads "1e-08" as a string; only "1.0e-08" is a number there.
    recipe = load_recipe("tiny").with_overrides({"optimizer.epsilon": 1e-8, "optimizer.minimum_learning_rate": 1e-5})
    read = yaml.safe_load(yaml.safe_dump(automodel_config(recipe, *PATHS)))
    assert read["optimizer"]["eps"] == 1e-8
    assert read["lr_scheduler"]["min_lr"] == 1e-5


def test_without_validation_examples_there_is_no_validation() -> None:
    base, train_file, _, work = PATHS
    config = automodel_config(load_recipe("tiny"), base, train_file, None, work)
    assert not [key for key in config if key.startswith("validation")]
