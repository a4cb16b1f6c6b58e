from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.serving.metrics import LIVE_METRICS
from sluice.serving.policy import default_policy, load_policy

TEXT = resources.files("sluice.serving").joinpath("rollout.yaml").read_text()


def test_the_default_policy_rises_below_100_and_is_decided_by_known_metrics() -> None:
    policy = default_policy()
    assert [step.weight for step in policy.steps] == [20, 35, 50]
    assert set(policy.analysis.metrics) <= set(LIVE_METRICS)
    assert {name for name, metric in policy.analysis.metrics.items() if metric.gating} == {
        "error_rate", "empty_answers", "thumbs_down", "time_to_first_token",
    }  # fmt: skip


THUMBS = r"thumbs_down: {.*?}"


@pytest.mark.parametrize(
    ("old", "new", "field", "says"),
    [
        ("weight: 35", "weight: 250", "steps.1.weight", "= 250: should be less than or equal to 99"),
        (
            r"minimum: {requests: \d+,",
            "minimum: {requests: 0,",
            "steps.0.minimum.requests",
            "greater than or equal to 1",
        ),
        (r"maximum_time_s: \d+\n", "maximum_time_s: 2\n", "steps.0.maximum_time_s", "above minimum_time_s, which is 3"),
        (r"false_pass: \S+", "false_pass: high", "analysis.false_pass", "= 'high': should be a valid number"),
        (r"false_rollback: \S+", "false_rollback: 0.5", "analysis.false_rollback", "less than 0.5"),
        ("bake_s:", "bake_seconds:", "bake_seconds", "no such field; did you mean bake_s?"),
        (r"share: [\d.]+", "share: 1.5", "trip.share", "less than or equal to 1"),
        (r"token: {fail_above: \d", "token: {fail_above: 0", "time_to_first_token.fail_above", "cannot be below 1"),
        (THUMBS, "thumbs_down: {fail_above: 0.15, margin: 0.1}", "thumbs_down.margin", "(0.15): nothing could pass"),
        (THUMBS, "thumbs_down: {fail_above: 0.15, margin: 1.5}", "thumbs_down.margin", "cannot be above 1"),
        ("    thumbs_down:", "    thumbs_up:", "metrics.thumbs_up", "no metric of a rollout; there are error_rate"),
        ("margin:", "margins:", "analysis.metrics.error_rate.margins", "no such field"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, field: str, says: str) -> None:
    found = re.search(old, TEXT)
    assert found
    path = tmp_path / "rollout.yaml"
    path.write_text(TEXT[: found.start()] + new + TEXT[found.end() :])
    with pytest.raises(InputError) as caught:
        load_policy(path)
    line = TEXT[: found.start()].count("\n") + 1
    assert f"{field} (line {line})" in caught.value.message
    assert says in caught.value.message


def test_weights_that_do_not_rise_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(TEXT.replace("weight: 50", "weight: 4", 1))
    line = TEXT.splitlines().index("steps:") + 1
    with pytest.raises(InputError, match=rf"steps \(line {line}\) .*: the weights \[20, 35, 4\] must rise"):
        load_policy(path)


def test_a_policy_in_which_nothing_decides_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    begin, end = TEXT.index("  metrics:"), TEXT.index("probes:")
    shown = "  metrics:\n    error_rate: {gating: false, fail_above: 0.05, margin: 0.4}\n"
    path.write_text(TEXT[:begin] + shown + TEXT[end:])
    with pytest.raises(InputError, match="none of them is gating: every release would pass"):
        load_policy(path)


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
