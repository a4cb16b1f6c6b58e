"""train, preflight: a recipe here or on a cluster's schedulers, and the network between the processes that train."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sluice.infra.errors import InputError
from sluice.pipelines.cli.output import JsonFlag, console, progress_line, show_json, show_table
from sluice.provenance.canonical import Json, require_digest

if TYPE_CHECKING:
    from sluice.training.launcher import ClusterJob
    from sluice.training.preflight_report import PreflightReport

_DIGEST = r"^sha256:[0-9a-f]{64}$"


class Form(StrEnum):
    """What --print can show."""

    TRAINJOB = "trainjob"
    PYTORCHJOB = "pytorchjob"
    TORCHRUN = "torchrun"
    SLURM = "slurm"


def add_to(app: typer.Typer) -> None:
    app.command("train")(train)
    app.command("preflight")(preflight)


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe by name, or a YAML file")],
    dataset: Annotated[str, typer.Option("--dataset", metavar="DIGEST", help="Dataset artifact to train on")] = "",
    base: Annotated[str, typer.Option("--base", metavar="DIGEST", help="Base model artifact to start from")] = "",
    param: Annotated[list[str] | None, typer.Option("--set", "-s", help="FIELD=VALUE of the recipe; often")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="This attempt's size; it goes on where another size was")
    ] = None,
    form: Annotated[Form | None, typer.Option("--print", help="Show how the cluster is asked, start nothing")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Instead of the recipe's number")] = None,
    node_type: Annotated[str, typer.Option("--node-type", help="Instead of the setting training.node_type")] = "",
    image: Annotated[str, typer.Option("--image", help="Instead of the setting training.image: NAME@sha256:...")] = "",
    queue: Annotated[str, typer.Option("--queue", help="Instead of the setting training.queue")] = "",
    claim: Annotated[str, typer.Option("--claim", help="Instead of the setting training.claim")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Train a recipe as one step, outside of a pipeline; what broke goes on where it was when run again.

    Ends with exit code 75 when it was told to stop (SIGTERM) and saved. With --print nothing starts: it shows the
    recipe as a TrainJob, a PyTorchJob, one line a node, or a Slurm script. All start the same processes, and the output
    can be piped: [bold]sluice train big --print trainjob | kubectl apply -f -[/] (docs/cluster-training.md).

    Examples: [bold]sluice train demo --dataset sha256:3f2a... --base sha256:91c0... -s schedule.max_steps=20[/]

    [bold]sluice train big.yaml --print slurm --nodes 4 --node-type p5.48xlarge[/]
    """
    from sluice.pipelines.training import overrides_of

    overrides = overrides_of(param or [])
    if nodes is not None:
        overrides["parallelism.nodes"] = nodes
    options = {"node_type": node_type, "image": image, "queue": queue, "claim": claim}
    given = {name: value for name, value in options.items() if value}
    if form is None:
        _train_now(recipe, dataset, base, overrides, given, processes, as_json)
        return
    job = _job(recipe, dataset, base, overrides, given)
    # Plain text, as programs read it: no markup, no wrapping.
    print(_printed(job, form), end="")


def _train_now(
    recipe: str,
    dataset: str,
    base: str,
    overrides: dict[str, Json],
    options: dict[str, str],
    processes: int | None,
    as_json: bool,
) -> None:
    from sluice.infra.access import require
    from sluice.infra.settings import load_settings
    from sluice.pipelines.training import train_once

    for name, value in (("dataset", dataset), ("base", base)):
        if not value:
            raise InputError(
                f"--{name} is missing.",
                hint=f"Give the digest of a {name} artifact; `sluice runs` shows what made one.",
            )
    settings = load_settings()
    require(settings, "train", recipe)
    settings = settings.model_copy(update={"training": settings.training.model_copy(update=options)})
    with progress_line(as_json) as report:
        done = train_once(
            settings,
            recipe,
            dataset=require_digest(dataset, "--dataset"),
            base=require_digest(base, "--base"),
            overrides=overrides,
            report=report,
            processes=processes,
        )
    if as_json:
        show_json(done)
        return
    for name in ("adapter", "model", "merged", "training"):
        if name in done["artifacts"]:
            console.print(f"{name:<9} {done['artifacts'][name]}")
    console.print(f"[green]✔[/] {escape(done['summary'])}")


def preflight(
    processes: Annotated[int, typer.Option("--processes", min=1, help="Of this node; one for each accelerator")] = 2,
    node_type: Annotated[str, typer.Option("--node-type", help="An instance type, or laptop")] = "laptop",
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Run the same command on each node")] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", min=0, help="This node's number, from 0")] = 0,
    address: Annotated[str, typer.Option("--address", help="Node 0's address, the same on every node")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Node 0's port; 0 takes a free one on a single node")] = 0,
    join_seconds: Annotated[float, typer.Option("--join-seconds", min=1, help="Wait so long for the others")] = 60.0,
    as_json: JsonFlag = False,
) -> None:
    """Measure the network between training processes and compare it with what the node type must reach.

    An all-reduce ladder (gloo for `laptop`, NCCL for everything else), devices, provider and clocks. It ends with exit
    code 7 and named causes when training must not start.

    Examples: [bold]sluice preflight --processes 2[/]

    [bold]sluice preflight --node-type p5.48xlarge --processes 8 --nodes 4 --node-rank 1 --address 10.0.0.7 --port 29400
    [/]
    """
    from sluice.training.preflight_floors import FLOORS
    from sluice.training.preflight_launch import PreflightPlan, require_passed, run_preflight

    if node_type not in FLOORS:
        raise InputError(f"--node-type {node_type!r} has no floors.", hint=f"Known are: {', '.join(FLOORS)}.")
    if nodes > 1 and (address == "127.0.0.1" or not port):
        raise InputError("Over several nodes all of them need node 0's --address and --port.")
    if node_rank >= nodes:
        raise InputError(f"--node-rank {node_rank} is not below --nodes {nodes}: nodes are counted from 0.")
    backend = "gloo" if node_type == "laptop" else "nccl"
    plan = PreflightPlan(node_type, backend, processes, nodes, node_rank, address, port, join_seconds)
    with progress_line(as_json) as report:
        found = run_preflight(plan, report)
    if as_json:
        show_json(found.to_json())
        raise typer.Exit(0 if found.passed else 7)
    _show(found)
    require_passed(found)


def _job(recipe: str, dataset: str, base: str, overrides: dict[str, Json], options: dict[str, str]) -> ClusterJob:
    import re

    from sluice.infra.settings import load_settings
    from sluice.provenance.canonical import digest_json
    from sluice.training.launcher import cluster_job
    from sluice.training.recipe import load_recipe

    for name, value in (("dataset", dataset), ("base", base)):
        if value and not re.match(_DIGEST, value):
            raise InputError(
                f"--{name} {value!r} is no digest.", hint="It looks like sha256:3f2a... with 64 hex digits."
            )
    settings = load_settings()
    loaded = load_recipe(recipe).with_overrides(overrides)
    training = settings.training.model_copy(update=options)
    # On a cluster the image is the code. The same inputs in the same image have the same name, and train once.
    key = digest_json({"recipe": loaded.digest, "dataset": dataset, "base": base, "image": training.image})
    inputs = {"sluice.dev/dataset": dataset, "sluice.dev/base": base}
    given = {name: value for name, value in inputs.items() if value}
    return cluster_job(loaded, key, training, settings.object_store, annotations=given)


def _printed(job: ClusterJob, form: Form) -> str:
    from sluice.training.command_lines import slurm_script, torchrun_lines
    from sluice.training.pytorch_job import pytorch_job_body
    from sluice.training.train_job_launcher import as_yaml, describe_train_job

    if form is Form.TRAINJOB:
        return describe_train_job(job)
    if form is Form.PYTORCHJOB:
        return as_yaml(pytorch_job_body(job))
    return torchrun_lines(job) if form is Form.TORCHRUN else slurm_script(job)


def _show(found: PreflightReport) -> None:
    from sluice.training.preflight_report import size_text

    show_table(
        f"{found.nodes} x {found.node_type}, {found.processes} processes, {found.backend}, {found.seconds:.1f} s",
        ["size", "time (us)", "algorithm (GB/s)", "bus (GB/s)", "floor (GB/s)"],
        [
            [
                size_text(rung.size),
                f"{rung.seconds * 1e6:.0f}",
                f"{rung.algorithm_bandwidth:.2f}",
                f"{rung.bus_bandwidth:.2f}",
                f"{found.floor[rung.size]:.2f}" if rung.size in found.floor else "-",
            ]
            for rung in found.rungs
        ],
        empty="no all-reduce was run",
    )
    if found.rungs and found.floor_source:
        console.print(f"[dim]floor: {escape(found.floor_source)}[/]")
    # What blocks is the command's error, after this.
    for finding in found.findings:
        if not finding.blocking:
            console.print(f"[yellow]![/] {finding.cause}: {escape(finding.sentence)}")
    if found.passed:
        console.print("[green]✔[/] The network is good enough to train.")
