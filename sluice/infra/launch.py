"""Become a part: what supervisord starts, for each start and restart of one.

Ends what an earlier life of the same part left behind (a worker whose parent was killed still holds the port), sets
the environment from the part's own file, so that no secret passes through supervisord's configuration or a command
line, and then *becomes* the command, keeping its process id.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Started by its path: this works from a source tree as well as from an installed package.
sys.path.append(str(Path(__file__).resolve().parents[2]))

# What the shell of whoever typed `sluice up` first happens to hold must not configure the parts.
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")
_DROPPED_PREFIXES = ("AWS_", "MLFLOW_", "VLLM_", "S3_BUCKET", "S3_TABLE", "S3_EXTERNAL")
_LOOPBACK = "127.0.0.1,localhost"


def main(arguments: list[str]) -> None:
    """`launch.py HOME PART_FILE`: never returns; the exit code is the part's own, or 127 when it cannot start."""
    from sluice.infra.orphans import HOME_VARIABLE, PART_VARIABLE, end_processes, find_leaderless, find_processes
    from sluice.infra.services import ServiceSpec

    home, file = Path(arguments[0]), Path(arguments[1])
    spec = ServiceSpec.from_json(json.loads(file.read_text()))
    left_behind = [*find_processes(home, spec.name), *find_leaderless(os.getsid(0))]
    if left_behind:
        print(f"ending {len(left_behind)} process(es) that an earlier start of {spec.name} left", flush=True)
        end_processes(left_behind, grace_s=3.0)
    environment = inherited(dict(os.environ)) | dict(spec.environment)
    environment |= {PART_VARIABLE: spec.name, HOME_VARIABLE: str(home)}
    if spec.directory is not None:
        os.chdir(spec.directory)
    try:
        os.execvpe(spec.command[0], list(spec.command), environment)
    except OSError as error:
        print(f"cannot start {spec.command[0]!r}: {error.strerror}", flush=True)
        sys.exit(127)


def inherited(environment: dict[str, str]) -> dict[str, str]:
    """What a part takes over from the environment that supervision was started in."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES)
    }
    for name in ("no_proxy", "NO_PROXY"):
        kept[name] = ",".join(filter(None, (kept.get(name), _LOOPBACK)))
    return kept


if __name__ == "__main__":
    main(sys.argv[1:])
