"""The `sluice` command line. Errors name the cause and the way out; exit codes are listed in docs/cli.md."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points

import typer

from sluice.infra.errors import SluiceError
from sluice.pipelines.cli import (
    approvals,
    audit,
    chain,
    collect,
    explain,
    gate,
    history,
    judge,
    keys,
    output,
    recipe,
    release_control,
    releases,
    reproduce,
    runs,
    sites,
    stack,
    sweep,
    train,
)

# gRPC's C core writes its own log lines over ours (Milvus answers idle connections' pings with a scolding).
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

app = typer.Typer(
    name="sluice",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help=(
        "A model supply chain: from a production trace to a signed, gated, canaried model, and back.\n\n"
        "[bold]First steps[/]  `sluice demo` shows the whole loop with embedded parts. By hand: `sluice up`, then "
        "`sluice run reembed`, `sluice run retrain`, look at the candidate in MLflow, `sluice approve VERSION`."
    ),
)
stack.add_to(app)
runs.add_to(app)
sweep.add_to(app)
releases.add_to(app)
release_control.add_to(app)
approvals.add_to(app)
chain.add_to(app)
explain.add_to(app)
gate.add_to(app)
collect.add_to(app)
history.add_to(app)
audit.add_to(app)
reproduce.add_to(app)
keys.add_to(app)
sites.add_to(app)
recipe.add_to(app)
train.add_to(app)
judge.add_to(app)
# Applications bring verbs of their own (the demonstration does) without this package knowing them.
for entry in entry_points(group="sluice.commands"):
    app.command(name=entry.name)(entry.load())


def main() -> None:
    """Entry point of the console script."""
    wants_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
    except SluiceError as error:
        output.show_error(error, as_json=wants_json)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:  # noqa: BLE001  (the last resort: a sentence instead of a stack trace)
        code = output.show_unexpected(error, as_json=wants_json)
    sys.exit(code if isinstance(code, int) else 0)
