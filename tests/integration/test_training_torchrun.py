"""The real thing, small: two gloo processes, FSDP2, a random llama.

Each start of torchrun costs about half a minute of imports, so one story is told with three starts: a run without
interruption, a run killed in the middle, and its resumption.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sluice.infra.errors import IntegrityError
from sluice.provenance.artifacts import describe_directory
from sluice.training.adapter import CONFIG, WEIGHTS
from sluice.training.base_model import (
    SMOLLM2_WEIGHTS_DIGEST,
    build_tiny_llama,
    unpack_smollm2,
)
from sluice.training.recipe import load_recipe
from sluice.training.round_trip import PROBES_FILE, check_round_trip
from sluice.training.safetensors_file import read_float32, read_header, write_tensors
from sluice.training.train import completed_steps, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TRAIN_IN_A_PROCESS = """
import sys
from pathlib import Path
from sluice.training.recipe import load_recipe
from sluice.training.train import train
base, dataset, work = (Path(argument) for argument in sys.argv[1:])
train(base, dataset, load_recipe("tiny"), work)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("base")).folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    for name, count in (("train", 16), ("validation", 4)):
        rows = [
            {
                "id": f"{name}-{n}",
                "messages": [
                    {"role": "system", "content": "You answer questions about building."},
                    {"role": "user", "content": f"Context:\n- Board {n} is {'very ' * (n % 5)}long.\n\nQuestion: {n}?"},
                    {"role": "assistant", "content": f"Board {n} is long."},
                ],
            }
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def training_processes(work_dir: Path) -> list[int]:
    """Processes of this run: their command line names its folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sluice.training.entry" in arguments and str(work_dir / "automodel.yaml").encode() in arguments:
            found.append(int(entry.name))
    return found


def test_a_killed_run_resumes_to_the_same_adapter(base: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = load_recipe("tiny")
    reports: list[tuple[float, float, str]] = []
    whole = train(base, dataset, recipe, tmp_path / "whole", lambda *state: reports.append(state))

    assert (whole.steps, whole.resumed_from, whole.examples, whole.too_long) == (6, 0, 16, 0)
    assert [point.step for point in whole.curve] == [1, 2, 3, 4, 5, 6]
    assert whole.curve[-1].loss < whole.curve[0].loss
    assert whole.validation_loss is not None
    assert 0 < whole.validation_loss < 20
    assert (reports[0][0], reports[-1][0], reports[-1][1]) == (0, 6, 6)
    assert (whole.hardware["processes"], whole.hardware["backend"]) == (2, "gloo")
    assert sorted(path.name for path in whole.output_dir.iterdir()) == [CONFIG, WEIGHTS]
    assert len(read_header(whole.output_dir / WEIGHTS)) == 2 * 2 * 2

    # The same again, in a process that is killed with -9 as soon as a checkpoint is complete.
    work_dir = tmp_path / "interrupted"
    launcher = subprocess.Popen([sys.executable, "-c", TRAIN_IN_A_PROCESS, str(base), str(dataset), str(work_dir)])
    deadline = time.monotonic() + 200
    while completed_steps(work_dir, recipe) == 0:
        assert launcher.poll() is None, (work_dir / "train.log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 10
    while training_processes(work_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert training_processes(work_dir) == [], "training processes outlived their launcher"

    done = completed_steps(work_dir, recipe)
    resumed = train(base, dataset, recipe, work_dir)
    assert resumed.resumed_from == done
    if done < 6:
        assert "Loading checkpoint from" in (work_dir / "train.log").read_text()
    assert [point.loss for point in resumed.curve] == [point.loss for point in whole.curve]
    assert resumed.validation_loss == whole.validation_loss
    digests = [describe_directory(result.output_dir, "adapter").digest for result in (whole, resumed)]
    assert digests[0] == digests[1]

    # A finished run called again trains nothing: its adapter is collected from the last checkpoint.
    log = (work_dir / "train.log").read_bytes()
    again = train(base, dataset, recipe, work_dir)
    assert again.resumed_from == 6
    assert (work_dir / "train.log").read_bytes() == log
    assert describe_directory(again.output_dir, "adapter").digest == digests[0]

    # What PEFT loads scores the probes as training saw them; an adapter that is one factor off does not.
    assert whole.round_trip.difference < 1e-3
    assert [len(one["tokens"]) for one in whole.round_trip.probes] == [8, 8, 8, 8]
    assert whole.round_trip.probes == resumed.round_trip.probes
    weights = again.output_dir / WEIGHTS
    tensors = {
        name: values * np.float32(1.5 if "lora_B" in name else 1) for name, values in read_float32(weights).items()
    }
    write_tensors(weights, tensors)
    with pytest.raises(IntegrityError, match="differs by"):
        check_round_trip(base, again.output_dir, work_dir / PROBES_FILE, recipe)


def test_smollm2_is_unpacked_to_the_pinned_weights(tmp_path: Path) -> None:
    unpacked = unpack_smollm2(tmp_path / "smollm2")
    files = {entry.path: entry.digest for entry in describe_directory(unpacked.folder, "base-model").files}
    assert files["model.safetensors"] == SMOLLM2_WEIGHTS_DIGEST
    assert unpacked.metadata["parameters"] == 134_515_008
