"""The guided loop, stage by stage. Each stage is a step with a key: done once, it is not done again.

A stage that was killed goes on where it was: traffic from its journal, pipelines from their steps, a release from the
rollout's state.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.text import Text

from sluice.components.champion import current_champion
from sluice.components.holdout import frozen_holdout
from sluice.components.index_alias import current_index
from sluice.components.workspace import Workspace
from sluice.curation.holdout import read_holdout
from sluice.curation.trace_store import open_trace_store
from sluice.demo.assistant import Assistant
from sluice.demo.plan import Plan
from sluice.demo.player import TrafficPlayer
from sluice.infra.errors import GateRefused, SluiceError, UnavailableError
from sluice.infra.progress import Report
from sluice.pipelines.approvals import find_candidate, override, record, registry_of, take_over
from sluice.pipelines.runs import Run, start_run
from sluice.pipelines.tasks import ROOMS as TASK_ROOMS
from sluice.pipelines.view import follow
from sluice.provenance.canonical import Json, digest_json, short
from sluice.provenance.code import code_digest
from sluice.provenance.releases import read_state
from sluice.provenance.steps import StepKey, StepOutput
from sluice.rag.corpus import FaqItem, load_faq
from sluice.registry.versions import set_tag

ROOMS = ("demo", "pipelines", *TASK_ROOMS)
APPROVER = "policy:demo"


@dataclass
class Loop:
    """One guided loop in a terminal. `bar` makes a progress report for a stage that is no pipeline."""

    workspace: Workspace
    plan: Plan
    console: Console
    bar: Callable[[str], AbstractContextManager[Report]]

    def stage(
        self,
        name: str,
        parameters: Mapping[str, Json],
        inputs: Mapping[str, str],
        work: Callable[[Path], StepOutput],
        rooms: tuple[str, ...] = ROOMS,
    ) -> dict[str, Json]:
        """The values of a finished stage, found or made. `rooms` is the code that its result depends on."""
        key = StepKey(f"demo/{name}", code_digest(*rooms, locks=("main", "serve")), dict(parameters), dict(inputs))
        record_, hit = self.workspace.steps.run(key, work)
        if hit:
            self.console.print(f"  [cyan]↺[/] {name}: done before, nothing to do")
        return dict(record_.output.values)

    def reembed(self) -> dict[str, Json]:
        """Corpus to a released index."""
        parameters: dict[str, Json] = {"source": self.plan.documents}

        def work(_: Path) -> StepOutput:
            run = self._run("reembed", parameters)
            return StepOutput({}, {"run": run.id, "metrics": _metrics(run), "index": run.output("switch", "index")})

        return self.stage("reembed", parameters, {}, work)

    def traffic(self) -> dict[str, Json]:
        """Users ask, a reviewer judges: the traces that the retraining learns from."""
        workspace = self.workspace
        champion, index = self.subjects()
        questions = self.open_questions()[: self.plan.traffic_questions]

        def work(folder: Path) -> StepOutput:
            begun = folder / "begun"
            if not begun.is_file():
                begun.write_text(datetime.now(UTC).isoformat())
            assistant = Assistant(workspace)
            try:
                player = TrafficPlayer(
                    assistant, open_trace_store(workspace.settings), concurrency=self.plan.concurrency
                )
                with self.bar("users ask, the reviewer judges") as report:
                    played = player.play(questions, folder / "journal.jsonl", report)
            finally:
                assistant.close()
            if len(played) < len(questions):
                raise UnavailableError(
                    f"{len(questions) - len(played)} of {len(questions)} questions got no answer: "
                    f"{player.tally.first_error}",
                    hint="`sluice status` shows the parts; run again and only these are asked.",
                )
            time.sleep(workspace.settings.traces.settle_s + 0.5)
            values: dict[str, Json] = {
                "traces": len(played),
                "up": sum(one.up for one in played),
                "down": sum(not one.up for one in played),
                "since": begun.read_text(),
                "until": datetime.now(UTC).isoformat(),
            }
            return StepOutput({}, values)

        parameters = {"questions": digest_json([one.id for one in questions])}
        rooms = ("demo.assistant", "demo.player", "rag.prompt", "rag.retrieve")
        return self.stage("traffic", parameters, {"release": champion, "index": index}, work, rooms)

    def retrain(
        self, window: Mapping[str, Json], name: str, *, champion: str, index: str, **changes: Json
    ) -> dict[str, Json]:
        """Traces to a decided candidate."""
        parameters: dict[str, Json] = {
            "since": window["since"],
            "until": window["until"],
            "champion": champion,
            "index": index,
            "recipe": self.plan.recipe,
            "suite": self.plan.suite,
            "holdout_size": self.plan.holdout_size,
            "minimum_examples": self.plan.minimum_examples,
            "validation_share": self.plan.validation_share,
            **changes,
        }

        def work(_: Path) -> StepOutput:
            run = self._run("retrain", parameters)
            tasks = run.tasks()
            values: dict[str, Json] = {
                "run": run.id,
                "adapter": run.output("train", "adapter"),
                "version": run.value("register", "version"),
                "url": run.value("register", "url"),
                "gate_run": run.value("register", "gate_run"),
                "training_run": run.value("register", "training_run"),
                "verdict": run.value("gate", "verdict"),
                "summary": run.value("gate", "summary"),
                "checks": run.value("gate", "checks"),
                "asked": run.value("evaluate", "asked"),
                "curated": tasks["curate"].values,
                "training": tasks["train"].values,
            }
            return StepOutput({}, values)

        return self.stage(name, parameters, {"champion": champion, "index": index}, work)

    def release(self, candidate: Mapping[str, Json], name: str, *, forced: bool = False) -> dict[str, Json]:
        """Approval in MLflow, then the rollout, while users go on asking."""
        adapter = str(candidate["adapter"])

        def work(_: Path) -> StepOutput:
            state = read_state(self.workspace.ledger)
            if state.approval_for(adapter) is None and not state.failed(adapter):
                self._approve(candidate, forced=forced)
            parameters = {"adapter": adapter, "policy": self.plan.policy, "allow_override": forced}
            run = start_run(self.workspace.settings, "release", parameters)
            # Users go on asking all the while, and faster when the canary waits for their requests.
            with self._users(busy=lambda: "canary" in run.tasks()) as (player, status):
                run = follow(run, self.console, refresh=status)
            tally = player.tally
            return StepOutput(
                {},
                {
                    "run": run.id,
                    "outcome": run.value("conclude", "outcome"),
                    "timeline": run.value("canary", "timeline") if "timeline" in run.tasks()["canary"].values else [],
                    "asked": tally.asked,
                    "errors": tally.errors,
                    "first_error": tally.first_error,
                    "by_release": dict(tally.by_release),
                },
            )

        return self.stage(name, {"policy": self.plan.policy, "forced": forced}, {"adapter": adapter}, work)

    def refused(self, candidate: Mapping[str, Json]) -> str:
        """Try to approve what the gate refused, as somebody in a hurry would; the ledger's answer.

        A stage, since it must not be tried again once the drill has forced the candidate past the gate.
        """
        adapter = str(candidate["adapter"])

        def work(_: Path) -> StepOutput:
            decision = read_state(self.workspace.ledger).decision_for(adapter)
            if decision is not None and decision.verdict == "overridden":
                return StepOutput({}, {"refusal": f"{decision.person} has forced it past the gate before."})
            version = find_candidate(self.workspace, str(candidate["version"]))
            try:
                record(self.workspace, version, "approved", "somebody in a hurry", "")
            except GateRefused as error:
                return StepOutput({}, {"refusal": error.message})
            raise SluiceError("The ledger took an approval of a candidate that the gate refused. This is a defect.")

        return str(self.stage("drill-refused", {}, {"adapter": adapter}, work)["refusal"])

    def subjects(self) -> tuple[str, str]:
        """Champion and index that this plan's loop started from, pinned by its first call."""
        return self._pinned("champion", current_champion), self._pinned("index", current_index)

    def open_questions(self) -> list[FaqItem]:
        """The questions that users may ask: all but the frozen holdout and what repeats it."""
        from sluice.curation.holdout import HoldoutItem, split_holdout
        from sluice.curation.text import normalise

        items = load_faq()
        known = frozen_holdout(self.workspace)
        if known is not None:
            held = read_holdout(self.workspace.folder(known))
        else:
            candidates = [HoldoutItem(item.id, item.question, item.answer, item.category) for item in items]
            held, _ = split_holdout(candidates, self.plan.holdout_size)
        # One order and one rule, frozen yet or not: the traffic's key is made of these questions.
        texts = {normalise(item.question) for item in held}
        return sorted((item for item in items if normalise(item.question) not in texts), key=lambda item: item.id)

    def _approve(self, candidate: Mapping[str, Json], *, forced: bool) -> None:
        """By policy, and saying so: in MLflow, where a person would do it; then taken over into the ledger."""
        version = find_candidate(self.workspace, str(candidate["version"]))
        if forced:
            reason = "Drill: does the canary catch what the gate refused?"
            override(self.workspace, version, APPROVER, reason)
            record(self.workspace, version, "approved", APPROVER, reason)
            return
        registry = registry_of(self.workspace)
        set_tag(registry, version, "approval.by", APPROVER)
        set_tag(registry, version, "approval.reason", "The demonstration approves what its gate passed.")
        set_tag(registry, version, "approval", "approved")
        taken, problems = take_over(self.workspace)
        if problems:
            raise GateRefused(" ".join(problems))
        for decided in taken:
            self.console.print(
                f"  version {decided.version.number} {decided.state} in MLflow by {escape(decided.approver)}"
            )

    def _run(self, pipeline: str, parameters: Mapping[str, Json]) -> Run:
        return follow(start_run(self.workspace.settings, pipeline, parameters), self.console)

    @contextmanager
    def _users(self, busy: Callable[[], bool]) -> Iterator[tuple[TrafficPlayer, Callable[[], RenderableType]]]:
        """Users who go on asking in the background, and a line that says how they fare."""
        assistant = Assistant(self.workspace)
        store = open_trace_store(self.workspace.settings)
        prefix = f"r{int(time.time())}"
        player = TrafficPlayer(assistant, store, concurrency=self.plan.concurrency, session_prefix=prefix)
        stop = threading.Event()
        # Others than the retraining learned from, as far as there are any.
        questions = self.open_questions()
        fresh = questions[self.plan.traffic_questions :] or questions
        thread = threading.Thread(target=player.keep_playing, args=(fresh, stop, busy), daemon=True)
        thread.start()

        def status() -> RenderableType:
            t = player.tally
            return Text(
                f"users meanwhile: {t.asked} asked, {t.errors} errors, {t.up} thumbs up, {t.down} down", style="dim"
            )

        try:
            yield player, status
        finally:
            stop.set()
            thread.join(timeout=150)
            assistant.close()

    def _pinned(self, name: str, read: Callable[[Workspace], str]) -> str:
        """A digest that the loop started from. The release at its end changes the champion; the loop's stages keep
        the key that they were made with."""
        path = self.workspace.settings.home / "demo" / short(self.plan.digest) / f"{name}.digest"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = path.with_name(f".{path.name}.{os.getpid()}")
            staging.write_text(read(self.workspace))
            staging.replace(path)
        return path.read_text().strip()


def _metrics(run: Run) -> Json:
    return run.tasks()["retrieval-gate"].values.get("metrics", {})
