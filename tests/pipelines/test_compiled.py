"""The pipelines compile to KFP YAML, and the lint finds each thing that KFP would get silently wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.infra.errors import InputError
from sluice.pipelines.compiled import compile_all, lint
from sluice.pipelines.dags import dag_of, parameters_of, pipeline_function


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compiled")
    return {path.stem: path for path in compile_all(folder)}


@pytest.fixture
def spec(compiled: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = next(d for d in yaml.safe_load_all(compiled["retrain"].read_text()) if "root" in d)
    return found


def _problems(spec: dict[str, Any], tmp_path: Path) -> list[str]:
    path = tmp_path / "spoilt.yaml"
    path.write_text(yaml.safe_dump(spec))
    return list(lint(path))


def _executor(spec: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = spec["deploymentSpec"]["executors"]["exec-train"]["container"]
    return container


def test_all_three_compile_without_a_problem(compiled: dict[str, Path]) -> None:
    assert set(compiled) == {"retrain", "release", "reembed"}
    assert all(list(lint(path)) == [] for path in compiled.values())


def test_packages_at_run_time_are_found(spec: dict[str, Any], tmp_path: Path) -> None:
    _executor(spec)["command"] = ["sh", "-c", "python3 -m pip install kfp"]
    assert "installs packages" in " ".join(_problems(spec, tmp_path))


def test_missing_code_digest_is_found(spec: dict[str, Any], tmp_path: Path) -> None:
    _executor(spec)["env"] = []
    assert "no code digest" in " ".join(_problems(spec, tmp_path))


def test_image_by_tag_is_found(spec: dict[str, Any], tmp_path: Path) -> None:
    _executor(spec)["image"] = "registry.example/pipeline:latest"
    assert "not pinned by digest" in " ".join(_problems(spec, tmp_path))


def test_kfp_cache_is_found(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["root"]["dag"]["tasks"]["train"]["cachingOptions"] = {"enableCache": True}
    assert "KFP's cache" in " ".join(_problems(spec, tmp_path))


def test_branch_on_a_named_output_is_found(spec: dict[str, Any], tmp_path: Path) -> None:
    task = spec["root"]["dag"]["tasks"]["register"]
    task["triggerPolicy"] = {"condition": "inputs.parameter_values['pipelinechannel--gate-verdict'] == 'pass'"}
    task.setdefault("inputs", {}).setdefault("parameters", {})["pipelinechannel--gate-verdict"] = {
        "taskOutputParameter": {"producerTask": "gate", "outputParameterKey": "verdict"}
    }
    assert "named output 'verdict'" in " ".join(_problems(spec, tmp_path))


def test_python3_in_a_value_is_found(spec: dict[str, Any], tmp_path: Path) -> None:
    parameters = spec["root"]["dag"]["tasks"]["train"]["inputs"]["parameters"]
    parameters["overrides"] = {"runtimeValue": {"constant": "run python3 here"}}
    assert "python3" in " ".join(_problems(spec, tmp_path))


def test_an_outer_parameter_inside_a_loop_is_found(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["root"]["dag"]["tasks"]["train"]["parameterIterator"] = {"itemInput": "x", "items": {"raw": "[1]"}}
    assert "becomes the loop's item" in " ".join(_problems(spec, tmp_path))


def test_text_with_a_quote_in_a_condition_is_found(spec: dict[str, Any], tmp_path: Path) -> None:
    task = spec["root"]["dag"]["tasks"]["register"]
    task["triggerPolicy"] = {"condition": "inputs.parameter_values['x'] == 'it\\'s'"}
    assert "single quote" in " ".join(_problems(spec, tmp_path))


def test_an_image_by_tag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not pinned by digest"):
        compile_all(tmp_path, "registry.example/pipeline:1.0")


def test_dag_order_respects_what_tasks_wait_for() -> None:
    for name in ("retrain", "release", "reembed"):
        seen: set[str] = set()
        for row in dag_of(pipeline_function(name)):
            assert set(row["after"]) <= seen, row
            seen.add(row["name"])


def test_parameters_are_known_with_their_defaults() -> None:
    assert parameters_of(pipeline_function("release"))["adapter"] is None
    assert parameters_of(pipeline_function("retrain"))["recipe"] == "demo"


def test_unknown_pipeline_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="retrian") as caught:
        pipeline_function("retrian")
    assert "retrain" in caught.value.hint
