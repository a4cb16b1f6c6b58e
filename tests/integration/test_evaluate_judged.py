"""An evaluation with RAGAS and a judge: what was judged once is known, and a dead judge makes nothing pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.scripted_judge import Reply as Judgement
from benchmarks.scripted_judge import scripted_judge
from sluice.evaluation.items import ITEMS_FILE, Item, write_items
from sluice.evaluation.judge_client import BUDGET_SPENT
from sluice.evaluation.scores import read_scores
from sluice.evaluation.stopping import read_stopping
from sluice.infra.settings import JudgeSettings
from tests.components.scripted_releases import RIGHT, SUITE, Place, place, server
from tests.evaluation.chat_server import ChatServer

__all__ = ["place", "server"]

JUDGED = SUITE + "sequential: {batch: 10}\njudged: {metrics: [judged.faithfulness], limit: 20, max_tokens: 256}\n"


@pytest.fixture
def judged(place: Place, server: ChatServer) -> Iterator[Any]:
    folder = place.workspace.settings.home / "with-contexts"
    items = [
        Item(f"item-{n:02}", f"q {n}", RIGHT, ({"role": "user", "content": f"q {n}"},), (f"{RIGHT}. It is green.",))
        for n in range(30)
    ]
    write_items(folder / ITEMS_FILE, items)
    place.prompts = place.workspace.artifacts.put_directory(folder, "prompts").digest
    place.suite = place.write(JUDGED)
    ill: set[str] = set()
    with scripted_judge(lambda *_: Judgement(drop=True) if ill else Judgement()) as judge:
        chosen = JudgeSettings(url=judge.url, model="judge", model_digest="r1")
        settings = place.workspace.settings.model_copy(update={"judge": chosen})
        object.__setattr__(place.workspace, "settings", settings)
        yield place, judge, ill


def test_both_sides_are_judged_once_and_only_the_first_items(judged: Any) -> None:
    at, judge, ill = judged
    champion, first = at.release("champion", 50), at.release("first", 50)
    made, running = at.evaluate(first, champion)
    folder = at.workspace.folder(made)
    columns = [read_scores(folder / side).columns["judged.faithfulness"] for side in ("candidate", "champion")]
    assert [len(one.values) for one in columns] == [20, 20]
    assert columns[0].judge == columns[1].judge
    assert columns[0].sequential
    stopping = read_stopping(folder)
    assert (stopping.asked, stopping.judge_requests) == (30, 80)
    # An uncalibrated judge never gates, so the looks speak of the answers alone.
    assert "Faithfulness" not in stopping.reason
    # What was judged is known, whichever side it is on; only other answers are judged.
    known = len(judge.requests)
    assert 0 < known <= 80
    at.evaluate(champion, first)
    assert len(judge.requests) == known
    ill.add("dead")
    third = at.release("third", 0)
    at.workspace.evaluation_cache.unlink()
    broken, running = at.evaluate(third, champion)
    causes = read_scores(at.workspace.folder(broken) / "candidate").columns["judged.faithfulness"].causes
    assert {cause.removesuffix(BUDGET_SPENT) for cause in causes.values()} <= {"connection", "judge unreachable"}
    assert len(causes) == 20
    assert running.state.values["lost"] == "", "a metric that may not gate is not waited for"
