"""Made-up journals that look like real ones: for the report, and for whoever wants to look at it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from sluice.training.journal import Event, Journal, Sample, StepMetrics, Validation

START = 1_772_000_000.0
PROMPTS = [
    ("Do I need a permit to put up a garden shed?", "No, up to 20 square metres no permit is needed; a notice is."),
    ("What <b>insulation</b> is allowed in a listed building?", "Calcium silicate boards, agreed with the authority."),
]
ANSWERS = (
    "the the of and shed of",
    "A garden shed is a building that is built in a garden and it may be",
    "You need a permit when the shed is larger than 20 square metres.",
    "No, up to 20 square metres no permit is needed, but a notice is.",
)


def write_journal(
    folder: Path, steps: int, *, validate: bool = True, broken: int | None = None, trouble: bool = True
) -> Path:
    """A run of `steps` steps in `folder`. `broken` is a step whose loss is NaN; `trouble` a kill, a roll-back, a hang.

    With trouble the run is killed at two thirds and resumed an hour later from a checkpoint some steps before.
    """
    random.seed(steps)
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    every = max(1, steps // 10)
    now = START
    journal.write(Event("started", "Training starts: 16 processes on 2 nodes (H100).", time=now))
    journal.write(Event("guard", "Spikes are judged after 20 steps.", 1, time=now))

    def do(number: int, attempt: int) -> None:
        nonlocal now
        share = number / steps
        loss = 0.45 + 1.6 * math.exp(-6 * share) + random.gauss(0, 0.05)
        spiky = trouble and number == steps // 3
        skipped = "not_finite" if number == broken else "gradient_spike" if spiky else None
        norm = 31.2 if spiky else 0.4 + 1.2 * math.exp(-5 * share) + abs(random.gauss(0, 0.08))
        seconds = 8.0 + abs(random.gauss(0, 0.15)) + (6 if number % every == 0 else 0)
        now += seconds
        journal.write(
            StepMetrics(
                number,
                math.nan if number == broken else loss,
                math.nan if number == broken else norm,
                3e-4 * min(1, number / max(1, steps / 20)) * 0.5 * (1 + math.cos(math.pi * share)),
                1_600_000,
                700_000,
                seconds,
                61.2,
                0.41 + random.gauss(0, 0.004),
                skipped,
                attempt,
                now,
            )
        )
        if spiky:
            sentence = f"Step {number}: the gradient norm 31.2 is 38 times the median of the last 50 steps; skipped."
            details = {"guard": "gradient_spike", "action": "skip"}
            journal.write(Event("guard", sentence, number, "warning", details, attempt, now))
        if number == broken:
            sentence = f"Step {number}: the loss is not a number; its update was skipped."
            details = {"guard": "not_finite", "action": "skip"}
            journal.write(Event("guard", sentence, number, "warning", details, attempt, now))
        if number % every == 0 or number == steps:
            if validate:
                journal.write(Validation(number, loss + 0.06 + 0.15 * share * share, now))
                for which, (prompt, reference) in enumerate(PROMPTS):
                    text = ANSWERS[min(3, int(share * 4))]
                    journal.write(Sample(number, which, prompt, text, reference, now))
            journal.write(
                Event("checkpoint", f"Saved step {number}: 41 MB in 0.6 s.", number, attempt=attempt, time=now)
            )
            journal.write(Event("uploaded", "Uploaded in 1.9 s.", number, attempt=attempt, time=now + 2))

    killed = steps * 2 // 3 if trouble and steps > 5 else steps
    for number in range(1, killed + 1):
        do(number, 0)
    if killed < steps:
        back = killed // every * every
        now += 3600
        journal.write(Event("launched", "Starting 16 training processes.", back, attempt=1, time=now))
        journal.write(Event("started", "Training starts: 16 processes on 2 nodes (H100).", back, attempt=1, time=now))
        damaged = f"The checkpoint of step {back} is damaged: model-00001.distcp has 12 bytes, not 41,000; set aside."
        journal.write(Event("checkpoint_damaged", damaged, back, "warning", {}, 1, now))
        back -= every
        journal.write(Event("resumed", f"Resumed from the checkpoint of step {back}.", back, attempt=1, time=now))
        for number in range(back + 1, steps + 1):
            do(number, 1)
    journal.write(Event("finished", f"All {steps} steps are done; the adapter was exported.", steps, time=now + 5))
    (folder / "hardware.json").write_text(
        json.dumps({"device": "NVIDIA H100 80GB HBM3", "accelerators": 16, "nodes": 2, "torch": "2.13.0", "cores": 192})
    )
    return folder
