"""Invariants 1, 2, 3, 6 and 8 in histories of actors, machines, faults and races, judged by the bare ledger.

The default is fifty histories; `SLUICE_HISTORIES=10000 pytest -s` runs ten thousand and prints what happened there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from sluice.infra.errors import ConflictError, GateRefused, UnavailableError
from sluice.provenance import artifacts, ledger, lineage_facts, step_records
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.attestation import Signer
from sluice.provenance.canonical import canonical_json, digest_bytes, short
from sluice.provenance.ledger import Ledger, LedgerEntry
from sluice.provenance.lineage import LineageIndex
from sluice.provenance.lineage_facts import LINEAGE_FILE
from sluice.provenance.releases import (
    ReleaseState,
    promote,
    record_approval,
    record_decision,
    record_failure,
    record_rejection,
    record_rollback,
    record_rollout_step,
)
from sluice.provenance.step_records import read_records, record_key
from sluice.provenance.steps import StepKey, StepOutput, StepRunner
from tests.provenance.judge import Judge
from tests.support.faulty_store import FAULTS, FaultKind, FaultyStore, ProcessDied

HISTORIES = int(os.environ.get("SLUICE_HISTORIES", "50"))
ACTORS = ("ann", "bob", "policy")
CODE = digest_bytes(b"code")
BASE, SYNTHETIC = digest_bytes(b"base"), digest_bytes(b"a")
KINDS = ("decide", "approve", "reject", "roll out", "promote", "promote as seen", "roll back", "fail")


@dataclass(frozen=True)
class Action:
    """Something that an actor does to releases, named by their place in the list of those that are known."""

    kind: str
    release: int
    to: int
    verdict: Any
    hours: int
    weight: float
    approvers: int = 1
    spelling: Any = str
    checked: bool = True


actions = st.builds(
    Action,
    kind=st.sampled_from(KINDS),
    release=st.integers(0, 2),
    to=st.integers(0, 2),
    verdict=st.sampled_from(["pass", "pass", "pass", "fail", "inconclusive", "pending"]),
    hours=st.sampled_from([0, 1, 24, 48]),
    weight=st.sampled_from([0, 5, 25, 100]),
    approvers=st.sampled_from([1, 1, 2]),
    spelling=st.sampled_from([str, str.upper]),
    checked=st.sampled_from([True, True, False]),
)
actors = st.sampled_from(ACTORS)
faults = st.sampled_from(FAULTS)
windows = st.sampled_from([frozenset({0, 1}), frozenset({1, 2, 3}), frozenset({3})])
machines = st.integers(0, 1)


class Histories(RuleBasedStateMachine):
    """One installation: three actors at one ledger, two machines that train, and everything that may go wrong."""

    signer: Signer
    told: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.store = FaultyStore(self.folder / "objects")
        self.ledgers = {actor: self.open_ledger() for actor in ACTORS}
        self.observer = self.open_ledger()
        self.entries: list[LedgerEntry] = []
        self.judge = Judge()
        self.now = datetime(2026, 3, 1, tzinfo=UTC)
        self.releases = [BASE, SYNTHETIC]
        self.seen: dict[str, str | None] = dict.fromkeys(ACTORS)
        self.count = 0
        self.recorded: dict[str, str] = {}
        self.begun: dict[frozenset[int], None] = {}
        self.told["histories"] += 1

    def open_ledger(self) -> Ledger:
        return Ledger(self.store, "faq", self.signer)

    # The ledger

    def observe(self) -> None:
        """Read the chain whole, judge what is new, and compare our view with the judge's."""
        entries = self.observer.entries()
        added = entries[len(self.entries) :]
        for entry in added:
            self.judge.see(entry, self.now)
        assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
        self.entries = entries
        state = ReleaseState(entries)
        assert state.champion() == self.judge.champion
        for release in self.releases:
            assert state.weight(release) == self.judge.weight[release]
            assert state.failed(release) == (release in self.judge.failed)
        for entry in added:
            if entry.kind in ("rollout", "promotion"):
                about = self.judge.decision.get(entry.body["release"])
                self.told["let through by two"] += about is not None and about.body["approvers"] == 2
        self.told["entries"] += len(added)

    def expected(self, actor: str, action: Action) -> str | None:
        return self.seen[actor] if action.kind == "promote as seen" else self.judge.champion

    def perform(self, actor: str, action: Action, number: int, expected: str | None) -> LedgerEntry:
        books = self.ledgers[actor]
        release, to = (self.releases[index % len(self.releases)] for index in (action.release, action.to))
        if action.kind == "decide":
            return record_decision(
                books,
                adapter=release,
                verdict="fail" if action.verdict == "pending" else action.verdict,
                report=digest_bytes(str(number).encode()),
                expires=(self.now + timedelta(hours=action.hours)).isoformat(),
                holdout=None,
                champion=expected,
                approvers=action.approvers,
                actor=actor,
            )
        if action.kind == "approve":
            name = action.spelling(actor)
            account = name if action.checked else ""
            return record_approval(books, adapter=release, approver=name, account=account, now=self.now)
        if action.kind == "reject":
            return record_rejection(books, adapter=release, approver=actor, reason=f"no {number}")
        if action.kind == "roll out":
            return record_rollout_step(
                books,
                release=release,
                step=number,
                weight=action.weight,
                verdict=action.verdict,
                analysis=None,
                actor=actor,
                now=self.now,
            )
        if action.kind in ("promote", "promote as seen"):
            return promote(books, release=release, expected_champion=expected, actor=actor, now=self.now)
        if action.kind == "roll back":
            return record_rollback(books, release=release, to=to, reason=f"slow {number}", actor=actor)
        return record_failure(books, release=release, reason=f"bad {number}", actor=actor)

    def attempt(self, actor: str, action: Action, number: int, expected: str | None) -> tuple[str, list[LedgerEntry]]:
        """Do it; how it ended, and what this actor has in the ledger of it. `expected` is the champion it knows of."""
        self.told["steps"] += 1
        before = len(self.entries)
        ended, entry, told = "done", None, ""
        try:
            entry = self.perform(actor, action, number, expected)
        except (GateRefused, ConflictError) as error:
            ended, told = "refused", error.message
        except (ProcessDied, UnavailableError):
            ended = "broken off"
            self.ledgers[actor] = self.open_ledger()
        self.observe()
        if "was to replace" in told:
            self.told["promotions lost"] += 1
            assert short(self.judge.champion) in told if self.judge.champion else "not chosen" in told, "told who won"
        mine = [one for one in self.entries[before:] if one.actor.lower() == actor]
        assert ended != "refused" or not mine, "what is refused changes nothing"
        assert entry is None or entry.digest in {one.digest for one in self.entries}, "what was acknowledged is there"
        return ended, mine

    def next(self) -> int:
        self.count += 1
        return self.count

    @rule(actor=actors, action=actions)
    def act(self, actor: str, action: Action) -> None:
        self.attempt(actor, action, self.next(), self.expected(actor, action))

    @rule(actor=actors, release=st.integers(0, 2))
    def admit(self, actor: str, release: int) -> None:
        for kind in ("decide", "approve"):
            self.act(actor, Action(kind, release, 0, "pass", 24, 0))

    @rule(pair=st.permutations(ACTORS), release=st.integers(0, 2), checked=st.booleans())
    def admit_by_two(self, pair: list[str], release: int, checked: bool) -> None:
        """Half of it lets nothing through, and neither does the same person again."""
        one, two = pair[:2]
        target = self.releases[release % len(self.releases)]
        self.act(one, Action("decide", release, 0, "pass", 24, 0, approvers=2))
        for action in (
            Action("approve", release, 0, "pass", 0, 0),
            Action("approve", release, 0, "pass", 0, 0, 1, str.upper),
        ):
            self.act(one, action)
            before = self.judge.weight[target]
            ended, _ = self.attempt(one, Action("roll out", release, 0, "pending", 0, 5), self.next(), None)
            assert ended == "refused" or before >= 5
        self.act(two, Action("approve", release, 0, "pass", 0, 0, checked=checked))
        self.act(two, Action("roll out", release, 0, "pending", 0, 5))

    @rule(actor=actors)
    def look(self, actor: str) -> None:
        """What a reader saw may be old when it acts on it."""
        self.seen[actor] = ReleaseState(self.ledgers[actor].entries()).champion()

    @rule(actor=actors, action=actions, fault=faults)
    def act_and_break_off(self, actor: str, action: Action, fault: FaultKind) -> None:
        """Invariant 3: after any fault the same action may be done again, and counts once."""
        number, expected = self.next(), self.expected(actor, action)
        self.store.arm(fault, 1)
        ended, mine = self.attempt(actor, action, number, expected)
        self.told[fault] += self.store.disarm()
        if ended == "broken off":
            ended, more = self.attempt(actor, action, number, expected)
            mine += more
            assert ended == "done" or (ended == "refused" and not mine)
        assert len(mine) <= 1, "done again, and counted twice"

    @rule(actor=actors, action=actions, others=st.lists(st.tuples(actors, actions), min_size=1, max_size=2))
    def race(self, actor: str, action: Action, others: list[tuple[str, Action]]) -> None:
        """Others act after this actor has read the ledger and before it writes."""

        def intrude() -> None:
            for other, intrusion in others:
                if other != actor:
                    self.act(other, intrusion)

        self.store.arm("race", 1, intrude)
        self.act(actor, action)
        self.told["race"] += self.store.disarm()

    @rule(first=actors, releases=st.permutations([0, 1, 2]))
    def race_to_promote(self, first: str, releases: list[int]) -> None:
        """Two candidates, both admitted, both promoted over the same champion at once: one wins at most."""
        one, two = (Action("promote", release, 0, "pass", 0, 0) for release in releases[:2])
        for action in (one, two):
            self.admit(first, action.release)
        expected, before = self.judge.champion, len(self.entries)
        second = next(actor for actor in ACTORS if actor != first)
        ended: list[str] = []
        self.store.arm("race", 1, lambda: ended.append(self.attempt(second, two, self.next(), expected)[0]))
        ended.append(self.attempt(first, one, self.next(), expected)[0])
        self.told["race"] += self.store.disarm()
        won = [entry for entry in self.entries[before:] if entry.kind == "promotion"]
        assert len(won) == ended.count("done") <= 1, "invariant 2"
        self.told["promotions raced"] += len(won) == 1 and len(ended) == 2

    @rule(hours=st.integers(1, 30))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    # Steps

    def train(self, machine: int, window: frozenset[int]) -> str:
        """Harvest, curate and train; the adapter. What it makes differs from run to run: only one may count."""
        self.begun[window] = None
        stored = ArtifactStore(self.store, self.folder / f"cache-{machine}")
        runner = StepRunner(self.store, stored, self.signer, self.folder / f"machine-{machine}")

        def once(name: str, inputs: dict[str, str], files: Callable[[], dict[str, bytes]]) -> str:
            key = StepKey(name, CODE, {"window": sorted(window)}, inputs)

            def work(_: Path) -> StepOutput:
                assert self.store.head(record_key(key.digest, 0)) is None, "invariant 3: computed a finished step"
                return StepOutput({"made": stored.put_files(files(), name).digest})

            record, _ = runner.run(key, work)
            assert self.recorded.setdefault(key.digest, record.statement) == record.statement, "one record a key"
            return record.output.artifacts["made"]

        records = once("records", {}, lambda: _named(window, self.next()))
        dataset = once("dataset", {"records": records}, lambda: _named(_kept(window), self.next()))
        return once("adapter", {"dataset": dataset}, lambda: {"weights": f"{self.next()}".encode()})

    def know(self, adapter: str) -> None:
        if len(self.releases) < 3:
            self.releases.append(adapter)

    @rule(machine=machines, window=windows)
    def work(self, machine: int, window: frozenset[int]) -> None:
        self.told["steps"] += 1
        self.know(self.train(machine, window))

    @rule(machine=machines, other=machines, window=windows, fault=faults, nth=st.integers(1, 13))
    def work_and_break_off(self, machine: int, other: int, window: frozenset[int], fault: FaultKind, nth: int) -> None:
        """Invariant 3: after any fault the work goes on, here or elsewhere."""
        self.told["steps"] += 1
        self.store.arm(fault, nth)
        try:
            self.train(machine, window)
        except (ProcessDied, UnavailableError):
            pass
        self.told[fault] += self.store.disarm()
        self.leases_run_out()
        self.know(self.train(other, window))

    @rule(machine=machines, window=windows, nth=st.integers(1, 13))
    def race_for_a_step(self, machine: int, window: frozenset[int], nth: int) -> None:
        """Another machine does the same work while this one is between two of its writes."""
        self.told["steps"] += 1

        def intrude() -> None:
            self.leases_run_out()
            self.train(1 - machine, window)

        self.store.arm("race", nth, intrude)
        self.know(self.train(machine, window))
        self.told["race"] += self.store.disarm()

    def leases_run_out(self) -> None:
        """A dead or sleeping worker holds its lease no longer than that lasts."""
        shutil.rmtree(self.store.root / "leases", ignore_errors=True)

    def teardown(self) -> None:
        """Everything that was begun converges, and every trace is found in all that used it (invariants 3 and 6)."""
        try:
            self.leases_run_out()
            adapters = {window: self.train(0, window) for window in self.begun}
            self.observe()
            if not adapters:
                return
            assert len(list(read_records(self.store))) == len(self.recorded) == 3 * len(adapters)
            index = LineageIndex(self.store, self.folder / "lineage")
            # One that curation leaves out, and one that it keeps.
            for trace in (0, 1):
                found = {node.digest: node.kind for node in index.descendants(_trace(trace)).walk()}
                used = {adapter for window, adapter in adapters.items() if trace in _kept(window)}
                assert found.keys() & set(adapters.values()) == used, "invariant 6"
                kinds = Counter(found.values())
                assert kinds["records"] >= len([window for window in adapters if trace in window]), "invariant 6"
            self.told["adapters"] += len(adapters)
        finally:
            shutil.rmtree(self.folder)


def _trace(number: int) -> str:
    return f"{number:032x}"


def _kept(window: frozenset[int]) -> frozenset[int]:
    """What curation keeps of a window."""
    return frozenset(number for number in window if number % 3)


def _named(window: frozenset[int], salt: int) -> dict[str, bytes]:
    traces = [_trace(number) for number in sorted(window)]
    return {LINEAGE_FILE: canonical_json({"traces": traces, "scores": []}), "content": f"{salt}".encode()}


class OneByOne(Executor):
    """A thread pool without threads: a history is the same each time, and thousands of them take no hour."""

    def __init__(self, max_workers: int | None = None) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except BaseException as error:  # noqa: BLE001  (as a real pool: raised where the result is asked for)
            future.set_exception(error)
        return future


@pytest.mark.timeout(7200)
def test_any_history_keeps_the_invariants(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (artifacts, ledger, lineage_facts, step_records):
        if hasattr(module, "ThreadPoolExecutor"):
            monkeypatch.setattr(module, "ThreadPoolExecutor", OneByOne)
    told: Counter[str] = Counter()
    Histories.signer, Histories.told = signer, told
    began = time.monotonic()
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=20,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        ),
    )
    print(f"{time.monotonic() - began:.0f} s:", ", ".join(f"{count} {name}" for name, count in sorted(told.items())))
    # What never came to pass was not tested.
    for name in (*FAULTS, "race", "promotions raced", "promotions lost", "adapters", "let through by two"):
        assert told[name] > 0, f"{name}: {told}"
