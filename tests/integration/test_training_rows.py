"""Rows as the model sees them, with the model class, packing contract and scheduler that AutoModel trains with."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.training import cpu_compatibility
from sluice.training.answer_columns import keep_answer_columns
from sluice.training.base_model import build_tiny_llama
from sluice.training.batches import plan_batches
from sluice.training.chat_template import ChatTemplate
from sluice.training.recipe_sections import DataSection, ScheduleSection

pytestmark = pytest.mark.integration

ANSWERS = ["Use 45 x 145 mm studs.", "No.", "Ask the municipality: it decides about permits. " * 3, "Treat it.", "Yes."]
TOLERANCE = 1e-5
"""float32: a pack sums the same numbers in another order. Relative to the largest of the tensor."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


def chat(number: int, answer: str) -> list[dict[str, str]]:
    """One question, of different lengths; the second chat has two turns."""
    question = f"Question {number}: " + "what about the wood and the concrete " * (number % 3) + "?"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if number == 1:
        messages += [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is dry."}]
    return messages


def read(base: Path, path: Path, answers: list[str]) -> Any:
    from sluice.training.rows import AnswerRows

    lines = (json.dumps({"messages": chat(number, answer)}) + "\n" for number, answer in enumerate(answers))
    path.write_text("".join(lines))
    return AnswerRows.read(path, base)


@pytest.fixture(scope="module")
def rows(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read(base, tmp_path_factory.mktemp("data") / "train.jsonl", ANSWERS)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """AutoModel's own class of the model, built as `automodel.py` says."""
    cpu_compatibility.install()
    from nemo_automodel import NeMoAutoModelForCausalLM
    from nemo_automodel.components.models.common import BackendConfig

    backend = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False)
    return NeMoAutoModelForCausalLM.from_pretrained(
        str(base), torch_dtype="float32", attn_implementation="sdpa", use_liger_kernel=False, backend=backend
    )


@pytest.fixture(scope="module")
def packing(model: Any) -> Any:
    from nemo_automodel.components.models.common.packing import configure_packing_for_models

    return configure_packing_for_models([model])


def scores(model: Any, batch: dict[str, Any]) -> Any:
    from nemo_automodel.components.utils.model_utils import filter_forward_kwargs

    inputs = filter_forward_kwargs(model, {name: value for name, value in batch.items() if name != "labels"})
    output = model(**inputs)
    return getattr(output, "logits", output)


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Sum over all answer tokens with AutoModel's loss, and the gradients of all weights."""
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = MaskedCrossEntropy()(scores(model, batch), batch["labels"])
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        difference = (gradient - theirs[1][name]).abs().max() / theirs[1][name].abs().max()
        assert difference < TOLERANCE, f"{name}: {difference}"


def test_labels_are_shifted_and_padding_has_none(base: Path, rows: Any) -> None:
    from sluice.training.rows import Collation

    batch = Collation(rows, pad_token=2)([(0,), (1,), (2,), ()])
    encoded = ChatTemplate(base).encode([chat(number, ANSWERS[number]) for number in range(3)])
    longest = max(len(one.tokens) for one in encoded) - 1
    assert batch["input_ids"].shape == batch["labels"].shape == batch["padding_mask"].shape == (4, longest)
    for row, one in enumerate(encoded):
        length = len(one.tokens) - 1
        assert batch["input_ids"][row].tolist() == one.tokens[:-1].tolist() + [2] * (longest - length)
        expected = [token if said else -100 for token, said in zip(one.tokens, one.said, strict=True)][1:]
        assert batch["labels"][row].tolist() == expected + [-100] * (longest - length)
        # pad = eos = the end of a turn: what is padding is decided by place, so each turn keeps its end.
        assert (batch["labels"][row] == 2).sum() == (2 if row == 1 else 1)
        assert batch["padding_mask"][row].tolist() == [False] * length + [True] * (longest - length)
    assert set(batch["labels"][3].tolist()) == {-100}
    assert rows.label_counts.tolist()[:3] == [int(one.said.sum()) for one in encoded]
    assert rows.lengths.tolist()[:3] == [len(one.tokens) - 1 for one in encoded]
    assert Collation(rows, pad_token=2, multiple_of=64)([(1,)])["input_ids"].shape[1] % 64 == 0


def test_a_pack_gives_the_loss_and_gradients_of_its_examples_alone(rows: Any, model: Any, packing: Any) -> None:
    from sluice.training.rows import Collation

    packed, padded = Collation(rows, pad_token=2, packing=packing), Collation(rows, pad_token=2)
    alone = loss_and_gradients(model, [padded([(number,)]) for number in range(5)])
    assert_same(loss_and_gradients(model, [packed([(2, 0, 1), (4, 3)])]), alone)
    # The padding of a batch of single examples has no part either, though no mask hides it: it comes last.
    together = padded([(number,) for number in range(5)])
    assert "attention_mask" not in together
    assert_same(loss_and_gradients(model, [together]), alone)
    masked = together | {"attention_mask": (~together["padding_mask"]).long()}
    assert_same(loss_and_gradients(model, [masked]), alone)
    # Rows that only fill up a batch change nothing, alone or beside others.
    filled = [packed([(2, 0, 1), ()]), packed([(), ()]), packed([(4, 3)])]
    assert_same(loss_and_gradients(model, filled), alone)
    # Columns without a label need no scores: the loss stays the same, also for packs.
    kept = [keep_answer_columns(batch) for batch in (packed([(2, 0, 1), (4, 3)]), packed([(), ()]))]
    assert kept[0]["labels"].shape[1] < packed([(2, 0, 1), (4, 3)])["labels"].shape[1]
    assert_same(loss_and_gradients(model, kept), alone)


def test_an_example_does_not_see_its_neighbours_in_a_pack(rows: Any, model: Any, packing: Any) -> None:
    import torch

    from sluice.training.rows import Collation

    other_first = replace(rows, tokens=rows.tokens.copy())
    other_first.tokens[: rows.starts[1]] = 1000
    results = [
        scores(model, Collation(source, pad_token=2, packing=packing)([(0, 1, 2)])) for source in (rows, other_first)
    ]
    cut = int(rows.lengths[0])
    assert not torch.equal(results[0][:, :cut], results[1][:, :cut])
    assert torch.equal(results[0][:, cut:], results[1][:, cut:])
    # Positions restart, so an example has the scores that it has alone.
    end = cut + int(rows.lengths[1])
    alone = scores(model, Collation(rows, pad_token=2)([(1,)]))
    torch.testing.assert_close(results[0][:, cut:end], alone, rtol=1e-4, atol=1e-4)


def test_masks_for_flash_attention_keep_examples_apart_by_length(rows: Any) -> None:
    from nemo_automodel.components.models.common.packing import PackingCapabilities

    from sluice.training.rows import Collation

    collate = Collation(rows, pad_token=2, packing=PackingCapabilities(packed_mask_type="flash_varlen"))
    batch = collate([(2, 0), (4,), ()])
    assert "attention_mask" not in batch
    columns = batch["input_ids"].shape[1]
    first, second, third = (int(rows.lengths[number]) for number in (2, 0, 4))
    assert columns == first + second
    assert batch["cu_seq_lens_q"].tolist() == [0, first, columns, columns + third, 2 * columns, 3 * columns]


def test_ordinary_chats_have_automodels_labels_but_for_the_templates_last_newline(base: Path, tmp_path: Path) -> None:
    """AutoModel's dataset as a second opinion, and the reasons why it is not used."""
    from nemo_automodel._transformers.auto_tokenizer import NeMoAutoTokenizer
    from nemo_automodel.components.datasets.llm.chat_dataset import ChatDataset

    answers = [*ANSWERS, "\n\nAn empty line first."]
    ours = read(base, tmp_path / "train.jsonl", answers)
    tokenizer = NeMoAutoTokenizer.from_pretrained(str(base))
    theirs = ChatDataset(str(tmp_path / "train.jsonl"), tokenizer, mask_generation_prompt=True)
    template = ChatTemplate(base)
    newline = template.encode([chat(0, "No.")])[0].tokens[-1]
    for number in range(len(ANSWERS)):
        inputs, labels = ours.example(number)
        row = theirs[number]
        assert row["input_ids"] == inputs.tolist()
        differing = [at for at, label in enumerate(labels.tolist()) if label != row["labels"][at]]
        assert [row["labels"][at] for at in differing] == [newline] * len(differing)
        assert [inputs[at] for at in differing] == [2] * (2 if number == 1 else 1)
        template.check_against(tokenizer, chat(number, answers[number]))
    # Its way to leave out the header works token by token, and here one token is half header, half answer.
    header = template.text([], add_generation_prompt=True)
    said = [label for label in theirs[len(ANSWERS)]["labels"] if label != -100]
    assert tokenizer.decode(said).startswith(header)
    assert not tokenizer.decode(ours.example(len(ANSWERS))[1][ours.example(len(ANSWERS))[1] != -100]).startswith(header)


def test_a_scheduler_walks_the_steps_from_anywhere(rows: Any) -> None:
    from nemo_automodel.components.training.step_scheduler import StepScheduler

    from sluice.training.rows import StepLoader

    schedule = ScheduleSection(max_steps=7, global_batch_size=4, micro_batch_size=1)
    plan = plan_batches(rows.lengths, DataSection(), schedule, seed=3)

    def steps(first: int, left_out: tuple[int, ...] = ()) -> list[Any]:
        found = []
        for rank in range(2):
            loader = StepLoader(plan, lambda some: {"rows": some}, schedule, dp_rank=rank, dp_size=2)
            loader.start(first, left_out)
            assert len(loader) == 14
            scheduler = StepScheduler(
                4, 1, 2, loader, num_epochs=None, max_steps=7, start_step=first - 1, preemption_signal=None
            )
            assert (scheduler.epoch_len, scheduler.num_epochs) == (7, 1)
            assert list(scheduler.epochs) == [0]
            walked = []
            for batches in scheduler:
                walked.append([row for batch in batches for row in batch["rows"]])
                assert scheduler.is_last_batch == (scheduler.step == 6) == scheduler.is_last_step
            assert scheduler.step == 7
            found.append(walked)
        return [Counter(one + other) for one, other in zip(*found, strict=True)]

    expected = [Counter(plan.step(step)) for step in range(1, 10)]
    assert steps(1) == expected[:7]
    assert steps(5) == expected[4:7]
    # Batches 3 and 5 were bad: later steps move up.
    assert steps(3, (5, 3)) == [expected[3], *expected[5:9]]


def test_no_thread_outlives_an_iteration_that_was_left_and_errors_arrive(rows: Any) -> None:
    from sluice.training.rows import StepLoader

    schedule = ScheduleSection(max_steps=5, global_batch_size=2, micro_batch_size=1)
    plan = plan_batches(rows.lengths, DataSection(), schedule, seed=3)
    iterator = iter(StepLoader(plan, lambda some: {"rows": some}, schedule, dp_rank=0, dp_size=1))
    next(iterator)
    assert [one for one in threading.enumerate() if one.name.startswith("collate")]
    iterator.close()  # type: ignore[attr-defined]
    assert not [one for one in threading.enumerate() if one.name.startswith("collate")]

    def broken(_: Any) -> Any:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        list(StepLoader(plan, broken, schedule, dp_rank=0, dp_size=1))


@pytest.mark.parametrize(("dp_size", "batch_size"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 2)])
def test_validation_is_complete_for_awkward_counts(rows: Any, model: Any, dp_size: int, batch_size: int) -> None:
    from sluice.training.rows import Collation, ValidationLoader

    collate = Collation(rows, pad_token=2)
    loaders = [
        ValidationLoader(rows.lengths, collate, batch_size, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    assert len(batches) == sum(map(len, loaders))
    assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == rows.label_counts.sum()
    if (dp_size, batch_size) == (4, 2):
        alone = loss_and_gradients(model, [collate([(number,)]) for number in range(5)])
        assert loss_and_gradients(model, batches)[0] == pytest.approx(alone[0], rel=TOLERANCE)


def test_answer_columns_give_the_loss_and_gradients_of_the_whole() -> None:
    import torch

    torch.manual_seed(0)
    labels = torch.full((2, 7), -100)
    labels[0, 3:5] = torch.tensor([4, 2])
    labels[1, 4:6] = torch.tensor([1, 2])
    hidden = torch.randn(2, 7, 5, requires_grad=True)
    head = torch.nn.Linear(5, 9, bias=False)
    kept = keep_answer_columns({"labels": labels, "input_ids": labels})
    assert kept["logits_to_keep"].tolist() == [3, 4, 5]
    results = []
    for states, wanted in ((hidden, labels), (hidden[:, kept["logits_to_keep"]], kept["labels"])):
        scored = head(states)
        loss = torch.nn.functional.cross_entropy(scored.reshape(-1, 9), wanted.reshape(-1), reduction="sum")
        results.append((loss, torch.autograd.grad(loss, hidden, retain_graph=True)[0]))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1])
    empty = keep_answer_columns({"labels": torch.full((2, 7), -100)})
    assert (empty["labels"].shape, empty["logits_to_keep"].tolist()) == ((2, 1), [0])
