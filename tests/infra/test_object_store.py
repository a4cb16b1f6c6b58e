"""What the S3 client's answers become. The real servers are asked in tests/integration/test_infra_parts.py."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import NoCredentialsError
from botocore.response import StreamingBody
from botocore.stub import Stubber
from pydantic import SecretStr

from sluice.infra.errors import UnavailableError
from sluice.infra.object_store import ObjectExists, ObjectMissing, S3ObjectStore
from sluice.infra.settings import ObjectStoreSettings


@pytest.fixture(scope="module")
def shared() -> S3ObjectStore:
    # Making a client costs half a second; the stub below takes its network away.
    return S3ObjectStore(
        ObjectStoreSettings(endpoint_url="http://127.0.0.1:9", access_key="a", secret_key=SecretStr("b"))
    )


@pytest.fixture
def answers(shared: S3ObjectStore) -> Iterator[Stubber]:
    with Stubber(shared.client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


@pytest.fixture
def store(shared: S3ObjectStore, answers: Stubber, monkeypatch: pytest.MonkeyPatch) -> S3ObjectStore:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    return shared


def refuse(answers: Stubber, operation: str, status: int, code: str, retries: int = 0) -> None:
    answers.add_client_error(operation, code, http_status_code=status, response_meta={"RetryAttempts": retries})


def body(data: bytes) -> dict[str, Any]:
    return {"Body": StreamingBody(io.BytesIO(data), len(data))}


def test_a_taken_key_is_somebody_elses(store: S3ObjectStore, answers: Stubber) -> None:
    refuse(answers, "put_object", 412, "PreconditionFailed")
    with pytest.raises(ObjectExists, match="ledger/1"):
        store.put("ledger/1", b"mine", if_absent=True)


def test_a_taken_key_after_a_lost_answer_is_our_own_when_the_bytes_are(store: S3ObjectStore, answers: Stubber) -> None:
    refuse(answers, "put_object", 412, "PreconditionFailed", retries=1)
    answers.add_response("get_object", body(b"mine"))
    store.put("ledger/1", b"mine", if_absent=True)
    refuse(answers, "put_object", 412, "PreconditionFailed", retries=1)
    answers.add_response("get_object", body(b"theirs"))
    with pytest.raises(ObjectExists):
        store.put("ledger/1", b"mine", if_absent=True)


def test_a_race_without_a_winner_is_run_again(store: S3ObjectStore, answers: Stubber) -> None:
    refuse(answers, "put_object", 409, "ConditionalRequestConflict")
    refuse(answers, "head_object", 404, "404")
    answers.add_response("put_object", {})
    store.put("ledger/1", b"mine", if_absent=True)


def test_a_race_with_a_winner_is_lost(store: S3ObjectStore, answers: Stubber) -> None:
    refuse(answers, "put_object", 409, "ConditionalRequestConflict")
    answers.add_response("head_object", {"ContentLength": 1, "LastModified": datetime(2026, 1, 1, tzinfo=UTC)})
    with pytest.raises(ObjectExists):
        store.put("ledger/1", b"mine", if_absent=True)


def test_a_race_that_never_ends_is_no_success(store: S3ObjectStore, answers: Stubber) -> None:
    for _ in range(4):
        refuse(answers, "put_object", 409, "ConditionalRequestConflict")
        refuse(answers, "head_object", 404, "404")
    refuse(answers, "put_object", 409, "ConditionalRequestConflict")
    with pytest.raises(UnavailableError, match="ConditionalRequestConflict"):
        store.put("ledger/1", b"mine", if_absent=True)


def test_what_the_server_says_becomes_a_sentence(store: S3ObjectStore, answers: Stubber, tmp_path: Path) -> None:
    refuse(answers, "get_object", 404, "NoSuchKey")
    with pytest.raises(ObjectMissing, match="no object 'k'"):
        store.get("k")
    refuse(answers, "put_object", 404, "NoSuchBucket")
    with pytest.raises(UnavailableError, match="no bucket 'sluice'") as refused:
        store.put("k", b"")
    assert "SLUICE_OBJECT_STORE__BUCKET" in refused.value.hint
    refuse(answers, "get_object", 403, "SignatureDoesNotMatch")
    with pytest.raises(UnavailableError, match="SignatureDoesNotMatch") as refused:
        store.get("k")
    assert "SECRET_KEY" in refused.value.hint
    (tmp_path / "file").write_bytes(b"x")
    refuse(answers, "put_object", 403, "AccessDenied")
    with pytest.raises(UnavailableError, match="refused 'k'"):
        store.put_file("k", tmp_path / "file")
    refuse(answers, "put_object", 400, "InvalidRequest")
    with pytest.raises(UnavailableError, match="InvalidRequest"):
        store.put("k", b"")


def test_missing_keys_are_not_a_silent_server(store: S3ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**arguments: object) -> None:
        raise NoCredentialsError

    monkeypatch.setattr(store.client, "get_object", nobody)
    with pytest.raises(UnavailableError, match="no credentials"):
        store.get("k")
    half = S3ObjectStore(ObjectStoreSettings(endpoint_url="http://127.0.0.1:9", access_key="a"))
    with pytest.raises(UnavailableError, match="no credentials") as refused:
        half.get("k")
    assert "SECRET_KEY" in refused.value.hint


def test_a_bucket_that_somebody_made_meanwhile_is_success(store: S3ObjectStore, answers: Stubber) -> None:
    refuse(answers, "head_bucket", 404, "404")
    refuse(answers, "create_bucket", 409, "BucketAlreadyOwnedByYou")
    store.ensure_bucket()
    refuse(answers, "head_bucket", 404, "404")
    refuse(answers, "create_bucket", 409, "BucketAlreadyExists")
    with pytest.raises(UnavailableError, match="BucketAlreadyExists"):
        store.ensure_bucket()


def test_a_proxy_does_not_stand_between_us_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    local = S3ObjectStore(
        ObjectStoreSettings(endpoint_url="http://127.0.0.1:9", access_key="a", secret_key=SecretStr("b"))
    ).client
    remote = S3ObjectStore(
        ObjectStoreSettings(endpoint_url="http://s3.example", access_key="a", secret_key=SecretStr("b"))
    ).client
    assert local.meta.config.proxies == {}  # type: ignore[attr-defined]
    assert remote.meta.config.proxies is None  # type: ignore[attr-defined]
