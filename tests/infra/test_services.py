from __future__ import annotations

import json
from pathlib import Path

import pytest

from sluice.infra.errors import InputError
from sluice.infra.launch import inherited
from sluice.infra.roster import Roster, dependence_depths
from sluice.infra.services import HealthCheck, ServiceSpec
from sluice.infra.supervisord import socket_path


def part(name: str, *depends_on: str) -> ServiceSpec:
    return ServiceSpec(
        name=name,
        command=("/bin/true", "a b", "%x;"),
        health=HealthCheck.http("http://127.0.0.1:1/", statuses=(200, 403)),
        environment={"SECRET": "s3cret", "ODD": "a\n'\"%(x)s"},
        directory=Path("/tmp"),
        depends_on=depends_on,
    )


def test_a_description_survives_its_file() -> None:
    spec = part("one", "two")
    assert ServiceSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("name", ["", "One", "a b", "a:b", "../x"])
def test_names_that_would_break_a_path_or_the_configuration_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must match"):
        part(name)


def test_the_order_of_dependence() -> None:
    specs = [part("c", "b"), part("a"), part("b", "a"), part("d")]
    assert dependence_depths(specs) == {"a": 0, "b": 1, "c": 2, "d": 0}
    with pytest.raises(InputError, match="depends on 'nobody'"):
        dependence_depths([part("a", "nobody")])
    with pytest.raises(InputError, match="circle: a > b > a"):
        dependence_depths([part("a", "b"), part("b", "a")])
    with pytest.raises(InputError, match="one name: a, a"):
        dependence_depths([part("a"), part("a")])


def test_the_roster_keeps_secrets_out_of_the_configuration_and_notices_their_change(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "home")
    assert roster.read() == []
    roster.write([part("one"), part("two", "one")])
    assert roster.read() == [part("one"), part("two", "one")]
    configuration = tmp_path / "home" / "supervisord.conf"
    before = configuration.read_text()
    assert "s3cret" not in before
    assert before.index("priority=100") < before.index("priority=101")
    for path in (configuration, *(tmp_path / "home" / "parts").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
    roster.write([part("one")])
    assert len(list(roster.folder.glob("*.json"))) == 3
    roster.forget_others()
    assert len(list(roster.folder.glob("*.json"))) == 2
    (roster.folder / "index.json").write_text("[")
    assert roster.read() == []


def test_a_shell_does_not_configure_the_parts() -> None:
    shell = {"PATH": "/bin", "AWS_PROFILE": "work", "MLFLOW_TRACKING_URI": "x", "PYTHONPATH": "y", "NO_PROXY": "intern"}
    assert inherited(shell) == {
        "PATH": "/bin",
        "NO_PROXY": "intern,127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def test_the_socket_stays_where_the_running_supervisord_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert socket_path(Path("/short")) == Path("/short/supervisor.sock")
    long = tmp_path / ("x" * 100)
    monkeypatch.setattr("tempfile.tempdir", "/one")
    roster = Roster(long)
    assert str(socket_path(long)).startswith("/one/sluice-")
    roster.write([])
    monkeypatch.setattr("tempfile.tempdir", "/two")
    assert str(socket_path(long)).startswith("/one/sluice-")
    monkeypatch.setattr("tempfile.tempdir", "/" + "y" * 100)
    assert str(socket_path(tmp_path / ("z" * 100))).startswith("/tmp/sluice-")
