from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from sluice.infra.errors import InputError, UnavailableError
from sluice.infra.settings import load_settings, read_endpoints, write_endpoints


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_environment_wins_over_the_file_over_the_endpoints_over_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_endpoints(
        tmp_path / ".sluice",
        {
            "object_store": {"endpoint_url": "http://e", "bucket": "e", "secret_key": "e"},
            "vectors": {"uri": "http://e"},
        },
    )
    (tmp_path / "sluice.yaml").write_text("object_store: {endpoint_url: 'http://f', bucket: f}\n")
    monkeypatch.setenv("SLUICE_OBJECT_STORE__ENDPOINT_URL", "http://v")
    settings = load_settings()
    assert settings.object_store.endpoint_url == "http://v"
    assert settings.object_store.bucket == "f"
    assert settings.object_store.secret_key == SecretStr("e")
    assert settings.vectors.uri == "http://e"
    assert settings.object_store.region == "us-east-1"
    assert settings.home == tmp_path / ".sluice"


def test_a_cluster_does_not_read_what_a_local_up_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_endpoints(tmp_path / ".sluice", {"vectors": {"uri": "http://local"}})
    monkeypatch.setenv("SLUICE_PROFILE", "cluster")
    assert load_settings().vectors.uri is None


def test_paths_are_absolute_and_know_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SLUICE_HOME", "~/state")
    monkeypatch.setenv("SLUICE_SERVE_PYTHON", "~/serve/bin/python")
    write_endpoints(tmp_path / "state", {"vectors": {"uri": "http://e"}})
    settings = load_settings()
    assert settings.home == tmp_path / "state"
    assert settings.serve_python == tmp_path / "serve/bin/python"
    assert settings.vectors.uri == "http://e"


def test_an_empty_variable_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_HOME", "")
    monkeypatch.setenv("SLUICE_PORTS__S3", "")
    settings = load_settings()
    assert settings.home == tmp_path / ".sluice"
    assert settings.ports.s3 == 0


def test_a_wrong_value_names_the_field_the_value_and_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sluice.yaml").write_text("ports: {s3: 70000}\nobject_store: {bukket: x}\n")
    monkeypatch.setenv("SLUICE_PROFILE", "moon")
    with pytest.raises(InputError) as refused:
        load_settings()
    assert "Setting ports.s3 = 70000 (sluice.yaml)" in refused.value.message
    assert "Setting object_store.bukket = 'x' (sluice.yaml)" in refused.value.message
    assert "Setting profile = 'moon' (environment variable SLUICE_PROFILE)" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    "content",
    [
        "object_store: {secret_key: [hush]}",
        "object_store: {secretkey: hush}",
        "object_store: [hush]",
        "object_store: {access_key: {x: hush}}",
        "secret: hush",
    ],
)
def test_no_message_shows_a_secret(tmp_path: Path, content: str) -> None:
    (tmp_path / "sluice.yaml").write_text(content)
    with pytest.raises(InputError) as refused:
        load_settings()
    assert "hush" not in str(refused.value)
    assert "object_store" in refused.value.message or "secret" in refused.value.message


@pytest.mark.parametrize("content", [b"- a", b"a: [", b"1: x", b"\xff\xfe", b"text"])
def test_a_file_that_is_no_mapping_of_names_ends_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sluice.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"sluice\.yaml"):
        load_settings()


def test_a_section_that_is_no_json_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_OBJECT_STORE", "{hush")
    with pytest.raises(InputError, match="object_store") as refused:
        load_settings()
    assert "hush" not in str(refused.value)


def test_a_settings_file_that_is_named_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_SETTINGS", str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match=r"none\.yaml.* does not exist"):
        load_settings()


def test_secrets_do_not_print(tmp_path: Path) -> None:
    write_endpoints(tmp_path / ".sluice", {"object_store": {"secret_key": "hush"}})
    settings = load_settings()
    assert "hush" not in repr(settings)
    assert "hush" not in settings.model_dump_json()


def test_endpoints_are_private_and_damage_is_explained(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert read_endpoints(home) == {}
    write_endpoints(home, {"vectors": {"uri": "http://e"}})
    file = home / "endpoints.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text()) == read_endpoints(home)
    file.write_text("{")
    with pytest.raises(InputError, match=r"endpoints\.json"):
        read_endpoints(home)
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="cannot be written"):
        write_endpoints(tmp_path / "file", {})
