"""Recipes: every mistake is named with its field, line and value."""

from __future__ import annotations

import pytest
import yaml

from sluice.infra.errors import InputError
from sluice.training.recipe import RECIPES, Recipe, load_recipe, parse_recipe

GOOD = """\
name: small
lora:
  rank: 4
  target_modules: [q_proj, v_proj]
schedule:
  max_steps: 3
  global_batch_size: 4
  micro_batch_size: 2
"""


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_packaged_recipes_load_under_their_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_defaults_are_written_out_and_survive_a_round_trip() -> None:
    recipe = parse_recipe(GOOD, "good.yaml")
    assert recipe.to_json()["optimizer"]["betas"] == [0.9, 0.95]
    assert Recipe.model_validate(recipe.to_json()) == recipe


@pytest.mark.parametrize(("text", "part"), [("- a\n", "no recipe"), ("a: [1\n", "not YAML"), ("", "no recipe")])
def test_files_that_hold_no_recipe(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        parse_recipe(text, "x.yaml")


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("nope")
    assert "'nope'" in caught.value.message
    assert "demo" in caught.value.hint
    assert "tiny" in caught.value.hint


def test_overrides_replace_values_and_are_checked() -> None:
    recipe = parse_recipe(GOOD, "good.yaml")
    changed = recipe.with_overrides({"schedule.max_steps": 8, "seed": 3, "lora.target_modules": ["o_proj"]})
    assert (changed.schedule.max_steps, changed.seed, changed.lora.target_modules) == (8, 3, ("o_proj",))
    assert recipe.schedule.max_steps == 3
    with pytest.raises(InputError, match=r"schedule.max_steps = -1"):
        recipe.with_overrides({"schedule.max_steps": -1})


@pytest.mark.parametrize(
    ("field", "hint"), [("schedule.steps", "max_steps"), ("scedule.max_steps", "Sections"), ("seed.x", "Sections")]
)
def test_an_override_of_no_field_is_refused_with_the_fields_there_are(field: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(GOOD, "good.yaml").with_overrides({field: 1})
    assert field in caught.value.message
    assert hint in caught.value.hint


def test_the_digest_is_of_what_decides_the_weights() -> None:
    recipe = parse_recipe(GOOD, "good.yaml")
    assert recipe.digest == recipe.with_overrides({"name": "other", "budget.timeout_minutes": 1.0}).digest
    assert recipe.digest == recipe.with_overrides({"optimizer.weight_decay": 0}).digest
    assert recipe.digest != recipe.with_overrides({"seed": 1}).digest
    assert recipe.digest != recipe.with_overrides({"optimizer.learning_rate": 2e-3}).digest


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_written_out_in_full_is_the_same_recipe(name: str) -> None:
    """As `reproduce` and a sweep write it."""
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_dump(recipe.to_json()), "written.yaml") == recipe
