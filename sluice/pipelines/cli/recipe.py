"""recipe list, show, check: what can be said in a recipe, and what one will need before anything starts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sluice.infra.errors import InputError
from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table

if TYPE_CHECKING:
    from sluice.training.dataset_facts import DatasetFacts
    from sluice.training.estimate import Estimate
    from sluice.training.model_shape import ModelShape
    from sluice.training.recipe import Recipe

DOES_NOT_FIT = 2
"""Exit code of a recipe that cannot run where it was checked: wrong input, as docs/cli.md lists it."""

recipe_app = typer.Typer(no_args_is_help=True, help="Training recipes: what there is, and what one will need.")


def add_to(app: typer.Typer) -> None:
    app.add_typer(recipe_app, name="recipe")


@recipe_app.command("list")
def list_recipes(as_json: JsonFlag = False) -> None:
    """The packaged recipes: method, machines, steps. A recipe is a YAML file; any path serves as well as a name."""
    from sluice.training.recipe import load_recipe, packaged_recipes

    rows: list[dict[str, Any]] = []
    for name in packaged_recipes():
        recipe = load_recipe(name)
        cut = recipe.parallelism
        rows.append(
            {
                "recipe": name,
                "method": recipe.method,
                "nodes": cut.nodes,
                "processes": cut.processes,
                "backend": cut.backend,
                "steps": recipe.schedule.max_steps,
                "row_tokens": recipe.data.row_length,
                "digest": recipe.digest,
            }
        )
    if as_json:
        show_json(rows)
        return
    columns = ["recipe", "method", "nodes", "processes", "backend", "steps", "row tokens", "digest"]
    show_table("recipes", columns, [[*list(row.values())[:-1], row["digest"][7:19]] for row in rows])


@recipe_app.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="Show its values beside the defaults")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Every field of a recipe: default, unit and meaning; with RECIPE also its value, where that is another one."""
    from sluice.infra.field_mistakes import known_fields
    from sluice.training.recipe import Recipe, load_recipe

    chosen = load_recipe(recipe) if recipe else None
    values = chosen.to_json() if chosen else {}
    rows = []
    for name, field in known_fields(Recipe).items():
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        default = list(default) if isinstance(default, tuple) else default
        row = {"field": name, "default": default, "required": field.is_required(), "meaning": field.description or ""}
        rows.append(row | ({"value": value} if chosen else {}))
    if as_json:
        show_json(rows)
        return
    section = ""
    table: list[list[Any]] = []
    for row in rows:
        above = row["field"].rpartition(".")[0]
        if above != section:
            section = above
            table.append([f"{section}:"])
        default = "required" if row["required"] else _value(row["default"])
        name = "  " * (row["field"].count(".")) + row["field"].rpartition(".")[2]
        cells = [name, default]
        if chosen:
            cells.append("" if row["value"] == row["default"] else _value(row["value"]))
        table.append([*cells, row["meaning"]])
    columns = ["field", "default", *([recipe] if chosen else []), "meaning"]
    show_table("recipe", columns, [line + [""] * (len(columns) - len(line)) for line in table])


@recipe_app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe's name, or a YAML file")],
    node_type: Annotated[
        str, typer.Option(help="Machine: p5.48xlarge, ..., `this`, or a YAML file of one. With gloo: this machine")
    ] = "",
    nodes: Annotated[int, typer.Option(min=0, help="Nodes instead of the recipe's; 0 keeps those")] = 0,
    base: Annotated[
        str,
        typer.Option(help="Base model: folder, config.json, digest, or llama-3.1-8b, ... With gloo: smollm2-135m"),
    ] = "",
    dataset: Annotated[
        str, typer.Option(help="Folder or digest: counts examples and tokens for steps and epochs")
    ] = "",
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars an hour of one node, instead of the list's")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Estimate memory, time and cost of a recipe on a node type, and say why it will not fit. Starts nothing.

    Ends with 0 when it fits and with 2 when it does not, so that a schedule can rely on it. What is assumed stands
    beside each line; docs/recipes.md tells what was measured.

    Examples: [bold]sluice recipe check demo[/],
    [bold]sluice recipe check llama-8b-lora-h100 --node-type p5.48xlarge --base llama-3.1-8b[/]
    """
    from sluice.training.estimate import estimate
    from sluice.training.node_types import NODE_TYPES, find_node_type
    from sluice.training.recipe import load_recipe

    chosen = load_recipe(recipe)
    if nodes:
        chosen = chosen.with_overrides({"parallelism.nodes": nodes})
    if not node_type and chosen.parallelism.backend == "nccl":
        raise InputError(
            f"The recipe {chosen.name} trains on accelerators; --node-type says on which.",
            hint=f"For example --node-type p5.48xlarge. Known: {', '.join(NODE_TYPES)}, or a YAML file.",
        )
    node = find_node_type(node_type or "this")
    with tempfile.TemporaryDirectory() as scratch:
        shape, base_dir = _find_base(base, chosen, Path(scratch))
        facts = _find_dataset(dataset, chosen, base_dir)
    found = estimate(chosen, shape, node, price=price, data=facts)
    if as_json:
        show_json(found.to_json())
    else:
        _show(found, facts)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _find_base(base: str, recipe: Recipe, scratch: Path) -> tuple[ModelShape, Path | None]:
    """The base's shape, and the folder of its tokenizer where it has one here. `InputError` when it is not known."""
    from sluice.training.model_shape import KNOWN, read_shape

    base = base or recipe.base or ("" if recipe.parallelism.backend == "nccl" else "smollm2-135m")
    if not base:
        raise InputError(
            f"The recipe {recipe.name} names no base model; --base says which.",
            hint=f"A folder, a config.json, a digest, or one of: {', '.join(KNOWN)}.",
        )
    if base in KNOWN:
        return KNOWN[base], None
    if base.startswith("sha256:"):
        from sluice.components.workspace import open_workspace
        from sluice.provenance.canonical import require_digest

        workspace, digest = open_workspace(), require_digest(base, "--base")
        held = {file.path for file in workspace.artifacts.manifest(digest).files}
        for name in held & {"config.json", "tokenizer.json", "chat_template.jinja"}:
            # Not the weights: a check must not fetch what training will.
            (scratch / name).write_bytes(workspace.file(digest, name))
        return read_shape(scratch), scratch
    path = Path(base)
    return read_shape(path), path if path.is_dir() else path.parent


def _find_dataset(dataset: str, recipe: Recipe, base_dir: Path | None) -> DatasetFacts | None:
    from sluice.training.dataset_facts import measure_dataset

    dataset = dataset or recipe.data.digest or ""
    if not dataset:
        return None
    folder = Path(dataset)
    if dataset.startswith("sha256:"):
        from sluice.components.workspace import open_workspace
        from sluice.provenance.canonical import require_digest

        folder = open_workspace().folder(require_digest(dataset, "--dataset"))
    return measure_dataset(folder, recipe.data.max_length, base_dir)


def _show(found: Estimate, facts: DatasetFacts | None) -> None:
    from sluice.training.estimate import duration
    from sluice.training.node_types import GIB

    node = found.node
    what = f"{node.accelerators} x {node.accelerator}" if node.accelerators else f"{node.vcpus} cores"
    count = f"{found.nodes} x " if found.nodes > 1 else ""
    console.print(
        f"[bold]{escape(found.recipe)}[/] on {count}{escape(node.name)} ({what}), base {escape(found.base)}: "
        f"{found.parameters:,} parameters, {found.trainable:,} trained\n"
    )
    rows: list[list[Any]] = [[part.name, f"{part.bytes / GIB:7.2f}", part.formula] for part in found.memory]
    rows.append(["sum", f"{found.needed / GIB:7.2f}", f"of {found.limit / GIB:.2f} usable (94%)"])
    show_table(f"memory of one {'accelerator' if node.accelerators else 'process'}", ["", "    GiB", "how"], rows)
    console.print()
    rows = [[part.name, duration(part.seconds), part.formula] for part in found.time]
    rows.append(["sum", duration(found.seconds), f"{found.tokens_per_second:,.0f} tokens/s; {found.utilisation}"])
    if found.dollars is not None and found.dollars:
        hourly = found.dollars / found.seconds * 3600 / found.nodes
        rows.append(["cost", f"${found.dollars:,.2f}", f"{found.nodes} x ${hourly:,.2f} an hour"])
    elif found.dollars is None:
        rows.append(["cost", "unknown", f"no on-demand price for {node.name}; --price gives one"])
    show_table("time and cost", ["", "", "how"], rows)
    if facts is not None and found.epochs is not None:
        console.print(
            f"\n{facts.examples} examples of {facts.mean_tokens:.0f} tokens on average: "
            f"{found.steps} steps are {found.epochs:.1f} epochs"
        )
    console.print()
    for note in found.notes:
        console.print(f"[dim]note[/] {escape(note)}")
    for number, change in enumerate(found.changes):
        console.print(f"[yellow]{'this would fit' if not number else 'or'}[/] {escape(change)}")
    if found.problems and not found.changes and found.needed > found.limit:
        console.print("[yellow]no change of the recipe that was tried fits this node type[/]")
    console.print(f"{'[green]✔[/]' if found.fits else '[red]✘[/]'} {escape(found.verdict)}")


def _value(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)
