"""The roots of this installation: whatever names an artifact is asked, and silence stops the collection."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sluice.infra.errors import UnavailableError
from sluice.infra.settings import Settings
from sluice.pipelines import collect
from sluice.pipelines.runs import Run
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import digest_bytes
from sluice.provenance.ledger import Ledger
from sluice.provenance.releases import record_decision
from sluice.provenance.roots import Roots
from sluice.provenance.trust import TrustPolicy
from tests.support.directory_store import DirectoryStore


@pytest.fixture
def workspace(tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore) -> Any:
    signer = Signer.load_or_create(tmp_path / "signing.pem")
    return SimpleNamespace(
        settings=Settings(home=tmp_path / "home"),
        objects=object_store,
        artifacts=artifacts,
        signer=signer,
        policy=TrustPolicy.of([signer.public_key]),
        ledger=Ledger(object_store, "assistant", signer),
    )


def test_every_place_that_names_an_artifact_is_asked(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = workspace.artifacts.put_files({"a": b"1"}, "index").digest
    client = SimpleNamespace(list_collections=lambda **_: [f"assistant_{index.removeprefix('sha256:')[:12]}", "other"])
    monkeypatch.setattr(collect, "vectors_uri", lambda _: "http://milvus")
    monkeypatch.setattr("sluice.rag.milvus.connect", lambda _: client)
    holdout, base, given, other = (digest_bytes(name) for name in (b"holdout", b"base", b"given", b"other"))
    workspace.objects.put("holdouts/assistant.json", json.dumps({"digest": holdout}).encode())
    workspace.objects.put("base-models/assistant/tiny.json", json.dumps({"digest": base}).encode())
    folder = workspace.settings.runs / "retrain-1"
    me = psutil.Process(os.getpid())
    Run(
        "retrain-1",
        "retrain",
        {"champion": given},
        "running",
        time.time(),
        None,
        me.pid,
        me.create_time(),
        folder=folder,
    ).save()
    record_decision(
        Ledger(workspace.objects, "another-application", workspace.signer),
        adapter=other, verdict="pass", report=digest_bytes(b"report"), expires="2999-01-01T00:00:00Z",
        holdout=None, champion=None, actor="gate",
    )  # fmt: skip
    live = collect.find_roots(workspace).live
    assert live[index] == "an index in the vector store"
    assert live[holdout] == "a frozen holdout"
    assert live[base] == "a base model"
    assert live[given] == "a run under way"
    assert live[other] == "candidate of another-application with an unexpired decision"


def test_a_vector_store_that_cannot_be_asked_stops_the_collection(workspace: Any) -> None:
    with pytest.raises(UnavailableError, match="Milvus has no address"):
        collect.open_collector(workspace).plan()
    assert list(workspace.objects.list("gc/")) == []


def test_a_pointer_without_a_digest_stops_the_collection(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_indexes", lambda _: Roots())
    workspace.objects.put("holdouts/assistant.json", b"{}")
    with pytest.raises(UnavailableError, match="names no digest"):
        collect.find_roots(workspace)
