"""The requests that convicted a release lead to their traces, also through a rotated log; MLflow away is a sentence."""

from __future__ import annotations

import json
from pathlib import Path

from sluice.components.rollout_facts import store_of
from sluice.components.rollout_report import _traces, show_rollout, write_page
from sluice.infra.settings import MlflowSettings, ServingSettings, Settings
from tests.serving.rollouts import CANARY, TRACE, failed, holding

OTHER = "8f1d2c3a-0001-4aaa-9bbb-0123456789ab"
PARENT = "0af7651916cd43dd8448eb211c80319c"


def settings(home: Path) -> Settings:
    serving = ServingSettings(gateway_url="http://127.0.0.1:1", gateway_admin_url="http://127.0.0.1:2")
    return Settings(home=home, serving=serving, mlflow=MlflowSettings(tracking_uri="http://127.0.0.1:1"))


def test_a_request_of_the_gateways_is_found_by_its_callers_trace(tmp_path: Path) -> None:
    from sluice.components.served import gateway_settings

    given = settings(tmp_path)
    log = gateway_settings(given).access_log
    log.parent.mkdir(parents=True)
    lines = (
        "not json",
        '["a list"]',
        json.dumps({"request_id": "another", "traceparent": f"00-{'1' * 32}-00f067aa0ba902b7-01"}),
        json.dumps({"request_id": OTHER, "traceparent": f"00-{PARENT}-00f067aa0ba902b7-01"}),
    )
    log.with_name(f"{log.name}.1").write_text("\n".join(lines))
    log.write_text('{"request_id": "half')
    assert _traces(given, failed()) == {TRACE: TRACE, OTHER: PARENT}
    page = tmp_path / "page.html"
    write_page(given, failed(), page)
    assert f"sluice lineage {PARENT}" in page.read_text()


def test_without_gateway_or_log_the_trace_stores_own_ids_are_left(tmp_path: Path) -> None:
    assert _traces(Settings(home=tmp_path), failed()) == {TRACE: TRACE}
    assert _traces(settings(tmp_path), failed()) == {TRACE: TRACE}
    assert _traces(settings(tmp_path), holding()) == {}


def test_mlflow_away_is_a_sentence_and_a_rollout_under_way_is_not_shown(tmp_path: Path) -> None:
    given = settings(tmp_path)
    assert show_rollout(given, CANARY.release) == ""
    store_of(given).save(holding())
    assert show_rollout(given, CANARY.release) == ""
    store_of(given).save(failed())
    assert "MLflow does not show the rollout" in show_rollout(given, CANARY.release)
