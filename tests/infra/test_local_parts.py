from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import re
import sqlite3
from pathlib import Path

import pytest
from pydantic import SecretStr

from sluice.infra.errors import InputError
from sluice.infra.local_parts import (
    LOCAL_PORTS,
    LocalSecrets,
    endpoints,
    load_or_create_secrets,
    local_parts,
    prepare_local_parts,
)
from sluice.infra.mlflow_database import revision
from sluice.infra.settings import MlflowSettings, ObjectStoreSettings, Settings, load_settings, write_endpoints

PORTS = {name: 21000 + number for number, name in enumerate(LOCAL_PORTS)}
SECRETS = LocalSecrets("key", SecretStr("very-secret"))


def database(path: Path, version: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("create table alembic_version (version_num text)")
        connection.execute("insert into alembic_version values (?)", (version,))
        connection.commit()
    return path


def template(cache: Path, version: str) -> Path:
    return database(cache / "mlflow" / f"{importlib.metadata.version('mlflow')}.db", version)


def test_every_port_is_used_once_and_nothing_listens_elsewhere(tmp_path: Path) -> None:
    specs = local_parts(Settings(home=tmp_path), PORTS, SECRETS)
    assert [spec.name for spec in specs] == ["seaweedfs", "mlflow", "milvus"]
    assert sorted(name for spec in specs for name in spec.ports) == sorted(LOCAL_PORTS)
    for spec in specs:
        line = " ".join(spec.command)
        for name in spec.ports:
            assert len(re.findall(rf"\b{PORTS[name]}\b", line)) == 1, name
        assert "127.0.0.1" in line
        assert "very-secret" not in line


def test_endpoints_have_the_shape_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_endpoints(tmp_path, endpoints(Settings(home=tmp_path), PORTS, SECRETS))
    settings = load_settings()
    assert settings.object_store.endpoint_url == f"http://127.0.0.1:{PORTS['s3']}"
    assert settings.object_store.secret_key == SecretStr("very-secret")
    assert settings.mlflow.tracking_uri == f"http://127.0.0.1:{PORTS['mlflow']}"
    assert settings.vectors.uri == f"http://127.0.0.1:{PORTS['milvus']}"
    assert load_or_create_secrets(settings) == SECRETS, "a second `up` finds the same keys"


def test_keys_are_random_kept_and_private(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "one")
    made = load_or_create_secrets(settings)
    assert load_or_create_secrets(settings) == made
    assert load_or_create_secrets(Settings(home=tmp_path / "two")) != made
    assert len(made.secret_key.get_secret_value()) >= 40
    assert "**" in repr(made)
    file = tmp_path / "one" / "secrets.json"
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text("{}")
    with pytest.raises(InputError, match=r"secrets\.json"):
        load_or_create_secrets(settings)
    chosen = ObjectStoreSettings(access_key="a", secret_key=SecretStr("b"))
    assert load_or_create_secrets(Settings(home=tmp_path / "one", object_store=chosen)).access_key == "a"


def test_a_new_home_gets_a_copy_of_the_migrated_database_and_an_old_one_is_left_alone(tmp_path: Path) -> None:
    template(tmp_path / "cache", "rev1")
    settings = Settings(home=tmp_path / "home")
    said: list[str] = []
    prepare_local_parts(settings, lambda _done, _total, message: said.append(message), cache=tmp_path / "cache")
    made = tmp_path / "home" / "mlflow" / "mlflow.db"
    assert revision(made) == "rev1"
    assert said == ["preparing MLflow's database"]
    with contextlib.closing(sqlite3.connect(made)) as connection:
        connection.execute("create table mine (x int)")
        connection.commit()
    before = made.read_bytes()
    prepare_local_parts(settings, cache=tmp_path / "cache")
    assert made.read_bytes() == before
    assert [path.name for path in made.parent.iterdir()] == ["mlflow.db"]


def test_a_database_of_another_version_is_migrated_on_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template(tmp_path / "cache", "rev2")
    made = database(tmp_path / "home" / "mlflow" / "mlflow.db", "rev1")

    def migrate(code: str, staging: Path) -> None:
        with contextlib.closing(sqlite3.connect(staging)) as connection:
            connection.execute("update alembic_version set version_num = 'rev2'")
            connection.commit()
        assert revision(made) == "rev1", "the original is untouched while it is migrated"

    monkeypatch.setattr("sluice.infra.mlflow_database._run", migrate)
    prepare_local_parts(Settings(home=tmp_path / "home"), cache=tmp_path / "cache")
    assert revision(made) == "rev2"
    assert revision(made.with_name("mlflow.db.rev1")) == "rev1", "the old one is kept"


def test_the_revision_of_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("text")
    assert revision(tmp_path / "x") is None
    assert revision(tmp_path / "none") is None


def test_mlflow_keeps_its_webhooks_and_calls_this_machine_only_when_told_to(tmp_path: Path) -> None:
    def webhooks(secrets: LocalSecrets, **mlflow: bool) -> dict[str, str]:
        settings = Settings(home=tmp_path, mlflow=MlflowSettings(**mlflow))
        (part,) = (spec for spec in local_parts(settings, PORTS, secrets) if spec.name == "mlflow")
        return {name: value for name, value in part.environment.items() if "WEBHOOK" in name}

    (name,) = closed = webhooks(SECRETS)
    assert name == "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"
    assert len(base64.urlsafe_b64decode(closed[name])) == 32
    assert webhooks(SECRETS) == closed, "the same at each start, or it could not read them any more"
    assert webhooks(LocalSecrets("key", SecretStr("another"))) != closed
    opened = webhooks(SECRETS, loopback_webhooks=True)
    assert opened.pop("MLFLOW_WEBHOOK_ALLOWED_SCHEMES") == "https,http"
    assert opened.pop("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS") == "true"
    assert opened == closed
