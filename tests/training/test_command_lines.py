"""The lines for machines without Kubernetes: executed by a real shell, with stand-ins for srun and the node's program,
and compared with the TrainJob field by field."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sluice.training.command_lines import slurm_script, torchrun_lines
from sluice.training.launcher import INTERRUPTED, ClusterJob
from sluice.training.train_job import train_job_body
from tests.training.cluster import big_job

SECRETS = {"SLUICE_OBJECT_STORE__ACCESS_KEY": "AKIA", "SLUICE_OBJECT_STORE__SECRET_KEY": "it's $secret"}
NODE = """#!/usr/bin/env python3
import json, os, signal, sys, time
def saved(number, frame):
    sys.exit(75)
signal.signal(signal.SIGTERM, saved)
folder = os.environ["NOTES"]
with open(f"{folder}/node-{os.environ['PET_NODE_RANK']}", "w") as stream:
    json.dump({"arguments": sys.argv[1:], "environment": dict(os.environ)}, stream)
time.sleep(float(os.environ.get("NODE_SECONDS", "0")))
sys.exit(int(os.environ.get("NODE_EXIT", "0")))
"""
SRUN = """#!/bin/bash
# As srun does: a task a node, SIGTERM passed on to each, the highest exit code.
while [[ "$1" == --* ]]; do echo "$1" >> "$NOTES/srun-options"; shift; done
for node in 0 1 2 3; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
highest=0
for task in "${tasks[@]}"; do
  wait "$task"; code=$?
  while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
  if (( code > highest )); then highest=$code; fi
done
exit $highest
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\nnode-c\\nnode-d\\n'; else echo "$@" >> "$NOTES/scontrol"; fi
"""


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `python`, `srun` and `scontrol` are stand-ins that take notes in $NOTES."""
    programs, notes = tmp_path / "bin", tmp_path / "notes"
    programs.mkdir()
    notes.mkdir()
    for name, text in (("python", NODE), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes)}


def run_script(job: ClusterJob, shell: dict[str, str], **more: str) -> subprocess.Popen[str]:
    path = Path(shell["NOTES"]) / "job.sh"
    path.write_text(slurm_script(job))
    environment = shell | SECRETS | {"SLURM_JOB_NODELIST": "node-[a-d]", "SLURM_JOB_ID": "77"} | more
    return subprocess.Popen(["bash", str(path)], env=environment, stderr=subprocess.PIPE, text=True)


def nodes_of(shell: dict[str, str]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(Path(shell["NOTES"]).glob("node-*"))]


def substance(job: ClusterJob) -> dict[str, Any]:
    """What a TrainJob starts on each node, and with what; Kubeflow's runtime adds PET_*."""
    spec = train_job_body(job)["spec"]
    given = {one["name"]: one.get("value") or SECRETS[one["name"]] for one in spec["trainer"]["env"]}
    given |= {"PET_NNODES": str(spec["trainer"]["numNodes"]), "PET_MASTER_PORT": "29500"}
    given |= {"PET_NPROC_PER_NODE": str(spec["trainer"]["numProcPerNode"])}
    return {"arguments": spec["trainer"]["command"][1:], "environment": given, "nodes": spec["trainer"]["numNodes"]}


def assert_same_as_train_job(job: ClusterJob, nodes: list[dict[str, Any]], address: str) -> None:
    wanted = substance(job)
    assert len(nodes) == wanted["nodes"]
    for rank, node in enumerate(nodes):
        assert node["arguments"] == wanted["arguments"]
        seen = {
            name: value for name, value in node["environment"].items() if name.startswith(("SLUICE_", "NCCL_", "PET_"))
        }
        assert seen == wanted["environment"] | {"PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": address}


def test_the_lines_start_what_the_train_job_starts(shell: dict[str, str]) -> None:
    job = big_job()
    lines = [line for line in torchrun_lines(job).splitlines() if not line.startswith("#")]
    environment = shell | SECRETS | {"MASTER_ADDR": "10.0.0.7"}
    started = [subprocess.Popen(["bash", "-c", line], env=environment) for line in lines]
    assert [one.wait(20) for one in started] == [0] * 4
    assert_same_as_train_job(job, nodes_of(shell), "10.0.0.7")
    spec = train_job_body(job)["spec"]
    grace = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert f"--kill-after={grace} {spec['activeDeadlineSeconds'] - grace} " in lines[0]


def test_a_line_without_its_secrets_ends_at_once(shell: dict[str, str]) -> None:
    line = torchrun_lines(big_job()).splitlines()[2]
    ended = subprocess.run(["bash", "-c", line], env=shell | {"MASTER_ADDR": "x"}, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "SLUICE_OBJECT_STORE__ACCESS_KEY" in ended.stderr
    assert nodes_of(shell) == []


def test_the_slurm_script_starts_what_the_train_job_starts(shell: dict[str, str]) -> None:
    job = big_job()
    script = run_script(job, shell)
    assert script.wait(20) == 0, script.stderr.read() if script.stderr else ""
    assert_same_as_train_job(job, nodes_of(shell), "node-a")
    assert not (Path(shell["NOTES"]) / "scontrol").exists()
    options = [line.removeprefix("#SBATCH ") for line in slurm_script(job).splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=4", "--ntasks-per-node=1", "--gres=gpu:8", "--requeue", "--signal=B:TERM@120"} <= set(options)
    # The notice comes when the deadline of the TrainJob does.
    minutes = next(int(one.removeprefix("--time=")) for one in options if one.startswith("--time="))
    assert minutes * 60 - 120 == job.deadline_s
    # srun must not end the other nodes as soon as one has saved.
    assert "--kill-on-bad-exit=0" in (Path(shell["NOTES"]) / "srun-options").read_text()


def test_a_notice_reaches_every_node_and_the_job_is_queued_again(shell: dict[str, str]) -> None:
    script = run_script(big_job(), shell, NODE_SECONDS="30")
    deadline = time.monotonic() + 15
    while len(nodes_of_if_whole(shell)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(signal.SIGTERM)
    assert script.wait(15) == INTERRUPTED
    assert (Path(shell["NOTES"]) / "scontrol").read_text() == "requeue 77\n"


def nodes_of_if_whole(shell: dict[str, str]) -> list[dict[str, Any]]:
    try:
        return nodes_of(shell)
    except ValueError:
        return []


def test_a_failure_is_not_queued_again(shell: dict[str, str]) -> None:
    script = run_script(big_job(), shell, NODE_EXIT="7")
    assert script.wait(15) == 7
    assert not (Path(shell["NOTES"]) / "scontrol").exists()


def test_a_longer_notice_is_asked_for() -> None:
    script = slurm_script(replace(big_job(), notice_s=300))
    assert "#SBATCH --signal=B:TERM@330" in script
