"""What the training library says to the probe prompts with an adapter: made once for each adapter, and found again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sluice.components.task import Task
from sluice.provenance.steps import StepOutput

if TYPE_CHECKING:
    from sluice.serving.parity import ReferenceAnswer

FILE = "reference.json"


def reference_step(
    running: Task, *, adapter: str, base: str, prompts: Sequence[str], max_tokens: int
) -> tuple[ReferenceAnswer, ...]:
    """The training library's answers, one for each prompt. Ten seconds for a small model, nothing the second time."""
    from sluice.serving.parity import ReferenceAnswer

    def work(folder: Path) -> StepOutput:
        from sluice.training.parity_reference import make_reference

        workspace = running.workspace
        running.report(0, 1, "asking the training library")
        found = make_reference(workspace.folder(base), workspace.folder(adapter), prompts, max_tokens)
        made = workspace.artifacts.put_files(
            {FILE: json.dumps(found).encode()}, "parity-reference", {"adapter": adapter, "base": base}
        )
        return StepOutput({"reference": made.digest}, {"tokens": sum(len(one["steps"]) for one in found)})

    record = running.step(
        "probe-reference",
        rooms=(
            "training.base_model",
            "training.chat_template",
            "training.parity_reference",
            "training.round_trip",
            "components.parity_reference",
        ),
        parameters={"prompts": list(prompts), "max_tokens": max_tokens},
        inputs={"adapter": adapter, "base": base},
        function=work,
    )
    content = json.loads(running.workspace.file(record.output.artifacts["reference"], FILE))
    return tuple(ReferenceAnswer.from_json(one) for one in content)
