"""Benchmark tasks by lm-evaluation-harness before a scripted server: accuracies known exactly; every way to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sluice.evaluation.benchmark_endpoint import Endpoint
from sluice.evaluation.benchmark_tasks import BUNDLED, BenchmarkTask, find_tasks, read_task
from sluice.evaluation.benchmarks import Sample, benchmark_scores, run_benchmarks
from sluice.evaluation.cache import Cache, open_cache
from sluice.evaluation.outcomes import Patience
from sluice.infra.errors import InputError, UnavailableError
from tests.evaluation.completions_server import Reply, Server, completions_server, write_tokenizer

ROWS = [
    {"id": "sky", "question": "The sky is", "choices": ["blue", "a spoon"], "answer": 0},
    {"id": "grass", "question": "Grass is", "choices": ["loud", "green"], "answer": 1},
    {"id": "snow", "question": "Snow is", "choices": ["black", "white", "old"], "answer": 1},
]
CHOICE: dict[str, Any] = {
    "task": "choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SHORT: dict[str, Any] = {
    **CHOICE,
    "task": "short",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
    "num_fewshot": 1,
    "fewshot_config": {"sampler": "first_n", "samples": [{"question": "Coal is", "choices": ["black"], "answer": 0}]},
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True},
    ],
}
del SHORT["doc_to_choice"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with open_cache(tmp_path / "cache.sqlite") as opened:
        yield opened


def task(folder: Path, config: dict[str, Any] = CHOICE, rows: list[dict[str, Any]] = ROWS) -> BenchmarkTask:
    folder.mkdir(exist_ok=True)
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{config['task']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return read_task(path)


def endpoint(server: Server, cache: Cache, **patience: Any) -> Endpoint:
    limits = Patience(**{"timeout_s": 5.0, "attempts": 2, "pause_s": 0.01, **patience})
    return Endpoint(server.url, "served", "sha256:" + "a" * 64, cache, 2, limits)


def values(samples: list[Sample]) -> dict[str, float | str]:
    return {sample.item: sample.value for sample in samples}


def likes(*endings: str) -> Any:
    return lambda text: Reply(likelihood=-0.1 if text.endswith(endings) else -3.0)


def test_the_likeliest_choice_counts(tmp_path: Path, base: Path, cache: Cache) -> None:
    one = task(tmp_path / "tasks")
    told: list[tuple[float, float, str]] = []
    with completions_server(likes(" blue", " loud", " white")) as server:
        samples = run_benchmarks([one], endpoint(server, cache), base=base, report=lambda *state: told.append(state))
    assert values(samples) == {"choice/sky": 1.0, "choice/grass": 0.0, "choice/snow": 1.0}
    wrong = next(sample for sample in samples if sample.item == "choice/grass")
    assert (wrong.asked, wrong.expected, wrong.said) == ("Grass is", "green", "loud")
    assert sorted(server.asked)[0] == "Grass is green"
    assert len(server.asked) == 7
    assert all(payload["echo"] and payload["model"] == "served" for payload in server.payloads)
    assert told[-1][:2] == (3, 3)
    assert "7 of 7 requests" in told[-2][2]
    column = benchmark_scores([one], samples).columns["benchmark.choice"]
    assert column.values == values(samples)
    assert column.metric.kind == "binary"


def test_length_counts_where_the_task_says_so(tmp_path: Path, base: Path, cache: Cache) -> None:
    """Each token has the same likelihood: the sum prefers the short choice, the mean none (the first)."""
    rows = [{"id": "a", "question": "Q", "choices": ["a long one", "no"], "answer": 0}]
    by_mean = {**CHOICE, "metric_list": [{**CHOICE["metric_list"][0], "metric": "acc_norm"}]}
    with completions_server(lambda text: Reply(likelihood=-0.9 if text.endswith("one") else -1.0)) as server:
        by_sum = run_benchmarks([task(tmp_path / "a", CHOICE, rows)], endpoint(server, cache), base=base)
        normalised = run_benchmarks([task(tmp_path / "b", by_mean, rows)], endpoint(server, cache), base=base)
    assert [(one.value, one.said) for one in (*by_sum, *normalised)] == [(0.0, "no"), (1.0, "a long one")]


def test_answers_go_through_the_servers_chat_template(tmp_path: Path, base: Path, cache: Cache) -> None:
    said = {"The sky is": "Blue", "Grass is": "a plant", "Snow is": "white"}
    with completions_server(lambda text: Reply(text=said[text])) as server:
        samples = run_benchmarks([task(tmp_path, SHORT)], endpoint(server, cache), base=base)
    assert values(samples) == {"short/sky": 1.0, "short/grass": 0.0, "short/snow": 1.0}
    payload = next(one for one in server.payloads if one["messages"][-1]["content"] == "Grass is")
    assert payload["messages"] == [
        {"role": "user", "content": "Coal is"},
        {"role": "assistant", "content": "black"},
        {"role": "user", "content": "Grass is"},
    ]
    assert (payload["max_tokens"], payload["temperature"], payload["stop"]) == (5, 0.0, ["\n"])


def test_a_limit_takes_the_same_items_in_any_order(tmp_path: Path, base: Path, cache: Cache) -> None:
    rows = [{**ROWS[0], "id": f"i{number}"} for number in range(20)]
    there, back = task(tmp_path / "a", CHOICE, rows), task(tmp_path / "b", CHOICE, rows[::-1])
    assert list(there.select(5)) == list(back.select(5))
    assert len(there.select(5)) == 5
    assert there.digest == back.digest
    assert task(tmp_path / "c", CHOICE, [{**rows[0], "answer": 1}, *rows[1:]]).digest != there.digest
    with completions_server(likes(" blue")) as server:
        samples = run_benchmarks([back], endpoint(server, cache), base=base, limit=5)
    assert sorted(values(samples)) == sorted(there.select(5))


def test_an_item_without_an_id_has_that_of_its_content(tmp_path: Path) -> None:
    row = {key: value for key, value in ROWS[0].items() if key != "id"}
    (named,) = task(tmp_path / "a", CHOICE, [row]).items
    (again,) = task(tmp_path / "b", CHOICE, [dict(reversed(row.items()))]).items
    assert named == again
    assert named.startswith("choice/")


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (Reply(status=500), "http 500"),
        (Reply(status=400), "http 400"),
        (Reply(body=b"<html>"), "not JSON"),
        (Reply(body=b'{"choices": []}'), "no log-probabilities"),
        (Reply(body=b'{"choices": [{"index": 0, "text": "x"}]}'), "no log-probabilities"),
        (Reply(tokens=-1), "log-probabilities of other tokens"),
        (Reply(tokens=1), "log-probabilities of other tokens"),
        (Reply(likelihood=float("nan")), "not a finite number"),
        (None, "connection"),
    ],
)
def test_a_lost_request_costs_its_own_item(
    tmp_path: Path, base: Path, cache: Cache, reply: Reply | None, cause: str
) -> None:
    good = likes(" blue", " green")
    with completions_server(lambda text: reply if text.endswith("loud") else good(text)) as server:
        samples = run_benchmarks([task(tmp_path)], endpoint(server, cache), base=base)
    assert values(samples) == {"choice/sky": 1.0, "choice/grass": cause, "choice/snow": 0.0}
    again = 1 if cause == "http 400" else 2
    assert server.asked.count("Grass is loud") == again
    with completions_server(good) as server:
        mended = run_benchmarks([task(tmp_path)], endpoint(server, cache), base=base)
    assert values(mended)["choice/grass"] == 1.0
    assert server.asked == ["Grass is loud"]


def test_a_lost_answer_costs_its_own_item(tmp_path: Path, base: Path, cache: Cache) -> None:
    def reply(text: str) -> Reply:
        return Reply(body=b"{}") if text == "Snow is" else Reply(text="blue")

    with completions_server(reply) as server:
        samples = run_benchmarks([task(tmp_path, SHORT)], endpoint(server, cache), base=base)
    assert values(samples) == {"short/sky": 1.0, "short/grass": 0.0, "short/snow": "no answer in the reply"}


def test_a_server_that_dies_stops_the_run_and_what_it_said_is_kept(tmp_path: Path, base: Path, cache: Cache) -> None:
    one, good = task(tmp_path), likes(" blue", " green", " white")
    said: list[str] = []

    def dying(text: str) -> Reply | None:
        if len(said) >= 4:
            return None
        said.append(text)
        return Reply() if text == "a" else good(text)

    with completions_server(dying) as server, pytest.raises(UnavailableError, match="stopped answering") as stopped:
        run_benchmarks([one], endpoint(server, cache), base=base)
    assert "are kept" in stopped.value.hint
    with completions_server(good) as server:
        samples = run_benchmarks([one], endpoint(server, cache), base=base)
    assert set(values(samples).values()) == {1.0}
    assert len(server.asked) == 3
    assert not set(server.asked) & set(said)


def test_a_server_that_hangs_stops_the_run(tmp_path: Path, base: Path, cache: Cache) -> None:
    never = threading.Event()
    with completions_server(lambda _: Reply(hold=never)) as server:
        with pytest.raises(UnavailableError, match="stopped answering"):
            run_benchmarks([task(tmp_path)], endpoint(server, cache, timeout_s=0.1), base=base)
        never.set()
    assert len(server.asked) < 12


def test_a_request_that_hangs_costs_its_own_item(tmp_path: Path, base: Path, cache: Cache) -> None:
    never, good = threading.Event(), likes(" blue", " white")

    def reply(text: str) -> Reply:
        return Reply(hold=never) if text.startswith("Grass") else good(text)

    with completions_server(reply) as server:
        # Asked alone at the end, when nothing else is answered any more: the server shows life to a small request.
        samples = run_benchmarks([task(tmp_path)], endpoint(server, cache, timeout_s=0.2), base=base)
        never.set()
    assert values(samples) == {"choice/sky": 1.0, "choice/grass": "timeout", "choice/snow": 1.0}


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (404, InputError, "knows no model 'served'"),
        (401, UnavailableError, "refuses us"),
        (403, UnavailableError, "us"),
    ],
)
def test_what_every_request_would_get_stops_the_run(
    tmp_path: Path, base: Path, cache: Cache, status: int, error: type[Exception], says: str
) -> None:
    with completions_server(lambda _: Reply(status=status)) as server, pytest.raises(error, match=says):
        run_benchmarks([task(tmp_path)], endpoint(server, cache), base=base)
    assert len(server.asked) <= 2


def test_a_task_without_a_prompt_has_the_first_token_before_it(tmp_path: Path, base: Path, cache: Cache) -> None:
    config = {**CHOICE, "doc_to_text": "", "target_delimiter": ""}
    with completions_server(likes("blue", "loud", "black")) as server:
        samples = run_benchmarks([task(tmp_path, config)], endpoint(server, cache), base=base)
    assert [sample.value for sample in samples].count(1.0) == 1
    assert "<s>blue" in server.asked


def test_another_model_is_asked_anew(tmp_path: Path, base: Path, cache: Cache) -> None:
    with completions_server(likes(" blue")) as server:
        first = endpoint(server, cache)
        renamed = Endpoint(server.url, "another name", first.model_digest, cache)
        other = Endpoint(server.url, "served", "sha256:" + "b" * 64, cache)
        counts = []
        for one in (first, first, renamed, other):
            run_benchmarks([task(tmp_path)], one, base=base)
            counts.append(len(server.asked))
    assert counts == [7, 7, 7, 14]


def test_a_task_that_the_harness_refuses_is_named(tmp_path: Path, base: Path, cache: Cache) -> None:
    bad = task(tmp_path / "a", {**CHOICE, "doc_to_text": "{{question | nonsense}}"})
    beyond = task(tmp_path / "b", CHOICE, [ROWS[0], {**ROWS[1], "answer": 7}])
    unknown = task(tmp_path / "c", {**CHOICE, "doc_to_txt": "x"})
    refused = ((bad, "a/choice.yaml.*nonsense"), (beyond, "item 'choice/grass' is 7"), (unknown, "doc_to_txt"))
    with completions_server(likes("")) as server:
        for one, says in refused:
            with pytest.raises(InputError, match=says):
                run_benchmarks([one], endpoint(server, cache), base=base)
        with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
            run_benchmarks([bad], endpoint(server, cache), base=tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "other"}, "task = 'other' must be the file's name"),
        ({"output_type": "loglikelihood_rolling"}, "output_type = 'loglikelihood_rolling' is not measured"),
        ({"metric_list": [{"metric": "f1"}]}, "metric_list.0.metric = 'f1' must say right or wrong"),
        ({"metric_list": []}, "metric_list.0.metric = None"),
        ({"dataset_path": "some/hub"}, "its data must be JSONL beside it"),
        (
            {"dataset_kwargs": {"data_files": {"test": "../x.jsonl"}}},
            "data_files.test = '../x.jsonl' must name one file",
        ),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "gone.jsonl' cannot be read"),
        ({"test_split": "validation"}, "test_split = 'validation' names none of its data_files"),
        ({"include": "other.yaml"}, "include is not taken"),
    ],
)
def test_a_bad_task_file_gets_its_sentence(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = task(tmp_path).path
    path.write_text(yaml.safe_dump({**CHOICE, **change}))
    with pytest.raises(InputError) as refused:
        read_task(path)
    assert says in refused.value.message
    assert "choice.yaml" in refused.value.message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "holds 0 items"),
        ("{", "line 1 is not JSON"),
        ("\n[1]", "line 2 must be an object"),
        ('{"id": "a"}\n{"id": "a"}', "two of its items are 'choice/a'"),
    ],
)
def test_bad_data_gets_its_sentence(tmp_path: Path, data: str, says: str) -> None:
    path = task(tmp_path).path
    (tmp_path / "choice.jsonl").write_text(data)
    with pytest.raises(InputError, match=says):
        read_task(path)


def test_a_task_holds_no_code_and_an_unknown_one_is_told(tmp_path: Path) -> None:
    path = task(tmp_path).path
    path.write_text(path.read_text() + "process_docs: !function code.run\n")
    with pytest.raises(InputError, match="not plain YAML"):
        read_task(path)
    with pytest.raises(InputError, match="There is no benchmark task 'gone'") as unknown:
        find_tasks(["gone"], tmp_path)
    assert "choice, general-choice, general-short" in unknown.value.hint
    # A suite's own task of the same name wins.
    own = task(tmp_path, {**CHOICE, "task": "general-choice"})
    assert find_tasks(["general-choice"], tmp_path)[0].digest == own.digest
    assert find_tasks(["general-choice"])[0].path.parent == BUNDLED


def test_the_general_tasks_are_sound() -> None:
    choice, short = find_tasks(["general-choice", "general-short"])
    assert (len(choice.items), len(short.items)) == (248, 51)
    for row in choice.items.values():
        assert 2 <= len(row["choices"]) == len(set(row["choices"])) <= 4
        assert row["choices"][row["answer"]]
    right = [row["answer"] == 0 for row in choice.items.values()]
    assert 0.2 < sum(right) / len(right) < 0.5
    questions = [row["question"] for row in short.items.values()]
    shown = [sample["question"] for sample in short.config["fewshot_config"]["samples"]]
    assert not set(shown) & set(questions)
    assert len(set(questions)) == len(questions)
    assert all(row["answers"] for row in short.items.values())
