"""The command line: quick to answer, one shape of error, documented exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.infra import errors
from sluice.infra.errors import InputError, SluiceError
from sluice.pipelines.cli.runs import parse_parameters

SLUICE = Path(sys.executable).with_name("sluice")
DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def _run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return subprocess.run(
        [str(SLUICE), *arguments],
        env={**clean, "SLUICE_HOME": str(home), **environment},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['sluice', '--help']\n"
        "import sluice.pipelines.cli as cli\n"
        "try:\n    cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'kfp', 'torch', 'mlflow', 'pymilvus', 'openai', 'boto3', 'scipy', 'pandas'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().endswith("HEAVY []"), done.stdout[-300:]


def test_every_command_has_help(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for command in ("up", "run", "approve", "lineage", "doctor", "demo"):
        done = _run(command, "--help", home=home)
        assert done.returncode == 0
        assert "Usage" in done.stdout


def test_wrong_setting_names_field_value_and_variable(tmp_path: Path) -> None:
    done = _run("status", home=tmp_path / "home", SLUICE_PORTS__S3="seventy")
    said = done.stdout + done.stderr
    assert done.returncode == 2
    assert "ports.s3" in said
    assert "seventy" in said
    assert "SLUICE_PORTS__S3" in said
    assert "Traceback" not in said


def test_errors_have_one_shape_as_json(tmp_path: Path) -> None:
    done = _run("logs", "nothing", home=tmp_path / "home")
    assert done.returncode == 2
    done = _run("lineage", "nonsense", "--json", home=tmp_path / "home")
    told = json.loads(done.stdout)
    assert set(told) == {"error", "hint", "exit_code"}
    assert told["exit_code"] == done.returncode == 3
    assert "sluice up" in told["hint"]


def test_unknown_command_and_option_exit_with_2(tmp_path: Path) -> None:
    assert _run("fly", home=tmp_path / "home").returncode == 2
    assert _run("status", "--colour", home=tmp_path / "home").returncode == 2


def test_config_show_hides_secrets(tmp_path: Path) -> None:
    done = _run("config", "show", "--json", home=tmp_path / "home", SLUICE_OBJECT_STORE__SECRET_KEY="hunter2-secret")
    assert done.returncode == 0
    assert "hunter2" not in done.stdout
    assert json.loads(done.stdout)["object_store"]["secret_key"] == "**********"


def test_doctor_tells_what_is_missing(tmp_path: Path) -> None:
    done = _run("doctor", "--json", home=tmp_path / "home", SLUICE_SERVE_PYTHON=str(tmp_path / "none"))
    assert done.returncode == 3
    assert "doctor" not in done.stderr or "Traceback" not in done.stderr


def test_up_without_a_serving_environment_says_the_way_out(tmp_path: Path) -> None:
    done = _run("up", "--json", home=tmp_path / "home", SLUICE_SERVE_PYTHON=str(tmp_path / "none"))
    assert done.returncode == 3
    assert "make setup" in json.loads(done.stdout)["hint"]


def test_local_verbs_are_refused_on_a_cluster(tmp_path: Path) -> None:
    done = _run("up", "--json", home=tmp_path / "home", SLUICE_PROFILE="cluster")
    assert done.returncode == 2
    assert "profile" in json.loads(done.stdout)["error"]


def test_parameters_are_typed_by_their_defaults() -> None:
    known = {"recipe": "demo", "steps": 8.0, "shuffle": False, "adapter": None}
    parsed = parse_parameters(["adapter=a=b", "steps=12", "shuffle=True"], known)
    assert parsed == {"adapter": "a=b", "steps": 12, "shuffle": True}
    for given, word in (
        (["adapter"], "NAME=VALUE"),
        (["adapter=x", "colour=red"], "colour"),
        ([], "adapter"),
        (["adapter=x", "shuffle=maybe"], "maybe"),
        (["adapter=x", "steps=many"], "many"),
    ):
        with pytest.raises(InputError, match=word):
            parse_parameters(given, known)


def test_exit_codes_are_documented_and_distinct() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SluiceError)]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    text = DOCS.read_text()
    assert all(f"| {code} |" in text for code in codes)


def test_an_unreachable_store_is_a_sentence(tmp_path: Path) -> None:
    keys = {"SLUICE_OBJECT_STORE__ACCESS_KEY": "a", "SLUICE_OBJECT_STORE__SECRET_KEY": "b"}
    address = "http://127.0.0.1:9"
    done = _run("ledger", "--json", home=tmp_path / "home", SLUICE_OBJECT_STORE__ENDPOINT_URL=address, **keys)
    told = json.loads(done.stdout)
    assert done.returncode == told["exit_code"] == 3
    assert address in told["error"]
    assert "sluice up" in told["hint"]


def test_a_corrupt_endpoints_file_is_named(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "endpoints.json").write_text('{"object_store": ')
    done = _run("status", "--json", home=home)
    told = json.loads(done.stdout)
    assert done.returncode == 2
    assert "endpoints.json" in told["error"]
    assert "sluice up" in told["hint"]


def test_a_wrong_settings_file_names_the_field(tmp_path: Path) -> None:
    file = tmp_path / "sluice.yaml"
    file.write_text("application: Has Spaces\n")
    done = _run("config", "show", "--json", home=tmp_path / "home", SLUICE_SETTINGS=str(file))
    told = json.loads(done.stdout)
    assert done.returncode == 2
    assert "application" in told["error"]
    assert "Has Spaces" in told["error"]


def test_a_busy_fixed_port_is_named_with_its_setting(tmp_path: Path) -> None:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = str(held.getsockname()[1])
        fixed = {"SLUICE_PORTS__MLFLOW": port, "SLUICE_SERVE_PYTHON": sys.executable}
        done = _run("up", "--json", home=tmp_path / "home", **fixed)
    told = json.loads(done.stdout)
    assert done.returncode == 2
    assert port in told["error"]
    assert "mlflow" in told["error"]
