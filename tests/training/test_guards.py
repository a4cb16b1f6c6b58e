"""Guards: each fires and does not fire; a resumed run decides as the uninterrupted one; false alarms are rare."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.infra.errors import IntegrityError
from sluice.training.guards import ENOUGH, Guards, Verdict
from sluice.training.recipe_sections import GuardSection
from sluice.training.roll_backs import ROLL_BACKS_FILE, RollBacks


def _section(**guards: Any) -> GuardSection:
    return GuardSection.model_validate(guards)


def _settled(section: GuardSection | None = None, steps: int = 60, roll_backs: RollBacks | None = None) -> Guards:
    """Guards that have seen `steps` quiet steps: loss about 2, gradient norm about 1."""
    guards, noise = Guards(section or GuardSection(), roll_backs=roll_backs), random.Random(0)
    for step in range(1, steps + 1):
        assert guards.observe(step, 2 + noise.gauss(0, 0.05), 1 + noise.gauss(0, 0.1)).action == "go"
    return guards


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf), (-math.inf, 1.0), (2.0, math.nan)])
def test_a_number_that_is_none_is_skipped_from_the_first_step_on(loss: float, norm: float) -> None:
    verdict = Guards(GuardSection()).observe(1, loss, norm)
    assert (verdict.action, verdict.guard) == ("skip", "not_finite")
    assert "Step 1" in verdict.sentence
    assert "1 in a row, stop at 3" in verdict.sentence


def test_so_many_in_a_row_stop_and_one_good_step_between_starts_the_row_anew() -> None:
    guards = Guards(GuardSection())
    actions = [guards.observe(step, math.nan if step != 3 else 2.0, 1.0).action for step in range(1, 7)]
    assert actions == ["skip", "skip", "go", "skip", "skip", "stop"]
    stopped = guards.observe(7, math.nan, 1.0).sentence
    assert "steps 4 to 7" in stopped
    assert "learning_rate" in stopped
    assert "limit 3" in stopped


def test_a_gradient_spike_is_skipped_and_leaves_no_trace() -> None:
    guards = _settled()
    before = guards.state()
    verdict = guards.observe(61, 2.0, 25.0)
    assert (verdict.action, verdict.guard) == ("skip", "gradient_spike")
    assert "gradient norm 25 exceeds" in verdict.sentence
    assert "20 x" in verdict.sentence
    assert guards.state() == before | {"rows": {"gradient_spike": 1}}
    assert guards.observe(62, 2.0, 15.0).action == "go"


def test_a_loss_that_leaves_the_corridor_rolls_back_behind_the_update_before() -> None:
    verdict = _settled().observe(61, 4.0, 1.0)
    assert (verdict.action, verdict.guard, verdict.dropped) == ("roll_back", "loss_corridor", (60, 61))
    assert "before step 60" in verdict.sentence
    assert "roll-back 1, stop at 3" in verdict.sentence
    assert _settled().observe(61, 2.5, 1.0).action == "go"
    assert _settled().observe(61, 0.1, 1.0).action == "go"


def test_a_slow_climb_is_noticed_though_each_step_is_near_the_one_before() -> None:
    guards = _settled()
    assert any(guards.observe(60 + n, 2 * 1.01**n, 1.0).action == "roll_back" for n in range(1, 80))


def test_the_gravest_of_two_counts() -> None:
    assert _settled().observe(61, 9.0, 50.0).action == "roll_back"
    assert _settled(_section(gradient_spike={"policy": "stop"})).observe(61, 9.0, 50.0).guard == "gradient_spike"


@pytest.mark.parametrize("policy", ["off", "warn", "skip", "roll_back", "stop"])
@pytest.mark.parametrize(("guard", "loss", "norm"), [("gradient_spike", 2.0, 50.0), ("loss_corridor", 9.0, 1.0)])
def test_every_policy_of_every_guard(guard: str, policy: str, loss: float, norm: float) -> None:
    verdict = _settled(_section(**{guard: {"policy": policy}})).observe(61, loss, norm)
    assert verdict.action == ("go" if policy == "off" else policy)
    assert bool(verdict.sentence) == (policy != "off")
    assert bool(verdict.dropped) == (policy == "roll_back")


def test_nothing_but_numbers_is_judged_before_there_is_enough_to_judge_by() -> None:
    guards = Guards(GuardSection())
    first = guards.observe(1, 2.0, 1.0)
    assert first.action == "go"
    assert f"after {ENOUGH} accepted steps" in first.sentence
    for step in range(2, ENOUGH + 1):
        assert guards.observe(step, 50.0 if step == 7 else 2.0, 900.0 if step == 9 else 1.0) == Verdict()
    assert guards.observe(ENOUGH + 1, 50.0, 1.0).action == "roll_back"


def test_losses_without_any_deviation_have_a_corridor_of_some_width() -> None:
    guards = Guards(GuardSection())
    for step in range(1, 61):
        assert guards.observe(step, 0.001, 0.0).action == "go"
    assert guards.observe(61, 0.15, 0.001).action == "go"
    assert guards.observe(62, 0.5, 0.0).action == "roll_back"


def test_a_warning_is_not_said_at_every_step_and_never_stops_the_corridor() -> None:
    guards = _settled(_section(loss_corridor={"policy": "warn"}))
    actions = [guards.observe(60 + n, 6.0, 1.0).action for n in range(1, 41)]
    assert actions.count("warn") == 2
    assert actions.count("go") == 38


def test_roll_backs_survive_the_roll_back_and_stop_the_run_at_the_limit(tmp_path: Path) -> None:
    actions = []
    for step in (61, 64, 67):
        roll_backs = RollBacks(tmp_path)
        guards = Guards(GuardSection(), _settled().state(), roll_backs)
        verdict = guards.observe(step, 9.0, 1.0)
        actions.append(verdict.action)
        if verdict.action == "roll_back":
            roll_backs.record(verdict)
    assert actions == ["roll_back", "roll_back", "stop"]
    assert "roll-back 3 (limit 3)" in verdict.sentence


def test_replayed_rows_of_a_roll_back_are_left_out_and_judged_by_nobody(tmp_path: Path) -> None:
    roll_backs = RollBacks(tmp_path)
    roll_backs.record(_settled().observe(61, 9.0, 1.0))
    replayed = _settled(steps=59, roll_backs=RollBacks(tmp_path))
    before = replayed.state()
    for step in (60, 61):
        verdict = replayed.observe(step, 9.0, 1.0)
        assert verdict.action == "skip"
        assert "loss 9.0000 is above" in verdict.sentence
    assert replayed.state() == before
    assert replayed.observe(62, 2.0, 1.0).action == "go"


def test_roll_backs_merge_and_refuse_a_damaged_file(tmp_path: Path) -> None:
    ours, theirs = RollBacks(tmp_path), RollBacks()
    ours.record(Verdict("roll_back", "loss_corridor", "one", (4, 5)))
    theirs.record(Verdict("roll_back", "not_finite", "two", (8, 9)))
    theirs.merge(json.loads(json.dumps(ours.state())))
    theirs.merge(ours.state())
    assert [record["step"] for record in theirs.state()] == [5, 9]
    assert (theirs.count("loss_corridor"), theirs.dropped(4), theirs.dropped(6)) == (1, "one", None)
    (tmp_path / ROLL_BACKS_FILE).write_text("[{}]")
    with pytest.raises(IntegrityError, match=ROLL_BACKS_FILE.replace(".", r"\.")):
        RollBacks(tmp_path)


def test_validation_loss_has_patience_and_names_the_best_step() -> None:
    guards = Guards(GuardSection())
    losses = [2.0, 1.5, 1.6, 1.4, 1.5, math.nan, 1.4]
    verdicts = [guards.observe_validation(10 * n, loss) for n, loss in enumerate(losses, 1)]
    assert [verdict.action for verdict in verdicts] == ["go"] * 6 + ["stop"]
    assert "Step 70: validation loss 1.4000" in verdicts[-1].sentence
    assert "1.4000 of step 40" in verdicts[-1].sentence
    assert "limit 3" in verdicts[-1].sentence


def test_validation_policies() -> None:
    falling = {"patience": 2, "minimum_change": 0.1}
    for policy, expected in {"off": [], "warn": [3, 5], "stop": [3, 4, 5]}.items():
        guards = Guards(_section(validation_loss=falling | {"policy": policy}))
        spoke = [n for n in range(1, 6) if guards.observe_validation(n, 2 - 0.01 * n).action != "go"]
        assert spoke == expected


number = st.one_of(
    st.floats(0.5, 3.0), st.floats(0, 1e6), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 2.0, 2.0])
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(number, number, st.booleans()), min_size=1, max_size=70), st.integers(5, 30))
def test_resumed_at_every_step_the_verdicts_are_those_of_the_uninterrupted_run(
    steps: list[tuple[float, float, bool]], window: int
) -> None:
    section = _section(gradient_spike={"window": window, "factor": 3.0}, loss_corridor={"window": window, "width": 3.0})
    whole, state = Guards(section), None
    for step, (loss, norm, validates) in enumerate(steps, 1):
        resumed = Guards(section, state)
        assert resumed.observe(step, loss, norm) == whole.observe(step, loss, norm)
        if validates:
            assert resumed.observe_validation(step, loss) == whole.observe_validation(step, loss)
        state = json.loads(json.dumps(resumed.state(), allow_nan=False))
        assert state == whole.state()


def curve(seed: int, steps: int = 500) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm as in fine-tuning: a decay, a warm-up (with a bump in some), global batches of 4 to 64
    rows whose losses are log-normal, in some curves with a few rows much harder than the rest (14 nats at most)."""
    chance = random.Random(seed)
    start = chance.uniform(1.5, 11)
    end, decay, warmup = chance.uniform(0.02, 0.7 * start), chance.uniform(5, 200), chance.choice([1, 20, 100])
    rows, spread, jitter = chance.choice([4, 8, 32, 64]), chance.uniform(0.2, 0.7), chance.choice([0.1, 0.3, 0.5])
    share, hard, bump = chance.choice([0, 0.02, 0.1]), chance.uniform(2, 6), chance.choice([0, 0.15])
    progress = 0.0
    for step in range(1, steps + 1):
        rate = min(1.0, step / warmup)
        progress += rate
        left = math.exp(-progress / decay)
        mean = end + (start - end) * left
        mean += bump * mean * rate * math.exp(-(((step - warmup) / 30) ** 2))
        # Rows are drawn as log-normal; 16 of them stand for more.
        drawn = [
            min(
                14 / mean,
                chance.lognormvariate(-spread * spread / 2, spread) * (hard if chance.random() < share else 1),
            )
            for _ in range(min(rows, 16))
        ]
        batch = sum(drawn) / len(drawn)
        norm = (0.3 + 0.7 * left) * (1 + 2 * math.exp(-step / 10)) * batch * math.exp(chance.gauss(0, jitter))
        yield mean * batch, norm


CURVES = 200


def test_false_alarms_are_rare_on_200_simulated_runs() -> None:
    alarmed: dict[str, set[int]] = {"gradient_spike": set(), "loss_corridor": set()}
    for seed in range(CURVES):
        guards = Guards(GuardSection())
        for step, (loss, norm) in enumerate(curve(seed), 1):
            if (verdict := guards.observe(step, loss, norm)).action != "go":
                alarmed[verdict.guard].add(seed)
    print({guard: len(seeds) for guard, seeds in alarmed.items()})
    assert len(alarmed["gradient_spike"]) == 0
    assert len(alarmed["loss_corridor"]) <= 0.02 * CURVES


@pytest.mark.parametrize(
    ("loss_factor", "norm_factor", "within", "least"),
    [(1, 50, 1, 0.94), (1, 100, 1, 0.99), (3, 1, 50, 0.85), (4, 1, 50, 0.94), (6, 1, 50, 0.99)],
)
def test_injected_trouble_is_found(loss_factor: float, norm_factor: float, within: int, least: float) -> None:
    found = 0
    for seed in range(CURVES // 2):
        guards, at = Guards(GuardSection()), 60 + 3 * seed
        for step, (loss, norm) in enumerate(curve(seed, at + within - 1), 1):
            worse = (loss * loss_factor, norm * norm_factor) if step >= at else (loss, norm)
            if guards.observe(step, *worse).action != "go" and step >= at:
                found += 1
                break
    print(loss_factor, norm_factor, found)
    assert found >= least * CURVES / 2
