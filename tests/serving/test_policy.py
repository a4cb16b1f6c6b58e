from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.serving.policy import default_policy, load_policy

TEXT = resources.files("sluice.serving").joinpath("rollout.yaml").read_text()


def test_the_default_policy_rises_to_100() -> None:
    assert [step.weight for step in default_policy().steps] == [5, 25, 50, 100]


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        ("weight: 25", "weight: 250", "steps.1.weight = 250", "less than or equal to 100"),
        ("pass_confidence: 0.8", "pass_confidence: high", "analysis.pass_confidence = 'high'", "valid number"),
        ("bake_s: 3", "bake_seconds: 3", "bake_seconds", "not permitted"),
        ("weight: 50", "weight: 4", "the policy", "must rise"),
        ("{gating: true, fail_above: 8.0", "{gating: true, fail_above: 0.5", "analysis", "cannot be below 1"),
        ("tolerance: 0.45", "tolerance: 0.1", "analysis.thumbs_down", "nothing could pass"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, field: str, says: str) -> None:
    assert old in TEXT
    path = tmp_path / "rollout.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_policy(path)
    assert field in caught.value.message
    assert says in caught.value.message
    if field not in ("the policy", "analysis"):
        expected = next(number for number, line in enumerate(path.read_text().splitlines(), 1) if new in line)
        assert f"line {expected}:" in caught.value.message


def test_broken_yaml_and_missing_files_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text("steps:\n  - weight: [5\nbake_s: 1\n")
    with pytest.raises(InputError, match="line 3"):
        load_policy(path)
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_policy(tmp_path / "nowhere.yaml")
    path.write_text("")
    with pytest.raises(InputError, match="mapping"):
        load_policy(path)
