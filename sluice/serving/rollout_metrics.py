"""The rollouts as metrics for Prometheus, in its text format 0.0.4.

Times are exported as moments and not as ages, so that `time() - sluice_rollout_last_analysis_timestamp_seconds` is the
age also when whoever writes this has stopped. Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from sluice.serving.analysis import Verdict
from sluice.serving.rollout_facts import RolloutFacts
from sluice.serving.rollout_state import EventKind, Phase

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_OUTCOMES: dict[str, EventKind] = {"promoted": "promote", "failed": "fail", "withdrawn": "withdraw"}

Value = tuple[Mapping[str, str], float]


@dataclass(frozen=True)
class Family:
    """One metric with all its values, each with the labels that tell it from the others."""

    name: str
    kind: str
    help: str
    values: tuple[Value, ...]


def exposition(facts: RolloutFacts) -> str:
    """The text that Prometheus reads. Every value has the label `application`."""
    lines: list[str] = []
    for family in families(facts):
        if family.values:
            lines.append(f"# HELP {family.name} {_help(family.help)}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            for labels, value in family.values:
                lines.append(
                    f"{family.name}{{{_labels({'application': facts.application, **labels})}}} {_number(value)}"
                )
    return "\n".join([*lines, ""])


def families(facts: RolloutFacts) -> Iterator[Family]:
    """All metrics; those of a rollout only while there is one."""
    yield _gauge("sluice_rollout_gateway_up", "Whether the gateway tells who answers.", [({}, not facts.gateway)])
    if facts.routes is not None:
        routes = facts.routes
        shares = [
            ({"release": one.served_name, "role": role}, routes.share(one.release) / 100)
            for one, role in zip(routes.targets(), ("stable", "canary"), strict=False)
        ]
        yield _gauge("sluice_rollout_share_ratio", "Share of the sessions that a release answers.", shares)
        yield _gauge(
            "sluice_rollout_gateway_drift", "Ways in which the data plane differs from what was decided.",
            [({}, len(facts.drift))],
        )  # fmt: skip
    yield _gauge("sluice_rollout_lease_held", "Whether a controller is at work.", [({}, facts.lease.held)])
    yield _gauge("sluice_rollout_fencing_token", "Token of the latest controller.", [({}, facts.lease.token)])
    yield _gauge("sluice_rollout_under_way", "Whether a rollout is under way.", [({}, facts.under_way)])
    yield _gauge("sluice_rollout_waiting", "Rollouts that wait for their turn.", [({}, len(facts.lease.waiting))])
    yield _gauge(
        "sluice_rollout_cool_down_timestamp_seconds", "Until when no other rollout begins.",
        [({}, facts.cool_down.until)] if facts.cool_down and not facts.cool_down.ended_by else [],
    )  # fmt: skip
    # By events, which only grow: a withdrawn rollout may begin again.
    told = Counter(event.kind for state in facts.states for event in state.events)
    outcomes = [({"outcome": outcome}, told[kind]) for outcome, kind in _OUTCOMES.items()]
    yield _counter("sluice_rollouts_total", "Rollouts that ended, by how.", outcomes)
    rollbacks = Family(
        "sluice_rollout_rollbacks_total", "counter", "Times that all users went back to stable.",
        (({}, told["rollback"]),),
    )  # fmt: skip
    yield rollbacks
    yield _gauge("sluice_rollout_events_undelivered", "Events that wait for the webhook.", [({}, facts.undelivered)])
    yield from _current(facts)


def _current(facts: RolloutFacts) -> Iterator[Family]:
    """The rollout under way, or the latest."""
    state = facts.rollout
    if state is None:
        return
    release = {"release": state.target.served_name}
    phases = [({**release, "phase": phase}, state.phase == phase) for phase in get_args(Phase)]
    yield _gauge("sluice_rollout_phase", "1 for the phase that the rollout is in.", phases)
    yield _gauge("sluice_rollout_step", "Step that the rollout is in, from 0.", [(release, state.step)])
    yield _gauge("sluice_rollout_paused", "Whether a person paused it.", [(release, state.paused)])
    if facts.analysed is not None:
        yield _gauge(
            "sluice_rollout_last_analysis_timestamp_seconds", "When its figures were last looked at.",
            [(release, facts.analysed)],
        )  # fmt: skip
    if state.analysis is None:
        return
    results = state.analysis.metrics
    samples = [
        ({**release, "metric": one.name, "role": role}, count)
        for one in results
        for role, count in (("canary", one.canary_n), ("stable", one.stable_n))
    ]
    yield _gauge("sluice_rollout_samples", "Values compared since the rollout began.", samples)
    verdicts = [
        ({**release, "metric": one.name, "verdict": verdict}, one.verdict == verdict)
        for one in results
        for verdict in get_args(Verdict)
    ]
    yield _gauge("sluice_rollout_metric_verdict", "1 for a metric's verdict.", verdicts)
    for name, help_text in (
        ("estimate", "Canary against stable: a difference, or for times and costs a ratio."),
        ("low", "Lower end of its always-valid interval."),
        ("high", "Upper end of its always-valid interval."),
    ):
        known = [
            ({**release, "metric": one.name}, value) for one in results if (value := getattr(one, name)) is not None
        ]
        yield _gauge(f"sluice_rollout_metric_{name}", help_text, known)
    limits = [({**release, "metric": one.name}, one.bound_margin) for one in results]
    yield _gauge("sluice_rollout_metric_margin", "It passes when its interval ends below.", limits)


def _gauge(name: str, help_text: str, values: Iterable[tuple[Mapping[str, str], float]]) -> Family:
    return Family(name, "gauge", help_text, tuple(values))


def _counter(name: str, help_text: str, values: Iterable[tuple[Mapping[str, str], float]]) -> Family:
    return Family(name, "counter", help_text, tuple(values))


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _help(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if float(value).is_integer() else repr(float(value))
