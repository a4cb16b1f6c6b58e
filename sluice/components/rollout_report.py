"""The page of a rollout: written to a file, and shown in MLflow beside the version when the rollout has ended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.components.rollout_facts import read_policy, store_of
from sluice.components.served import gateway_settings
from sluice.infra.errors import SluiceError
from sluice.infra.settings import Settings
from sluice.provenance.canonical import digest_json, short
from sluice.serving.durable import replace_file
from sluice.serving.rollout_page import PageFacts, heading, rollout_page, summary
from sluice.serving.rollout_state import RolloutState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.run_page import RunLink
    from sluice.registry.versions import Version

PAGE = "rollout.html"
EXPERIMENT = "rollouts"
ROLLOUT_TAG = "rollout"
_TRACE = re.compile(r"^[0-9a-f]{32}$")
_TRACEPARENT = re.compile(r"^00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$")


def write_page(settings: Settings, state: RolloutState, path: Path) -> None:
    """The rollout's page as a file, with what is known here and now; MLflow need not answer."""
    version: Version | None = None
    pages: Mapping[str, str] = {}
    traces = _traces(settings, state)
    try:
        registry, version = _version(settings, state)
        pages = _trace_pages(registry, settings, set(traces.values()))
    except SluiceError:
        # The page says without them what matters.
        pass
    replace_file(path, rollout_page(state, _facts(settings, state, version, traces, pages)))


def show_rollout(settings: Settings, release: str) -> str:
    """Show an ended rollout in MLflow: a run with its page, linked from the version. Returns a sentence.

    Again writes the same. An MLflow that does not answer is a sentence too: a rollout has ended by its own record.
    """
    from sluice.registry.page_note import put_note
    from sluice.registry.versions import set_tag

    state = store_of(settings).load(release)
    if state is None or not state.ended:
        return ""
    try:
        registry, version = _version(settings, state)
        link = _log(settings, registry, state, version)
        if version is not None:
            set_tag(registry, version, ROLLOUT_TAG, heading(state))
            said = f"{_plain(heading(state))}.** {_plain(summary(state), 200)} [Timeline]({link.url}/artifacts/{PAGE})"
            put_note(registry, version, "Rollout", said)
    except SluiceError as error:
        return f"MLflow does not show the rollout: {error.message} `sluice release history --html` writes its page."
    return f"the rollout's timeline: {link.url}/artifacts/{PAGE}"


def _log(settings: Settings, registry: MlflowRegistry, state: RolloutState, version: Version | None) -> RunLink:
    """One run for each begin of a rollout; the same one again when it is shown again."""
    from sluice.registry.run_page import NOTE_TAG, SOURCE, MetricPoint, RunPage

    begun = state.events[0].time if state.events else state.since
    name = f"{settings.application} {short(state.release)}: {state.phase}"
    page = RunPage.open(registry, EXPERIMENT, digest_json(["rollout", state.release, begun]), name, begun)
    traces = _traces(settings, state)
    pages = _trace_pages(registry, settings, set(traces.values()))
    file = settings.home / "rollouts" / "pages" / f"{short(state.release)}.html"
    replace_file(file, rollout_page(state, _facts(settings, state, version, traces, pages)))
    page.show_files({PAGE: file})
    points = [
        MetricPoint("share", float(event.weight), number, event.time) for number, event in enumerate(state.events)
    ]
    if "share" not in page.latest:
        page.log_points(points)
    page.set_tags(
        {
            **SOURCE,
            "application": settings.application,
            "release": state.release,
            "outcome": state.phase,
            "mlflow.runName": name,
            NOTE_TAG: f"**{heading(state)}.** {_plain(summary(state))}",
        }
    )
    page.set_status("FINISHED" if state.phase == "promoted" else "FAILED", state.events[-1].time)
    return page.link


def _facts(
    settings: Settings,
    state: RolloutState,
    version: Version | None,
    traces: Mapping[str, str],
    pages: Mapping[str, str],
) -> PageFacts:
    return PageFacts(
        settings.application,
        version=f"version {version.number} ({short(state.release)})" if version else "",
        version_page=version.url if version else "",
        policy=read_policy(settings, state.release),
        traces=traces,
        pages=pages,
    )


def _version(settings: Settings, state: RolloutState) -> tuple[MlflowRegistry, Version | None]:
    from sluice.registry.mlflow_registry import MlflowRegistry
    from sluice.registry.versions import find_version

    registry = MlflowRegistry(settings.mlflow.tracking_uri)
    return registry, find_version(registry, settings.application, state.release)


def _traces(settings: Settings, state: RolloutState) -> dict[str, str]:
    """The trace of each convicting request: what the trace store told names it, what the gateway told is found in the
    gateway's log, which has the caller's traceparent."""
    wanted = {one.request_id for one in state.analysis.convicting} if state.analysis else set()
    found = {one: one for one in wanted if _TRACE.match(one)}
    wanted -= set(found)
    try:
        log = gateway_settings(settings).access_log
    except SluiceError:
        return found
    for file in log.parent.glob(f"{log.name}*") if wanted else ():
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                request, parent = _ids(line)
                if request in wanted and parent:
                    found[request] = parent
    return found


def _ids(line: str) -> tuple[str, str]:
    """The request's and the trace's id in a line of the gateway's log; empty without."""
    try:
        entry = json.loads(line)
        parent = _TRACEPARENT.match(str(entry.get("traceparent")))
        return str(entry.get("request_id")), parent[1] if parent else ""
    except (ValueError, AttributeError):
        return "", ""


def _trace_pages(registry: MlflowRegistry, settings: Settings, traces: set[str]) -> dict[str, str]:
    """Where MLflow shows the traces, while they are kept there."""
    from sluice.registry import links

    if not traces or settings.traces.backend != "mlflow":
        return {}
    experiment = registry.experiment(settings.traces.experiment)
    return {one: links.trace_page(registry.uri, experiment, f"tr-{one}") for one in traces}


def _plain(text: str, limit: int = 1000) -> str:
    from sluice.infra.markdown import plain

    return plain(text, limit)
