"""Roles from the settings, or from an API that answers as Kubernetes does; and the audit log either way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sluice.infra import access, audit
from sluice.infra.access import VERBS, KubernetesAuthority, SettingsAuthority, login, require
from sluice.infra.errors import AccessRefused, InputError, UnavailableError
from sluice.infra.settings import AccessSettings, Settings
from tests.support.directory_store import DirectoryStore


def make(home: Path, **fields: Any) -> Settings:
    return Settings(home=home, access=AccessSettings(**fields))


def outcomes(home: Path) -> list[tuple[str, str, str, str]]:
    return [(line.identity, line.verb, line.subject, line.outcome) for line in audit.read(home)]


def test_without_roles_the_owner_of_the_home_may_do_everything(tmp_path: Path) -> None:
    settings = make(tmp_path)
    for verb in VERBS:
        assert require(settings, verb, "it") == login()
    assert outcomes(tmp_path) == [(login(), verb, "it", "allowed") for verb in VERBS]
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_somebody_else_s_home_grants_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_owner", lambda _: False)
    with pytest.raises(AccessRefused, match="not the owner"):
        require(make(tmp_path), "up")


def test_roles_by_name_and_for_the_rest(tmp_path: Path) -> None:
    operator = make(tmp_path, roles={login(): ["operator"]})
    assert require(operator, "run", "retrain") == login()
    with pytest.raises(AccessRefused, match=r"may not approve version 2: it needs the role approver"):
        require(operator, "approve", "version 2")
    assert outcomes(tmp_path)[-1] == (login(), "approve", "version 2", "refused")
    # An approver is no operator; an administrator is everything.
    with pytest.raises(AccessRefused):
        require(make(tmp_path, roles={login(): ["approver"]}), "run")
    assert require(make(tmp_path, default=["administrator"]), "rollback")
    with pytest.raises(AccessRefused, match="does not name"):
        require(make(tmp_path, roles={"ann": ["administrator"]}), "run")


def test_a_name_from_the_environment_counts_only_where_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_ACTOR", "ann")
    monkeypatch.setenv("LOGNAME", "ann")
    assert SettingsAuthority(make(tmp_path)).identity() == login()
    assert SettingsAuthority(make(tmp_path, trust_actor=True)).identity() == "ann"


@pytest.fixture
def api() -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """A server that answers self-reviews as the Kubernetes API does, and notes what it was asked."""
    says: dict[str, Any] = {"allowed": True, "reason": 'RBAC: allowed by RoleBinding "approvers/ml"'}
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({"path": self.path, **body})
            if self.headers["authorization"] != "Bearer token-of-ann":
                answer: dict[str, Any] = {"kind": "Status", "status": "Failure", "code": 401}
            elif body["kind"] == "SelfSubjectReview":
                answer = {**body, "status": {"userInfo": {"username": "ann@example.org", "groups": ["ml"]}}}
            else:
                answer = {**body, "status": says}
            data = json.dumps(answer).encode()
            self.send_response(answer.get("code", 201))
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", says, asked
    server.shutdown()
    server.server_close()


def on_cluster(monkeypatch: pytest.MonkeyPatch, authority: KubernetesAuthority, home: Path) -> Settings:
    monkeypatch.setattr(KubernetesAuthority, "in_cluster", classmethod(lambda _: authority))
    return Settings(home=home, profile="cluster")


def test_the_cluster_s_rbac_is_asked(
    api: tuple[str, dict[str, Any], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, says, asked = api
    settings = on_cluster(monkeypatch, KubernetesAuthority(address, "token-of-ann", "ml"), tmp_path)
    assert require(settings, "approve", "version 3") == "ann@example.org"
    assert asked[-1]["path"] == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    assert asked[-1]["apiVersion"] == "authorization.k8s.io/v1"
    wanted = {"namespace": "ml", "group": "sluice.dev", "resource": "releases", "verb": "approve"}
    assert asked[-1]["spec"] == {"resourceAttributes": wanted}
    assert asked[-2]["path"] == "/apis/authentication.k8s.io/v1/selfsubjectreviews"
    says.update(allowed=False, reason="")
    for verb in ("approve", "rollback"):
        # RBAC that answers no means no, for the verbs of emergency too.
        with pytest.raises(AccessRefused, match=r"ann@example\.org may not"):
            require(settings, verb)
    says.update(evaluationError="webhook timed out")
    with pytest.raises(UnavailableError, match="webhook timed out"):
        require(settings, "approve")
    assert [line.outcome for line in audit.read(tmp_path)] == ["allowed", "refused", "refused", "refused"]


def test_rollback_is_never_held_up_by_an_authority_that_does_not_answer(
    api: tuple[str, dict[str, Any], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for authority in (
        KubernetesAuthority("http://127.0.0.1:9", "token-of-ann", "ml"),
        KubernetesAuthority(api[0], "expired", "ml"),
    ):
        settings = on_cluster(monkeypatch, authority, tmp_path)
        assert require(settings, "rollback", "slow") == login()
        assert require(settings, "release abort", "slow") == login()
        assert [line.outcome for line in audit.read(tmp_path)[-2:]] == ["emergency", "emergency"]
        with pytest.raises(UnavailableError, match="cannot be decided"):
            require(settings, "approve")
        assert audit.read(tmp_path)[-1].outcome == "refused"


def test_rollback_goes_on_when_the_audit_log_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    assert require(make(tmp_path), "rollback") == login()
    with pytest.raises(UnavailableError):
        require(make(tmp_path), "approve")


def test_outside_a_cluster_and_with_local_roles_on_one_nothing_is_granted(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="service account"):
        require(Settings(home=tmp_path, profile="cluster"), "approve")
    mixed = Settings(home=tmp_path, profile="cluster", access=AccessSettings(default=["administrator"]))
    with pytest.raises(InputError, match="RBAC decides"):
        require(mixed, "approve")


def test_the_audit_log_is_shipped_once_and_read_from_everywhere(tmp_path: Path, object_store: DirectoryStore) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for home in (here, there):
        require(make(home), "rollback", home.name)
    assert audit.ship(here, object_store) == 1
    assert audit.ship(here, object_store) == 0
    require(make(here), "approve", "version 1")
    # A crash that lost the marker sends again what is there already.
    (here / "audit.shipped").unlink()
    assert audit.ship(here, object_store) == 2
    assert audit.ship(there, object_store) == 1
    lines = audit.merge(audit.read(here), audit.read_shipped(object_store))
    assert [line.subject for line in lines] == ["here", "there", "version 1"]
    with (here / "audit.jsonl").open("a") as stream:
        stream.write('{"identity": "cut o')
    assert len(audit.read(here)) == 2
