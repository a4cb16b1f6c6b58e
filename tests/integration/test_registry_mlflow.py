"""The registry against a real MLflow server: SQLite, artifacts proxied into a folder."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sluice.components.index_version import show_index
from sluice.components.rollout_facts import store_of
from sluice.components.rollout_report import show_rollout
from sluice.components.workspace import Workspace
from sluice.infra import audit
from sluice.infra.errors import ConflictError, InputError
from sluice.infra.settings import MlflowSettings, Settings
from sluice.infra.system_metrics import SystemMetrics
from sluice.provenance.artifacts import ArtifactStore
from sluice.provenance.canonical import digest_json, short
from sluice.registry import links
from sluice.registry.aliases import reconcile
from sluice.registry.approvals import Standing, is_shown, read_ui_word, show
from sluice.registry.mlflow_registry import MlflowRegistry, unpaired
from sluice.registry.run_page import DatasetReference, MetricPoint, RunLink, RunPage, Table
from sluice.registry.runs import log_gate_run, log_training_run
from sluice.registry.training_run import Curve, LiveTrainingRun, TrainingSubject
from sluice.registry.versions import Version, find_version, get_version, list_versions, register_version, set_gate
from tests.registry.mlflow_server import Crash, CrashingRegistry, crash_at_every_call, mlflow_server
from tests.serving.rollouts import TRACE, failed
from tests.support.directory_store import DirectoryStore

pytestmark = pytest.mark.integration

ALIASES = ("champion", "challenger", "candidate")

BASE = digest_json("base")
DATASET = digest_json("dataset")
DECISION = digest_json("decision")
GATE = "Better.\n\n| Metric | Candidate |\n|---|---|\n| token_f1 | 0.595 |"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture
def registry(uri: str) -> MlflowRegistry:
    return MlflowRegistry(uri, timeout_s=30)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "card.html"
    path.write_text("<h1>Dataset card</h1>")
    return path


def register(registry: MlflowRegistry, name: str, content: str, card: Path | None = None, **tags: str) -> Version:
    return register_version(
        registry,
        application=name,
        kind="adapter",
        digest=digest_json(content),
        tags={"base": BASE, "dataset": DATASET, **tags},
        description="No gate yet.",
        files={"cards/card.html": card} if card else {},
        run_id=None,
    )


def train(registry: MlflowRegistry, name: str, card: Path, points: int = 5, rank: int = 8) -> RunLink:
    return log_training_run(
        registry,
        application=name,
        adapter_digest=digest_json(name),
        key=digest_json([name, "training step"]),
        dataset=DatasetReference("feedback", DATASET, {"train": 170, "validation": 20}),
        parameters={"peft": {"rank": rank}, "seed": 1, "base": BASE},
        metrics=[MetricPoint("loss", float("nan") if i == 7 else 1 / (i + 1), i, 1.7e9 + i) for i in range(points)],
        files={"card.html": card},
        started=1.7e9,
        finished=1.7e9 + 95,
    )


def test_the_same_digest_twice_is_one_version(registry: MlflowRegistry, card: Path) -> None:
    first = register(registry, "twice", "a", card, licence="CC-BY-4.0")
    again = register(registry, "twice", "a", card, licence="CC-BY-4.0")
    assert again == first
    assert first.number == 1
    assert first.digest == digest_json("a")
    made_of = {"kind": "adapter", "base": BASE, "dataset": DATASET, "licence": "CC-BY-4.0"}
    assert first.tags == {"gate": "not run", "approval": "waits for gate", **made_of}
    assert first.url == f"{registry.uri}/#/models/twice/versions/1"
    assert find_version(registry, "twice", digest_json("a")) == first
    assert find_version(registry, "twice", digest_json("b")) is None
    assert [v.number for v in list_versions(registry, "twice")] == [1]
    assert register(registry, "twice", "b").number == 2
    with pytest.raises(ConflictError, match="with base ="):
        register(registry, "twice", "a", base=digest_json("another base"))
    with pytest.raises(InputError, match="approval"):
        register(registry, "twice", "c", approval="approved")


def test_a_name_taken_by_another_digest_is_refused(registry: MlflowRegistry) -> None:
    digest = digest_json("mine")
    experiment = registry.experiment("releases")
    other = [{"key": "release", "value": digest_json("theirs")}]
    registry.post("logged-models", experiment_id=experiment, name=f"taken-{short(digest)}", tags=other)
    with pytest.raises(ConflictError, match=digest_json("theirs")):
        register(registry, "taken", "mine")
    assert list_versions(registry, "taken") == []


def test_a_run_whose_logging_crashed_anywhere_is_one_whole_run(registry: MlflowRegistry, card: Path) -> None:
    experiment = registry.experiment("training")
    names = crash_at_every_call(registry, "crash-run", lambda target, name: train(target, name, card))
    # Run, parameters, tags, metrics, dataset, card, end.
    assert len(names) == 7
    for name in names:
        found = registry.post("runs/search", experiment_ids=[experiment], filter=f"tags.application = '{name}'")["runs"]
        assert [run["info"]["status"] for run in found] == ["FINISHED"]
        assert len(found[0]["inputs"]["dataset_inputs"]) == 1
        points = registry.get("metrics/get-history", run_id=found[0]["info"]["run_id"], metric_key="loss")["metrics"]
        assert len(points) == 5


def test_a_registration_that_crashed_anywhere_is_one_version(registry: MlflowRegistry, card: Path) -> None:
    registry.experiment("releases")
    run = train(registry, "crash", card)

    def work(target: MlflowRegistry, name: str) -> None:
        version = register_version(
            target,
            application=name,
            kind="adapter",
            digest=digest_json(name),
            tags={"base": BASE, "dataset": DATASET},
            description="",
            files={"card.html": card},
            run_id=run.run_id,
        )
        set_gate(target, version, "pass", GATE, DECISION)

    names = crash_at_every_call(registry, "crash", work)
    # Logged model, card, output, ready, registered model, version; approval, gate, description, alias, note, decision.
    assert len(names) == 12
    for name in names:
        (version,) = list_versions(registry, name)
        assert (version.number, version.aliases) == (1, ("candidate",))
        assert (version.tags["gate"], version.tags["approval"]) == ("PASS", "pending")
        assert version.tags["decision"] == DECISION


def test_another_recipe_for_the_same_adapter_is_refused(registry: MlflowRegistry, card: Path) -> None:
    with pytest.raises(Crash):
        train(CrashingRegistry(registry.uri, 2), "recipe", card)
    with pytest.raises(ConflictError, match="logged with other parameters"):
        train(registry, "recipe", card, rank=16)


def test_two_processes_that_register_one_digest_keep_one_version(uri: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: register(MlflowRegistry(uri, timeout_s=30), "race", "x"), range(4)))
    assert len({version.number for version in found}) == 1
    assert len(list_versions(MlflowRegistry(uri), "race")) == 1


def test_the_gate_is_shown_and_a_new_decision_asks_again(registry: MlflowRegistry, card: Path) -> None:
    version = register(registry, "gated", "a")
    assert version.aliases == ()
    run = RunLink("r" * 32, f"{registry.uri}/#/experiments/2/runs/{'r' * 32}")
    passed = set_gate(registry, version, "pass", GATE, DECISION, gate_run=run, picture="f1.png")
    assert passed.aliases == ("candidate",)
    assert (passed.tags["gate"], passed.tags["approval"], passed.tags["decision"]) == ("PASS", "pending", DECISION)
    shown = registry.get("model-versions/get", name="gated", version="1")["model_version"]["description"]
    assert shown.startswith("### Gate: PASS")
    assert f"{run.url}/artifacts/report.html" in shown
    assert "get-artifact?path=f1.png" in shown
    show(registry, passed, Standing("approved", "Approved by Anna.", "Anna", "fine"))
    assert set_gate(registry, passed, "pass", GATE, DECISION).tags["approval"] == "approved"
    failed = set_gate(registry, passed, "fail", GATE, digest_json("second decision"))
    assert failed.aliases == ()
    assert failed.tags["approval"] == "blocked by gate"
    assert not {"approval.by", "approval.reason", "approval.recorded", "approval.answer"} & set(failed.tags)
    with pytest.raises(InputError, match="verdict = 'maybe'"):
        set_gate(registry, version, "maybe", "", DECISION)


def test_what_is_said_in_the_page_is_read_and_answered_there(registry: MlflowRegistry) -> None:
    def in_the_page(key: str, value: str) -> Version:
        registry.post("model-versions/set-tag", name="approve", version="1", key=key, value=value)
        return get_version(registry, "approve", 1)

    version = set_gate(registry, register(registry, "approve", "a"), "pass", GATE, DECISION)
    waiting = Standing("pending", "It waits for a person.")
    assert read_ui_word(version) is None
    assert is_shown(version, waiting)
    said = read_ui_word(in_the_page("approval", "aproved"))
    assert said is not None
    assert said.state is None
    answered = show(registry, version, waiting, "Neither yes nor no.")
    assert (answered.tags["approval"], answered.tags["approval.answer"]) == ("pending", "Neither yes nor no.")
    assert read_ui_word(answered) is None
    in_the_page("approval.by", "Anna Berg")
    in_the_page("approval.reason", "read 20 answers")
    said = read_ui_word(in_the_page("approval", " Approved "))
    assert said is not None
    assert (said.state, said.approver, said.reason) == ("approved", "Anna Berg", "read 20 answers")
    half = show(registry, version, Standing("1 of 2", "Anna did.", "Anna Berg"))
    assert {name: half.tags.get(name) for name in ("approval", "approval.by", "approval.answer")} == {
        "approval": "1 of 2",
        "approval.by": None,
        "approval.answer": "Anna did.",
    }
    page = registry.get("model-versions/get", name="approve", version="1")["model_version"]["description"]
    assert page.startswith("### Gate: PASS\n\n**Approval: 1 of 2.** Anna did.\n\n")
    registry.post("registered-models/alias", name="approve", alias="approved", version="1")
    said = read_ui_word(get_version(registry, "approve", 1))
    assert said is not None
    assert said.state == "approved"
    done = Standing("approved", "Approved by Anna Berg and Bob.", "Anna Berg and Bob", "fine")
    shown = show(registry, version, done)
    assert is_shown(shown, done)
    assert read_ui_word(shown) is None
    assert "approved" not in shown.aliases
    assert show(registry, version, done) == shown
    page = registry.get("model-versions/get", name="approve", version="1")["model_version"]["description"]
    assert page.count("**Approval:") == 1
    changed = read_ui_word(in_the_page("approval", "rejected"))
    assert changed is not None
    assert changed.state == "rejected"


def test_an_alias_moved_by_hand_is_put_back_and_told(registry: MlflowRegistry) -> None:
    for content in ("one", "two", "three"):
        register(registry, "alias", content)
    one, two, three = (digest_json(content) for content in ("one", "two", "three"))

    def mend(champion: str | None, candidate: str | None = None, **more: Any) -> list[str]:
        repairs = reconcile(registry, "alias", champion_digest=champion, candidate_digest=candidate, **more)
        return [str(one) for one in repairs]

    assert mend(one, two)[:2] == [
        f"Alias champion lagged behind the ledger: it points nowhere, and now points at version 1 ({short(one)}).",
        f"Alias candidate lagged behind the ledger: it points nowhere, and now points at version 2 ({short(two)}).",
    ]
    assert mend(one, two) == []
    registry.post("registered-models/alias", name="alias", alias="champion", version="3")
    assert mend(one, two) == [
        f"Alias champion was moved by hand: it points at version 3 ({short(three)}), "
        f"and now points at version 1 ({short(one)})."
    ]
    promoted = mend(two, previous_champions=[one])
    assert len([words for words in promoted if "lagged behind" in words]) == 2
    tags = {version.number: version.tags.get("champion") for version in list_versions(registry, "alias")}
    assert tags == {1: "former", 2: "current", 3: None}
    found = find_version(registry, "alias", two)
    assert found is not None
    assert found.aliases == ("champion",)
    registry.post("model-versions/set-tag", name="alias", version="3", key="champion", value="current")
    assert mend(two, previous_champions=[one]) == [
        f"Version 3 ({short(three)}) is no champion to go back to: tag removed."
    ]
    assert "has no version in MLflow" in mend(digest_json("elsewhere"))[0]
    assert reconcile(registry, "nothing", champion_digest=None, candidate_digest=None) == []


def test_every_alias_that_is_moved_by_hand_comes_back_and_leaves_a_tag(registry: MlflowRegistry) -> None:
    for content in ("c1", "c2", "c3"):
        register(registry, "hands", content)
    wanted = {f"{alias}_digest": digest_json(f"c{n}") for n, alias in enumerate(ALIASES, start=1)}

    def aliases() -> dict[str, int]:
        model = registry.get("registered-models/get", name="hands")["registered_model"]
        return {entry["alias"]: int(entry["version"]) for entry in model.get("aliases", [])}

    assert not any(repair.by_hand for repair in reconcile(registry, "hands", **wanted))
    right = {"champion": 1, "challenger": 2, "candidate": 3}
    assert aliases() == right
    for alias, number in right.items():
        other = number % 3 + 1
        registry.post("registered-models/alias", name="hands", alias=alias, version=str(other))
        (moved,) = reconcile(registry, "hands", **wanted)
        assert (moved.subject, moved.by_hand) == (alias, True)
        registry.delete("registered-models/alias", name="hands", alias=alias)
        (removed,) = reconcile(registry, "hands", **wanted)
        assert "was moved by hand: it points nowhere" in removed.sentence
        assert aliases() == right
        model = registry.get("registered-models/get", name="hands")["registered_model"]
        tag = {entry["key"]: entry["value"] for entry in model["tags"]}[f"repaired.{alias}"]
        assert tag.endswith(removed.sentence)
    assert reconcile(registry, "hands", **wanted) == []
    # The rollout ended: nobody is challenger, and nobody had a hand in that.
    (ended,) = reconcile(registry, "hands", **{**wanted, "challenger_digest": None})
    assert (ended.subject, ended.by_hand) == ("challenger", False)
    assert aliases() == {"champion": 1, "candidate": 3}


def test_a_repair_that_crashed_anywhere_is_repaired_and_told(registry: MlflowRegistry) -> None:
    for content in ("d1", "d2"):
        register(registry, "crashed", content)
    one = digest_json("d1")
    reconcile(registry, "crashed", champion_digest=one, candidate_digest=None)
    for calls in (1, 2):
        registry.post("registered-models/alias", name="crashed", alias="champion", version="2")
        with pytest.raises(Crash):
            reconcile(CrashingRegistry(registry.uri, calls), "crashed", champion_digest=one, candidate_digest=None)
        reconcile(registry, "crashed", champion_digest=one, candidate_digest=None)
        found = find_version(registry, "crashed", one)
        assert found is not None
        assert found.aliases == ("champion",)
        model = registry.get("registered-models/get", name="crashed")["registered_model"]
        assert "repaired.champion" in {entry["key"] for entry in model["tags"]}


def test_an_index_is_a_version_with_its_gate_and_asks_nobody(
    registry: MlflowRegistry, tmp_path: Path, object_store: DirectoryStore, artifacts: ArtifactStore
) -> None:
    settings = Settings(home=tmp_path / "home", mlflow=MlflowSettings(tracking_uri=registry.uri), application="faq")
    workspace = Workspace(settings)
    workspace.__dict__.update(objects=object_store, artifacts=artifacts)
    indexes = [
        artifacts.put_files({"index": name}, "index", {"corpus": digest_json("corpus"), "chunks": 503}).digest
        for name in (b"one", b"two")
    ]

    def show(index: str, verdict: str, live: str, current: str | None) -> list[str]:
        result = {
            "verdict": verdict,
            "metrics": {"recall@2": 0.91, "mrr": 0.85},
            "current_metrics": {"recall@2": 0.9, "mrr": 0.84} if current else None,
            "queries": 503,
            "reasons": ["recall@2, floor: 0.910, interval 0.880 to 0.930, limit 0.500: pass"],
        }
        decision = digest_json([index, verdict])
        return show_index(workspace, index=index, decision=decision, result=result, live=live)

    one, two = indexes
    show(one, "pass", one, None)
    first = find_version(registry, "faq-index", one)
    assert first is not None
    assert (first.aliases, first.tags["kind"], first.tags["recall.at.2"]) == (("champion",), "index", "0.910")
    assert (first.tags["gate"], first.tags["champion"], "approval" in first.tags) == ("PASS", "current", False)
    page = registry.get("model-versions/get", name="faq-index", version="1")["model_version"]["description"]
    assert page.startswith("### Gate: PASS")
    assert "0.910" in page
    assert "sluice approve" not in page
    # Refused: a version too, and the alias stays. Then it passes, and takes over.
    show(two, "fail", one, one)
    assert find_version(registry, "faq-index", one) == first
    show(two, "pass", two, one)
    assert {v.number: (v.aliases, v.tags["champion"]) for v in list_versions(registry, "faq-index")} == {
        1: ((), "former"),
        2: (("champion",), "current"),
    }
    registry.post("registered-models/alias", name="faq-index", alias="champion", version="1")
    (told,) = show(two, "pass", two, None)
    assert "was moved by hand" in told
    assert [line.subject for line in audit.read(settings.home)] == ["faq-index@champion"]
    unreachable = Settings(home=tmp_path / "home", mlflow=MlflowSettings(tracking_uri="http://127.0.0.1:9"))
    lost = Workspace(unreachable)
    lost.__dict__.update(objects=object_store, artifacts=artifacts)
    assert (
        "MLflow does not show the index"
        in show_index(lost, index=one, decision=digest_json(1), result={"metrics": {}}, live=one)[0]
    )


def test_runs_hold_what_people_look_for(registry: MlflowRegistry, card: Path, tmp_path: Path) -> None:
    run = train(registry, "runs", card, points=1200)
    assert train(registry, "runs", card, points=1200) == run
    shown = registry.get("runs/get", run_id=run.run_id)["run"]
    assert {p["key"]: p["value"] for p in shown["data"]["params"]}["peft.rank"] == "8"
    assert shown["info"]["end_time"] - shown["info"]["start_time"] == 95_000
    dataset = shown["inputs"]["dataset_inputs"][0]["dataset"]
    assert DATASET in dataset["profile"]
    history = registry.get("metrics/get-history", run_id=run.run_id, metric_key="loss", max_results=5000)["metrics"]
    assert len(history) == 1200
    report = tmp_path / "report.html"
    report.write_text("<h1>Report</h1>")
    table = tmp_path / "items.json"
    table.write_text(Table(["question", "candidate", "champion"], [["Why?", "Because.", "No."]]).to_json())
    gate = log_gate_run(
        registry,
        application="runs",
        report_digest=digest_json("report"),
        candidate_digest=digest_json("runs"),
        champion_digest=BASE,
        verdict="pass",
        metrics={"token_f1/category:permits/difference": 0.339},
        files={"report.html": report, "plots/f1.png": report, "items.json": table},
        holdout=DatasetReference("holdout", digest_json("holdout"), {"items": 120}, "evaluation"),
        tables=["items.json"],
    )
    files = registry.get("artifacts/list", run_id=gate.run_id)["files"]
    assert sorted(file["path"] for file in files) == ["items.json", "plots", "report.html"]
    page = httpx.get(f"{registry.uri}/get-artifact", params={"path": "report.html", "run_uuid": gate.run_id})
    assert page.text == "<h1>Report</h1>"
    assert gate.url.startswith(f"{registry.uri}/#/experiments/{registry.experiment('gates')}/runs/")


def test_a_training_is_shown_while_it_runs_and_adopted_when_it_is_registered(
    registry: MlflowRegistry, card: Path
) -> None:
    key = digest_json(["live", "training step"])
    subject = TrainingSubject(key, "live demo", {"peft": {"rank": 8}, "seed": 1, "base": BASE})
    for attempt in (0, 1):
        with LiveTrainingRun(registry, subject, system=SystemMetrics(), send_every_s=0.1) as run:
            # The second attempt does step 2 again: the same loss, another speed.
            steps = range(2 * attempt, 4 + attempt)
            run.add([MetricPoint("loss", float("nan") if n == 3 else 1 / (n + 1), n, 1.7e9 + n) for n in steps])
            run.add([MetricPoint("tokens_per_second", 100.0 + attempt, n) for n in steps], Curve.FIRST)
            run.show_table("events.json", Table(["step", "what happened"], [[1, "Saved."]]))
            run.end("KILLED" if attempt == 0 else "FINISHED")
        page = RunPage.find(registry, "training", key)
        assert page is not None
        assert page.status == ("KILLED" if attempt == 0 else "FINISHED")
    assert page is not None
    adopted = log_training_run(
        registry,
        application="live",
        adapter_digest=digest_json("live"),
        key=key,
        dataset=DatasetReference("feedback", DATASET),
        parameters=subject.parameters,
        metrics=[MetricPoint("loss", 1 / (n + 1), n) for n in range(5)],
        files={"card.html": card},
    )
    assert adopted.run_id == page.run_id
    for name, points in (("loss", 5), ("tokens_per_second", 5), ("system/cpu_utilization_percentage", 2)):
        shown = registry.get("metrics/get-history", run_id=page.run_id, metric_key=name)["metrics"]
        assert len(shown) == points, shown
    assert page.history("tokens_per_second") == {0: 100.0, 1: 100.0, 2: 100.0, 3: 100.0, 4: 101.0}
    files = registry.get("artifacts/list", run_id=page.run_id)["files"]
    assert sorted(file["path"] for file in files) == ["card.html", "events.json"]


def test_the_machine_has_the_names_that_mlflow_draws() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs: set[str] = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= set(monitor.metrics)
    assert {name for name in SystemMetrics().read() if not name.startswith("gpu_")} == theirs


def test_an_artifact_store_that_the_server_does_not_proxy_is_written_by_the_client(
    registry: MlflowRegistry, card: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    experiment = registry.post("experiments/create", name="unproxied", artifact_location=folder.as_uri())
    run = registry.post("runs/create", experiment_id=experiment["experiment_id"], start_time=1)["run"]["info"]
    registry.upload({"cards/card.html": card}, run["artifact_uri"], run_id=run["run_id"])
    assert [path.read_text() for path in folder.rglob("cards/card.html")] == ["<h1>Dataset card</h1>"]
    with pytest.raises(InputError, match=r"missing\.html"):
        registry.upload({"a.html": tmp_path / "missing.html"}, run["artifact_uri"], run_id=run["run_id"])


def test_a_rollouts_timeline_is_shown_beside_its_version(registry: MlflowRegistry, card: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, application="rolled", mlflow=MlflowSettings(tracking_uri=registry.uri))
    state = failed()
    version = register_version(
        registry, application="rolled", kind="adapter", digest=state.release, tags={}, description="", files={},
        run_id=None,
    )  # fmt: skip
    set_gate(registry, version, "pass", GATE, DECISION)
    show(registry, version, Standing("approved", "Approved by ann.", "ann", "good"))
    store_of(settings).save(state)
    told = show_rollout(settings, state.release)
    # Shown again, as a restarted controller does, it is one run, one paragraph, one curve.
    assert show_rollout(settings, state.release) == told
    experiment = registry.experiment("rollouts")
    (run,) = registry.post("runs/search", experiment_ids=[experiment], filter="tags.application = 'rolled'")["runs"]
    assert (run["info"]["status"], unpaired(run["data"]["tags"])["outcome"]) == ("FAILED", "failed")
    page = httpx.get(links.run_file(registry.uri, run["info"]["run_id"], "rollout.html")).text
    assert "Rolled back at 30%" in page
    assert f"{registry.uri}/#/models/rolled/versions/1" in page
    assert f"traces?selectedEvaluationId=tr-{TRACE}" in page
    described = registry.get("model-versions/get", name="rolled", version="1")["model_version"]["description"]
    assert described.count("**Rollout: ") == 1
    assert described.count("**Approval: approved.**") == 1
    assert told.split(": ", 1)[1] in described
    assert get_version(registry, "rolled", 1).tags["rollout"] == "Rolled back at 30%"
