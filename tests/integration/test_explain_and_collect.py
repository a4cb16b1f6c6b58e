"""`sluice why`, `diff` and `gc` over a finished loop, as a user calls them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.installation import Installation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]


def test_a_step_of_the_loop_says_why_it_ran(installation: Installation, loop: Any) -> None:
    (train,) = installation.json("why", "train")
    assert train["outcome"] in ("computed", "hit")
    assert train["key"]["inputs"]
    assert installation.json("why", train["digest"])[0]["key"] == train["key"]
    assert installation.json("why", "no-such-step", code=2)["error"].startswith("STEP = 'no-such-step' names no step")


def test_a_run_compared_with_itself_differs_in_nothing(installation: Installation, loop: Any) -> None:
    (run, *_) = [run["id"] for run in installation.json("runs") if run["pipeline"] == "retrain"]
    assert installation.json("diff", run, run)["tasks"] == []


def test_nothing_of_a_young_loop_would_go_and_the_champion_says_why_it_stays(
    installation: Installation,
    loop: Any,
) -> None:
    plan = installation.json("gc")
    assert (plan["artifacts"], plan["blobs"]) == ([], [])
    reasons = " ".join(plan["kept"])
    # The live index and the holdout stay too, for the first of several reasons.
    for reason in ("a route of the gateway", "what decided on a live release of assistant", "behind: "):
        assert reason in reasons
    done = installation.json("gc", "--delete", plan["digest"])
    assert (done["artifacts"], done["blobs"]) == (0, 0)
