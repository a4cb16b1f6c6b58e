"""Approvals with a real MLflow: its page's calls, its webhooks to our receiver, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from sluice.infra.local_parts import LOCAL_PORTS, LocalSecrets, local_parts
from sluice.infra.settings import MlflowSettings, Settings
from sluice.pipelines import runs
from sluice.pipelines.approval_watch import PATH, Receiver, Watch
from sluice.pipelines.approvals import record, take_over
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_json
from sluice.provenance.releases import read_state
from sluice.registry.mlflow_registry import MlflowRegistry
from sluice.registry.versions import Version, get_version, register_version, set_gate
from sluice.registry.webhooks import Deliveries, load_or_create_secret, register_webhook, try_webhook
from tests.pipelines.approval_site import ApprovalSite
from tests.registry.fake_versions import FakeVersions
from tests.registry.mlflow_server import mlflow_server

pytestmark = pytest.mark.integration

KEYS = LocalSecrets("key", SecretStr("the object store's secret key"))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow that runs as `sluice up` starts it with mlflow.loopback_webhooks; it forgets no webhook."""
    settings = Settings(mlflow=MlflowSettings(loopback_webhooks=True))
    (part,) = (p for p in local_parts(settings, dict.fromkeys(LOCAL_PORTS, 1), KEYS) if p.name == "mlflow")
    variables = {name: value for name, value in part.environment.items() if name.startswith("MLFLOW_WEBHOOK_")}
    with mlflow_server(tmp_path_factory.mktemp("mlflow"), **variables, MLFLOW_WEBHOOK_CACHE_TTL="0") as address:
        yield address


class RealSite(ApprovalSite):
    """The installation of the unit tests, with a real MLflow. Versions get their numbers from one to the next."""

    def __init__(self, home: Path, signer: Signer, uri: str) -> None:
        super().__init__(home, signer, FakeVersions(), uri=uri)
        self.registry = MlflowRegistry(uri, timeout_s=30)

    def version(self, content: str, verdict: Any = "pass", **decision: Any) -> Version:
        digest = digest_json(content)
        made = register_version(
            self.registry,
            application="assistant",
            kind="adapter",
            digest=digest,
            tags={"base": digest_json("base")},
            description="",
            files={},
            run_id=None,
        )
        shown = self.decide(digest, verdict, **decision)
        return set_gate(self.registry, made, verdict, "Better.", shown)

    def in_the_page(self, version: Version, **tags: str) -> None:
        for name, value in tags.items():
            key = "approval" if name == "approval" else f"approval.{name}"
            self.registry.post(
                "model-versions/set-tag", name="assistant", version=str(version.number), key=key, value=value
            )

    def put_alias(self, version: Version) -> None:
        self.registry.post("registered-models/alias", name="assistant", alias="approved", version=str(version.number))

    def tags(self, version: Version) -> dict[str, str]:
        return dict(get_version(self.registry, "assistant", version.number).tags)


@pytest.fixture
def site(tmp_path: Path, uri: str) -> RealSite:
    made = RealSite(tmp_path / "home", Signer.load_or_create(tmp_path / "signer.pem"), uri)
    made.champion()
    return made


def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come true in time")


def test_tag_alias_command_and_answer(site: RealSite) -> None:
    by_tag, by_alias, failing = site.version("tag"), site.version("alias"), site.version("failing", "fail")
    both = site.version("both", approvers=2)
    site.in_the_page(by_tag, by="Anna", reason="fine", approval="approved")
    site.put_alias(by_alias)
    site.in_the_page(failing, approval="approved", by="Bert")
    site.in_the_page(both, by="Anna", approval="yes")
    taken, (problem,) = take_over(site.workspace, site.start)
    assert {(d.version.number, d.state) for d in taken} == {
        (by_tag.number, "approved"),
        (by_alias.number, "approved"),
        (both.number, "half"),
    }
    assert {decided.version.number for decided in site.started} == {by_tag.number, by_alias.number}
    assert "is 'fail', not 'pass'" in problem
    answered = site.tags(failing)
    assert answered["approval"] == "blocked by gate"
    assert "is 'fail', not 'pass'" in answered["approval.answer"]
    assert "approved" not in get_version(site.registry, "assistant", by_alias.number).aliases
    assert site.tags(both)["approval"] == "1 of 2"
    assert record(site.workspace, both, "approved", "carol", "yes", site.start).state == "approved"
    assert site.tags(both)["approval.by"] == "Anna and carol"
    assert take_over(site.workspace, site.start) == ([], [])
    assert len(site.started) == 3


def test_mlflow_calls_and_one_release_starts(site: RealSite, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    sleep = "import time; time.sleep(120)"
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **o: real([sys.executable, "-c", sleep, *command[3:]], **o)
    )
    settings = site.workspace.settings
    secret = load_or_create_secret(settings)
    tagged, aliased = site.version("called by tag"), site.version("called by alias")
    told: list[str] = []
    # It looks by itself once, when it starts; all else comes from calls.
    watch = Watch(site.workspace, told.append, every_s=3600)
    thread = threading.Thread(target=watch.run)
    hook = ""
    try:
        with Receiver("assistant", Deliveries(secret), watch.look_at) as receiver:
            address = f"http://127.0.0.1:{receiver.port}{PATH}"
            hook = register_webhook(site.registry, "assistant", address, secret)
            assert register_webhook(site.registry, "assistant", address, secret) == hook
            assert try_webhook(site.registry, hook) == ""
            thread.start()
            # The first look at all of them.
            until(lambda: site.tags(tagged)["approval"] == "pending")
            time.sleep(0.5)
            site.in_the_page(tagged, by="Anna", approval="approved")
            until(lambda: site.tags(tagged).get("approval.recorded") == "approved")
            site.put_alias(aliased)
            until(lambda: site.tags(aliased).get("approval.recorded") == "approved")
            started = runs.list_runs(settings)
            assert sorted(str(run.parameters["adapter"]) for run in started) == sorted([tagged.digest, aliased.digest])
            # With another secret MLflow is nobody we know: its try is refused, and its call too.
            register_webhook(site.registry, "assistant", address, "another secret of 24 characters")
            assert "401" in try_webhook(site.registry, hook)
            unheard = site.version("unheard")
            site.in_the_page(unheard, by="Anna", approval="approved")
            time.sleep(1.0)
            assert "approval.recorded" not in site.tags(unheard)
            assert len(runs.list_runs(settings)) == 2
    finally:
        watch.stop()
        thread.join()
        if hook:
            site.registry.delete(f"webhooks/{hook}")
        for run in runs.list_runs(settings):
            runs.cancel(run, grace_s=2)
            runs._children.pop(run.id).wait()
    assert not any(secret in sentence for sentence in told)


def test_two_processes_that_take_over_at_once_record_it_once(site: RealSite, tmp_path: Path) -> None:
    version = site.version("raced")
    site.in_the_page(version, by="Anna", approval="approved")
    code = (
        "import sys; from pathlib import Path; from tests.integration.test_approvals_mlflow import RealSite;"
        "from sluice.provenance.attestation import Signer; from sluice.pipelines.approvals import take_over;"
        "site = RealSite(Path(sys.argv[1]), Signer.load_or_create(Path(sys.argv[2])), sys.argv[3]);"
        "site.objects.put('ready-' + sys.argv[4], b''); \n"
        "while len(list(site.objects.list('ready-'))) < 2: pass\n"
        f"take_over(site.workspace, lambda d: print(d.approval), only={version.number})"
    )
    arguments = [str(site.home), str(tmp_path / "signer.pem"), site.registry.uri]
    both = [
        subprocess.Popen([sys.executable, "-c", code, *arguments, str(n)], stdout=subprocess.PIPE, env=os.environ)
        for n in range(2)
    ]
    said = [process.communicate(timeout=60)[0].decode().split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    approval = read_state(site.ledger).approval_for(version.digest)
    assert approval is not None
    assert site.kinds(version.digest) == ["approval by Anna"]
    assert {key for keys in said for key in keys} == {approval.entry.digest}
    assert site.tags(version)["approval"] == "approved"
