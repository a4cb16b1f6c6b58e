"""Trains a prepared run in a process of its own, that a test may kill: `-m tests.support.training_driver JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sluice.infra.errors import SluiceError
from sluice.training.checkpoint_mirror import CheckpointMirror
from sluice.training.recipe import Recipe
from sluice.training.train import prepare
from tests.support.directory_store import DirectoryStore
from tests.support.warm_ranks import WarmLauncher


def main(text: str) -> int:
    wanted = json.loads(text)
    recipe = Recipe.model_validate(wanted["recipe"], strict=False)
    paths = [Path(wanted[name]) for name in ("base", "dataset", "work")]
    prepared = prepare(paths[0], paths[1], recipe, paths[2], recipe.schedule.max_steps)
    mirror = CheckpointMirror(DirectoryStore(Path(wanted["mirror"])), "checkpoints/run") if wanted["mirror"] else None
    launcher = WarmLauncher(prepared.job, mirror=mirror, address=Path(wanted["address"]), poll_s=0.02)
    try:
        launcher.run()
    except SluiceError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
