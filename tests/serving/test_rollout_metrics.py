"""The rollout as Prometheus reads it."""

from __future__ import annotations

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sluice.serving.rollout_metrics import exposition
from sluice.serving.rollout_store import CoolDown
from tests.serving.rollouts import BEGUN, CANARY, STABLE, event, facts, failed, holding, promoted

_LINE = re.compile(r'^([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (\S+)$')
_LABEL = re.compile(r'([a-z]+)="((?:[^"\\]|\\.)*)"')


def read(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The text format, read strictly: HELP and TYPE before a metric's values, all values of a metric together, none
    twice, the last line ended."""
    assert text.endswith("\n")
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    kinds: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in kinds
        elif line.startswith("# TYPE "):
            _, _, named, kinds[name] = line.split()
            assert named == name
        else:
            match = _LINE.match(line)
            assert match, line
            assert match[1] == name
            key = name, frozenset(_LABEL.findall(match[2]))
            assert key not in found
            found[key] = float(match[3])
    for name, kind in kinds.items():
        assert (kind == "counter") == name.endswith("_total")
    return found


def value(text: str, name: str, **labels: str) -> float | None:
    wanted = frozenset({"application": "assistant", **labels}.items())
    return read(text).get((f"sluice_{name}", wanted))


def test_the_rollout_under_way() -> None:
    text = exposition(facts(holding(), analysed=BEGUN + 40))
    canary = CANARY.served_name
    assert value(text, "rollout_share_ratio", release=canary, role="canary") == 0.3
    assert value(text, "rollout_share_ratio", release=STABLE.served_name, role="stable") == 0.7
    assert value(text, "rollout_phase", release=canary, phase="holding") == 1
    assert value(text, "rollout_phase", release=canary, phase="baking") == 0
    assert value(text, "rollout_samples", release=canary, metric="error_rate", role="canary") == 7
    assert value(text, "rollout_metric_verdict", release=canary, metric="error_rate", verdict="inconclusive") == 1
    assert value(text, "rollout_metric_high", release=canary, metric="error_rate") == 0.21
    assert value(text, "rollout_metric_high", release=canary, metric="judge_score") is None
    assert value(text, "rollout_last_analysis_timestamp_seconds", release=canary) == BEGUN + 40
    assert (value(text, "rollout_lease_held"), value(text, "rollout_fencing_token")) == (1, 7)


def test_counters_only_grow() -> None:
    withdrawn = holding(phase="withdrawn", events=(*holding().events, event(20, "withdraw", 0)))
    again = replace(withdrawn, phase="probing", events=(*withdrawn.events, event(30, "start", 0)))
    for state in (withdrawn, again):
        assert value(exposition(facts(state)), "rollouts_total", outcome="withdrawn") == 1
    both = exposition(facts(failed(), states=(promoted(), failed())))
    assert value(both, "rollouts_total", outcome="promoted") == value(both, "rollouts_total", outcome="failed") == 1
    assert value(both, "rollout_rollbacks_total") == 1


def test_without_a_rollout_or_a_gateway() -> None:
    text = exposition(facts())
    assert value(text, "rollout_under_way") == 0
    assert value(text, "rollout_share_ratio", release=STABLE.served_name, role="stable") == 1
    away = exposition(facts(routes=None, gateway="it does not answer"))
    assert value(away, "rollout_gateway_up") == 0
    assert "share_ratio" not in away


def test_a_cool_down_that_somebody_ended_is_over() -> None:
    cool_down = CoolDown(CANARY.release, "slow", BEGUN + 100)
    name = "rollout_cool_down_timestamp_seconds"
    assert value(exposition(facts(cool_down=cool_down)), name) == BEGUN + 100
    assert value(exposition(facts(cool_down=replace(cool_down, ended_by="ann", ended_why="mended"))), name) is None


@given(st.text())
def test_any_text_in_a_label_stays_one_line(text: str) -> None:
    from sluice.serving.rollout_metrics import _escaped

    escaped = _escaped(text)
    assert "\n" not in escaped
    back = re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), escaped)
    assert back == text
