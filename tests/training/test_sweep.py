"""Sweeps: the grid as it was asked for, and successive halving that never keeps a worse trial over a better one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.infra.errors import InputError, StepFailed
from sluice.training.recipe import load_recipe
from sluice.training.sweep import MOST_TRIALS, SweepPlan, kept, plan_sweep, rung_steps, survivors

LOSSES = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
KEEP = st.floats(0.01, 0.99)


def test_the_grid_is_all_pairs_in_order_and_survives_its_text() -> None:
    plan = plan_sweep(
        "tiny",
        ["optimizer.learning_rate=1e-3,3e-3", 'lora.target_modules=["q_proj"],["q_proj","v_proj"]'],
        overrides={"schedule.max_steps": 16},
    )
    assert [trial.label for trial in plan.trials] == [
        'learning_rate=0.001 target_modules=["q_proj"]',
        'learning_rate=0.001 target_modules=["q_proj", "v_proj"]',
        'learning_rate=0.003 target_modules=["q_proj"]',
        'learning_rate=0.003 target_modules=["q_proj", "v_proj"]',
    ]
    assert plan.trials[1].overrides == {
        "schedule.max_steps": 16,
        "optimizer.learning_rate": 1e-3,
        "lora.target_modules": ["q_proj", "v_proj"],
    }
    assert (plan.rungs, plan.max_steps) == ((4, 8), 16)
    # Four to step 4, two to step 8, one to the end.
    assert plan.steps == 4 * 4 + 2 * 4 + 1 * 8
    assert SweepPlan.from_text(plan.to_text()) == plan
    assert load_recipe("tiny").with_overrides(plan.trials[0].overrides).schedule.max_steps == 16


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (["lora.rank=4"], {}, "The grid has 1 trial"),
        ([f"seed={','.join(map(str, range(MOST_TRIALS + 1)))}"], {}, "a sweep has 2 to 32"),
        (["lora.rank=4,4"], {}, "are the same recipe"),
        (["lora.rank"], {}, "is not FIELD=VALUE"),
        (["lora.rank=4,,8"], {}, "is not FIELD=VALUE"),
        (["lora.rank=4,8", "lora.rank=2,4"], {}, "names a field twice"),
        (["lora.rang=4,8"], {}, "lora.rang"),
        (["lora.rank=4,none"], {}, "lora.rank"),
        (["schedule.max_steps=4,8"], {}, "different schedule.max_steps"),
        (["lora.rank=4,8"], {"keep": 1.0}, "--keep 1.0"),
        (["lora.rank=4,8"], {"rungs": -1}, "--rungs -1"),
        (["lora.rank=4,8"], {"overrides": {"lora.rank": 2}}, "both swept and set"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_told(values: list[str], options: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_sweep("tiny", values, **options)  # type: ignore[arg-type]
    assert says in str(caught.value)


@given(st.lists(LOSSES, min_size=1, max_size=40), KEEP)
def test_no_trial_goes_on_while_a_better_one_is_stopped(losses: list[float | None], keep: float) -> None:
    numbered = dict(enumerate(losses, start=1))
    finite = {n: loss for n, loss in numbered.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        with pytest.raises(StepFailed):
            survivors(numbered, keep)
        return
    alive = survivors(numbered, keep)
    assert set(alive) <= set(finite)
    assert len(alive) == min(kept(len(losses), keep), len(finite))
    assert all(finite[n] <= finite[m] for n in alive for m in finite.keys() - set(alive))
    assert alive[0] == min(finite, key=lambda n: (finite[n], n))
    # The order in which the results came in means nothing.
    assert survivors(dict(reversed(numbered.items())), keep) == alive


@given(st.integers(1, 5000), KEEP)
def test_a_rung_keeps_the_share_and_never_nobody(trials: int, keep: float) -> None:
    assert 1 <= kept(trials, keep) <= trials
    assert keep * trials - 1e-6 <= kept(trials, keep) < keep * trials + 1


@given(st.integers(1, 100_000), st.integers(0, 8), KEEP)
def test_rungs_rise_and_end_before_the_end(max_steps: int, rungs: int, keep: float) -> None:
    steps = rung_steps(max_steps, rungs, keep)
    assert list(steps) == sorted(set(steps))
    assert all(0 < step < max_steps for step in steps)
    assert len(steps) <= rungs


@given(st.lists(st.floats(0, 10), min_size=2, max_size=32), st.integers(0, 4), KEEP)
def test_a_trial_that_always_leads_wins_and_nobody_trains_more_than_the_whole_grid(
    losses: list[float], rungs: int, keep: float
) -> None:
    plan = plan_sweep("tiny", [f"seed={','.join(str(n) for n in range(len(losses)))}"], rungs=rungs, keep=keep)
    alive = tuple(range(1, len(losses) + 1))
    for _ in plan.rungs:
        alive = survivors({n: losses[n - 1] for n in alive}, keep)
    assert min(range(1, len(losses) + 1), key=lambda n: (losses[n - 1], n)) in alive
    assert plan.max_steps <= plan.steps <= len(losses) * plan.max_steps
