"""gate explain, gate check, suite list, suite show, suite check: why a gate decided so, and what it will ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sluice.pipelines.cli.output import JsonFlag, console, show_json, show_table

if TYPE_CHECKING:
    from sluice.components.decisions import Found
    from sluice.components.workspace import Workspace
    from sluice.evaluation.explanation import Explanation
    from sluice.evaluation.policy import Policy
    from sluice.evaluation.scores import Metric
    from sluice.evaluation.suite import Suite

EXIT_CODES = {"pass": 0, "fail": 10, "inconclusive": 11}
"""With what `gate explain --exit-code` ends, as docs/cli.md lists it."""
_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}

gate_app = typer.Typer(no_args_is_help=True, help="Gate decisions: why one came out so; whether a policy is right.")
suite_app = typer.Typer(no_args_is_help=True, help="Evaluation suites: what is asked, measured and required.")

SuiteArgument = Annotated[str, typer.Argument(metavar="SUITE", help="A bundled suite's name, a folder, or a YAML file")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(gate_app, name="gate")
    app.add_typer(suite_app, name="suite")


@gate_app.command("explain")
def explain_decision(
    version: Annotated[
        str,
        typer.Argument(metavar="[VERSION]", help="Version's number in MLflow, or a digest; empty: latest decision"),
    ] = "",
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 0 for pass, 10 for fail, 11 for inconclusive")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Tell why the gate decided so: each check with what it needed and showed, and what to do next.

    Read from the signed decision in the chain; nothing is computed again. A digest may be that of a candidate, a
    report or a decision, or its beginning.

    Examples: [bold]sluice gate explain[/], [bold]sluice gate explain 3[/],
    [bold]sluice gate explain --exit-code --json[/]
    """
    from sluice.components.decisions import explanation_of
    from sluice.components.workspace import open_workspace

    workspace = open_workspace()
    found, number = _find(workspace, version)
    explained = explanation_of(workspace, found, now=datetime.now(UTC), version=number)
    if as_json:
        show_json({"digest": found.digest, **explained.to_json(), "decision": found.decision.to_json()})
    else:
        _show(found, explained)
    if exit_code:
        raise typer.Exit(EXIT_CODES[found.decision.verdict])


def _find(workspace: Workspace, version: str) -> tuple[Found, int | None]:
    from sluice.components.decisions import find_decision

    if version.isdigit() and len(version) < 8:
        from sluice.pipelines.approvals import find_candidate

        known = find_candidate(workspace, version)
        return find_decision(workspace, known.tags.get("decision") or known.digest), known.number
    return find_decision(workspace, version), None


def _show(found: Found, explained: Explanation) -> None:
    from sluice.evaluation.explanation import subject_line

    verdict = explained.verdict
    console.print(f"[bold {_COLOURS[verdict]}]{verdict.upper()}[/]  {escape(subject_line(found.decision))}\n")
    console.print(f"{escape(explained.paragraph)}\n")
    columns = ["metric", "slice", "champion", "candidate", "difference", "needed", "verdict"]
    rows = []
    for row in explained.rows:
        verdict = f"{row.verdict} ({row.gates})" if row.gates else row.verdict
        rows.append([row.metric, row.slice, row.champion, row.candidate, row.difference, row.needed, verdict])
    show_table("checks", columns, rows)
    console.print()
    _show_pairs([*explained.notes, ("next", explained.next_step)])
    console.print(f"\n[dim]decision {found.digest}, decided {found.decision.created[:16].replace('T', ' ')} UTC[/]")


def _show_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """What, and what is said of it: two columns."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for about, says in pairs:
        table.add_row(f"[bold]{about}[/]", escape(says))
    console.print(table)


@gate_app.command("check")
def check_policy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A gate policy, a suite, or a suite's folder")],
    as_json: JsonFlag = False,
) -> None:
    """Validate a gate policy against its suite (suite.yaml beside it); every mistake is told with its line.

    Example: [bold]sluice gate check suites/mine/gate.yaml[/]
    """
    from sluice.evaluation.policy import parse_policy
    from sluice.evaluation.suite import SUITE_FILE, load_suite
    from sluice.infra.yaml_file import read_text

    beside = file.parent / SUITE_FILE
    if file.is_dir() or file.name == SUITE_FILE:
        suite = load_suite(file)
    elif beside.is_file() and _names_policy(beside, file.name):
        suite = load_suite(beside)
    else:
        suite = None
    policy = suite.policy if suite else parse_policy(read_text(file, "gate policy"), str(file))
    against = suite.name if suite else ""
    if as_json:
        show_json({"file": str(file), "suite": against, "policy": policy.model_dump(mode="json")})
        return
    _show_policy(policy, suite.catalogue if suite else {})
    by_itself = "valid by itself; no suite beside it names it, so metrics and slices were not checked"
    console.print(
        f"[green]✔[/] {escape(file.name)}: {f'valid with the suite {escape(against)}' if against else by_itself}"
    )


def _names_policy(suite: Path, name: str) -> bool:
    """Whether the suite's file names this policy: a mistake in either is then told with the other in sight."""
    from sluice.infra.yaml_file import read_text, read_yaml

    return read_yaml(read_text(suite, "suite"), str(suite), "suite").values.get("policy") == name


@suite_app.command("list")
def list_suites(as_json: JsonFlag = False) -> None:
    """The bundled suites: what each measures and requires. Any folder with a suite.yaml serves as well as a name."""
    from sluice.evaluation.suite import bundled_suite, bundled_suites

    suites = [bundled_suite(name) for name in bundled_suites()]
    rows: list[dict[str, Any]] = [
        {
            "suite": one.name,
            "title": one.title,
            "metrics": len(one.measured),
            "checks": len(one.policy.checks),
            "gating": [check.metric for check in one.policy.gating],
            "digest": one.digest,
        }
        for one in suites
    ]
    if as_json:
        show_json(rows)
        return
    columns = ["suite", "title", "metrics", "checks", "gating", "digest"]
    show_table(
        "suites", columns, [[*list(row.values())[:4], ", ".join(row["gating"]), row["digest"][7:19]] for row in rows]
    )


@suite_app.command("show")
def show_suite(suite: SuiteArgument, as_json: JsonFlag = False) -> None:
    """What a suite asks, measures and requires, with every metric's meaning and source.

    Example: [bold]sluice suite show demo[/]
    """
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    if as_json:
        show_json({"digest": chosen.digest, "files": dict(chosen.files), **chosen.model_dump(mode="json")})
        return
    console.print(f"[bold]{escape(chosen.name)}[/]  {escape(chosen.title)}  [dim]{chosen.digest[7:19]}[/]\n")
    _show_pairs(_asked(chosen))
    console.print()
    known = chosen.catalogue
    rows = [
        [name, "higher" if known[name].higher_is_better else "lower", known[name].description, known[name].source]
        for name in chosen.measured
    ]
    show_table("metrics", ["metric", "better", "meaning", "source"], rows)
    console.print()
    _show_policy(chosen.policy, known)


@suite_app.command("check")
def check_suite(suite: SuiteArgument, as_json: JsonFlag = False) -> None:
    """Validate a suite with its policy and its files; every mistake is told with file and line.

    Example: [bold]sluice suite check suites/mine[/]
    """
    from sluice.evaluation.suite import find_suite

    chosen = find_suite(suite)
    if as_json:
        show_json({"suite": chosen.name, "digest": chosen.digest, "files": dict(chosen.files)})
        return
    names = f", with {', '.join(chosen.files)}" if chosen.files else ""
    console.print(f"[green]✔[/] {escape(chosen.name)}: {len(chosen.policy.checks)} checks{escape(names)}")
    console.print(f"[dim]digest {chosen.digest}[/]")


def _asked(suite: Suite) -> list[tuple[str, str]]:
    items = suite.items
    source = "the frozen holdout" if items.source == "holdout" else items.file
    limit = f"at most {items.limit} of " if items.limit else ""
    told = [("items", f"{limit}{source}, answers of at most {suite.generation.max_tokens} tokens")]
    if suite.sequential:
        told.append(
            ("sequential", f"looks every {suite.sequential.batch} items, and stops when the decision is certain")
        )
    if judged := suite.judged:
        calibrated = (
            f"calibrated on {judged.calibration}" if judged.calibration else "never calibrated, so never gating"
        )
        told.append(("judge", f"{len(judged.metrics)} metrics, {calibrated}"))
    if suite.benchmarks:
        told.append(("benchmarks", ", ".join(suite.benchmarks.tasks)))
    if suite.safety:
        told.append(("safety", ", ".join(suite.safety.probes)))
    if suite.speed:
        told.append(("speed", f"{suite.speed.requests} requests to each release in turn"))
    return told


def _show_policy(policy: Policy, known: Mapping[str, Metric]) -> None:
    from sluice.evaluation import wording

    rows = []
    for check in policy.checks:
        budget = f"{policy.error_budget_of(check):.1%}"
        gates = "advisory" if check.advisory else "gates"
        rows.append(
            [
                check.metric,
                check.slice,
                wording.need(check, known.get(check.metric)),
                policy.minimum_n_of(check),
                budget,
                gates,
            ]
        )
    show_table("policy", ["metric", "slice", "needed", "minimum n", "error budget", ""], rows)
    second = f"; two people approve a change of {', '.join(policy.second_approver)}" if policy.second_approver else ""
    console.print(
        f"{policy.confidence:.0%} confidence, correction {policy.correction}, valid for {policy.valid_days:g} days"
        f"{escape(second)}\n"
    )
