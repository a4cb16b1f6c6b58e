"""The traffic player: plays users who ask and a reviewer who judges, so that the loop has something to learn from.

Plainly: no real person asks here. The questions are published ones, and the reviewer knows the published answer; a
thumb goes up when the answer shares enough words with it, otherwise down, with the published answer as correction.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from sluice.curation.trace_store import Feedback, TraceStore, add_feedback
from sluice.demo.assistant import Assistant, Reply
from sluice.evaluation.answer_metrics import token_f1
from sluice.infra.progress import Report, no_report
from sluice.rag.corpus import FaqItem

THUMB_UP_FROM = 0.5
"""Word overlap (token F1) with the published answer from which the reviewer is content."""
USERS = 40
QUIET_PAUSE_S = 1.0
"""Seconds between two questions of a user while nothing waits for traffic."""


@dataclass
class Tally:
    """What happened so far. `errors` are requests that a user saw fail; `by_release` counts answers by digest."""

    asked: int = 0
    errors: int = 0
    up: int = 0
    down: int = 0
    by_release: Counter[str] = field(default_factory=Counter)
    first_error: str = ""


@dataclass(frozen=True)
class Played:
    """One answered question with the reviewer's word on it."""

    question: str
    trace_id: str
    release: str
    up: bool
    correction: str


class TrafficPlayer:
    """Asks with `concurrency` users at once. Reviews are written in batches, once their traces have arrived."""

    def __init__(
        self, assistant: Assistant, store: TraceStore, *, concurrency: int = 8, session_prefix: str = "s"
    ) -> None:
        self._assistant = assistant
        self._store = store
        self._concurrency = concurrency
        self._prefix = session_prefix
        self._lock = threading.Lock()
        self._waiting: list[Played] = []
        self.tally = Tally()

    def play(self, questions: Sequence[FaqItem], journal: Path, report: Report = no_report) -> list[Played]:
        """Ask each question once and review it. `journal` keeps what was answered: an interrupted call goes on."""
        done = {one.question: one for one in _read(journal)}
        todo = [item for item in questions if item.id not in done]
        for one in done.values():
            self._count(one)
        self._waiting.extend(done.values())
        with journal.open("a", encoding="utf-8") as stream, ThreadPoolExecutor(self._concurrency) as pool:
            for finished in pool.map(self._one, enumerate(todo)):
                if finished is not None:
                    stream.write(json.dumps(asdict(finished), ensure_ascii=False) + "\n")
                    stream.flush()
                    done[finished.question] = finished
                report(len(done), len(questions), f"{self.tally.up} thumbs up, {self.tally.down} down with corrections")
        self.write_reviews(report, patience_s=60)
        return [done[item.id] for item in questions if item.id in done]

    def keep_playing(
        self, questions: Sequence[FaqItem], stop: threading.Event, busy: Callable[[], bool] = lambda: True
    ) -> None:
        """Ask on and on, reviewing as it goes, until `stop` is set. Runs in a thread of its own.

        While it is not `busy`, each user pauses between questions: the machine has something else to do.
        """
        reviewer = threading.Thread(target=self._review_until, args=(stop,), daemon=True)
        reviewer.start()
        numbers = count()

        def play() -> None:
            while not stop.is_set():
                with self._lock:
                    number = next(numbers)
                self._one((number, questions[number % len(questions)]))
                if not busy():
                    stop.wait(QUIET_PAUSE_S)

        players = [threading.Thread(target=play, daemon=True) for _ in range(self._concurrency)]
        for player in players:
            player.start()
        for player in (*players, reviewer):
            player.join()

    def write_reviews(self, report: Report = no_report, *, patience_s: float = 0.0) -> None:
        """Write the reviewer's words that wait. A trace that has not arrived keeps waiting, for `patience_s` in all."""
        deadline = time.monotonic() + patience_s
        while True:
            with self._lock:
                batch, self._waiting = self._waiting, []
            if not batch:
                return
            self._assistant.tracer.flush()
            items = [Feedback(one.trace_id, "reviewer", one.up, one.correction) for one in batch]
            missing = set(add_feedback(self._store, items, report=report).missing)
            with self._lock:
                self._waiting.extend(one for one in batch if one.trace_id in missing)
            if not missing or time.monotonic() > deadline:
                return
            time.sleep(0.5)

    def _one(self, numbered: tuple[int, FaqItem]) -> Played | None:
        number, item = numbered
        session = f"{self._prefix}-{number}"
        reply = self._assistant.ask(item.question, session=session, user=f"user-{number % USERS:02d}")
        if reply.error:
            with self._lock:
                self.tally.asked += 1
                self.tally.errors += 1
                self.tally.first_error = self.tally.first_error or reply.error
            return None
        played = review(item, reply)
        self._count(played)
        with self._lock:
            self._waiting.append(played)
        return played

    def _count(self, played: Played) -> None:
        with self._lock:
            self.tally.asked += 1
            self.tally.up += played.up
            self.tally.down += not played.up
            self.tally.by_release[played.release] += 1

    def _review_until(self, stop: threading.Event) -> None:
        while not stop.wait(1.0):
            self.write_reviews()
        self.write_reviews(patience_s=5)


def review(item: FaqItem, reply: Reply) -> Played:
    """The reviewer's word: content, or the published answer as correction."""
    content = token_f1(reply.text, item.answer) >= THUMB_UP_FROM
    return Played(item.id, reply.trace_id, reply.release, content, "" if content else item.answer)


def _read(journal: Path) -> list[Played]:
    """Finished lines of a journal; one torn by a kill is passed over, and its question asked again."""
    found = []
    for line in journal.read_text(encoding="utf-8").split("\n") if journal.is_file() else []:
        try:
            found.append(Played(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
