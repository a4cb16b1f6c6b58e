"""release status, watch, pause, resume, promote, abort, history, drift, metrics: a rollout under way, and those before.

Whatever only looks reads the store and the gateway, and works when registry and object store are down.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sluice.infra.access import require
from sluice.infra.errors import ConflictError, InputError
from sluice.infra.settings import Settings, load_settings
from sluice.pipelines.cli.output import JsonFlag, console, show_json

if TYPE_CHECKING:
    from sluice.serving.control import OrderKind
    from sluice.serving.rollout_facts import RolloutFacts
    from sluice.serving.rollout_state import RolloutState

release_app = typer.Typer(no_args_is_help=True, help="Watch the rollout under way, steer it, end it.")

_START = "`sluice approve VERSION` starts one; `sluice release history` lists those before."
_INTERVAL_S = 0.5
_WIDE = 140
_HEAD_LINES = 30
"""Of the live view, above the events."""

Release = Annotated[
    str,
    typer.Argument(metavar="[RELEASE]", help="Digest, its first digits or the served name; the one under way without"),
]
Why = Annotated[str, typer.Option("--reason", help="Why: kept in the rollout's record and shown to everybody")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(release_app, name="release")


@release_app.command("status")
def status(release: Release = "", as_json: JsonFlag = False) -> None:
    """Show who answers users now, and where the rollout stands: steps, time left, every metric, what is missing."""
    from sluice.pipelines.cli.rollout_view import RolloutView

    facts = _facts(load_settings(), release, servers=True)
    if as_json:
        show_json(facts.to_json())
        return
    console.print(RolloutView(facts, events=0))


@release_app.command("watch")
def watch(release: Release = "") -> None:
    """Follow a rollout live until it ends. Ctrl-C ends the watching and leaves the rollout alone.

    Each metric is drawn as its interval between "as stable", the line above which it fails and its margin; worse is to
    the right. The intervals hold however often one looks.
    """
    from rich.live import Live

    from sluice.pipelines.cli.rollout_view import RolloutView, event_line

    settings = load_settings()
    facts = _facts(settings, release)
    state = _under_way(facts)
    if not console.is_terminal:
        told = 0
        while True:
            assert facts.rollout is not None
            for event in facts.rollout.events[told:]:
                console.print(event_line(event), soft_wrap=True)
            told = len(facts.rollout.events)
            if facts.rollout.ended:
                return
            time.sleep(_INTERVAL_S)
            facts = _facts(settings, state.release)
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while True:
                live.update(RolloutView(facts, events=max(console.height - _HEAD_LINES, 3)), refresh=True)
                if facts.rollout is None or facts.rollout.ended:
                    return
                time.sleep(_INTERVAL_S)
                facts = _facts(settings, state.release)
    except KeyboardInterrupt:
        console.print("[dim]No longer watched; the rollout goes on. `sluice release abort` would end it.[/]")


@release_app.command("pause")
def pause(release: Release = "", reason: Why = "", as_json: JsonFlag = False) -> None:
    """Keep the canary's share as it is. It is still compared with stable, and still rolled back when it fails."""
    _order("pause", release, reason, as_json=as_json)


@release_app.command("resume")
def resume(release: Release = "", reason: Why = "", as_json: JsonFlag = False) -> None:
    """Go on after a pause; the time of the step goes on where it stood.

    Without a rollout under way it ends the cool-down after a failed one, and says why.
    """
    from sluice.components.rollout_facts import store_of

    settings = load_settings()
    facts = _facts(settings, release)
    if not facts.cooling_s() or (facts.rollout is not None and not facts.rollout.ended):
        _order("resume", release, reason, as_json=as_json)
        return
    identity = require(settings, "release resume", reason)
    store_of(settings).end_cool_down(identity, reason.strip())
    if as_json:
        show_json({"order": "resume", "cool_down": "ended", "by": identity, "reason": reason})
        return
    console.print(f"{escape(identity)} ended the cool-down; the next rollout may begin.")


@release_app.command("promote")
def promote(
    reason: Annotated[str, typer.Option(help="Why it need not wait: kept in the rollout's record and the ledger")],
    release: Release = "",
    as_json: JsonFlag = False,
) -> None:
    """Let it answer everybody without waiting for the samples and times of the steps that are left.

    What has failed stays failed, and the gate's decision and the approval are asked for all the same.
    """
    _order("promote", release, reason, as_json=as_json)


@release_app.command("abort")
def abort(
    reason: Annotated[str, typer.Option(help="Why: kept in the rollout's record; the release cannot rise again")],
    as_json: JsonFlag = False,
) -> None:
    """End the rollout under way: everybody back on stable, the release marked as failed. Needs only the gateway."""
    from sluice.pipelines.cli.releases import go_back

    go_back("release abort", reason, promoted_too=False, as_json=as_json)


@release_app.command("history")
def history(
    release: Annotated[str, typer.Argument(metavar="[RELEASE]", help="Only this one: digest or name")] = "",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the timeline of RELEASE as a page that needs no network")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List all rollouts: release, begin, how it ended, on whose word, its worst metric. `--html` draws one of them."""
    settings = load_settings()
    facts = _facts(settings, release)
    if html is not None:
        from sluice.components.rollout_report import write_page

        if facts.rollout is None:
            raise ConflictError("No rollout was ever begun.", hint="`sluice approve VERSION` starts one.")
        write_page(settings, facts.rollout, html)
        if as_json:
            show_json({"release": facts.rollout.release, "page": str(html)})
        else:
            console.print(f"{escape(facts.rollout.target.served_name)}: {escape(str(html))}")
        return
    rows = [_row(state) for state in reversed(facts.states) if not release or state == facts.rollout]
    if as_json:
        show_json(rows)
        return
    console.print(_table(rows) if rows else "rollouts: none yet")


@release_app.command("drift")
def drift(
    repair: Annotated[bool, typer.Option("--repair", help="Make it so: gateway, servers and aliases")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare what is live with what should be: routes in the gateway, adapters on servers, champion, aliases.

    Ends with 6 when something differs and was not repaired.
    """
    from sluice.pipelines.drift import find_drift, repair_drift

    settings = load_settings()
    if repair:
        require(settings, "release drift repair")
        done = repair_drift(settings)
    found = find_drift(settings)
    if as_json:
        show_json({"differs": [vars(one) for one in found], "repaired": list(done) if repair else []})
    else:
        for sentence in done if repair else ():
            console.print(f"[green]✓[/] {escape(sentence)}")
        for one in found:
            console.print(f"[yellow]![/] {one.part}: {escape(one.sentence)}")
        if not found:
            console.print("Everything is as it should be.")
    if found:
        raise typer.Exit(6)


@release_app.command("metrics")
def metrics(
    file: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Replace this file: for node_exporter's textfile collector"),
    ] = None,
    serve: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Answer Prometheus at 127.0.0.1")] = 0,
) -> None:
    """Print the rollout's metrics as Prometheus reads them, write them to a file, or serve them.

    `--serve` answers GET /metrics until Ctrl-C, with figures of that moment.
    """
    from sluice.serving.durable import replace_file
    from sluice.serving.rollout_metrics import exposition

    settings = load_settings()
    if serve:
        from sluice.pipelines.metrics_server import serve_metrics

        console.print(f"http://127.0.0.1:{serve}/metrics")
        serve_metrics(serve, lambda: exposition(_facts(settings)))
        return
    text = exposition(_facts(settings))
    if file is None:
        print(text, end="")
    else:
        replace_file(file, text)


def _order(kind: OrderKind, release: str, reason: str, *, as_json: bool) -> None:
    from sluice.components.rollout_facts import store_of
    from sluice.serving.control import Order

    settings = load_settings()
    identity = require(settings, f"release {kind}", reason)
    facts = _facts(settings, release)
    state = _under_way(facts)
    store_of(settings).place_order(state.release, Order(kind, identity, reason.strip(), time.time()))
    idle = not facts.lease.held
    if as_json:
        show_json({"order": kind, "release": state.release, "by": identity, "reason": reason, "controller": not idle})
        return
    console.print(f"{escape(identity)} told the rollout of {escape(state.target.served_name)} to {kind}.")
    if idle:
        console.print("[yellow]No controller is at work now; the next one obeys (`sluice run release`).[/]")


def _facts(settings: Settings, release: str = "", *, servers: bool = False) -> RolloutFacts:
    """Facts about the rollout that `release` names. Raises `InputError` when it names none or several."""
    from sluice.components.rollout_facts import gather, store_of

    if not release:
        return gather(settings, servers=servers)
    states = store_of(settings).states()
    digits = release.removeprefix("sha256:")
    found = [
        state
        for state in states
        if release == state.target.served_name or (digits and state.release.removeprefix("sha256:").startswith(digits))
    ]
    if len(found) != 1:
        raise InputError(
            f"RELEASE = {release!r} names {'no rollout' if not found else f'{len(found)} rollouts'}.",
            hint=f"There are {', '.join(state.target.served_name for state in states) or 'none yet'}.",
        )
    return gather(settings, found[0].release, servers=servers)


def _under_way(facts: RolloutFacts) -> RolloutState:
    state = facts.rollout
    if state is None:
        raise ConflictError("No rollout is under way, and none was before.", hint=_START)
    if state.ended:
        raise ConflictError(
            f"No rollout is under way: that of {state.target.served_name} has ended ({state.phase}).", hint=_START
        )
    return state


def _row(state: RolloutState) -> dict[str, Any]:
    from sluice.infra.progress import duration_text

    begun = state.events[0].time if state.events else state.since
    ended = state.events[-1].time if state.events else state.since
    return {
        "release": state.release,
        "name": state.target.served_name,
        "stable": state.stable.release,
        "begun": begun,
        "took": duration_text(max(ended - begun, 0)),
        "outcome": state.phase,
        "highest": max((event.weight for event in state.events), default=0),
        "by": sorted({event.actor for event in state.events if event.actor}),
        "worst": _worst(state),
        "why": state.reason,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    """What does not fit is wrapped; names, times and outcomes never are. Why comes where there is room for it."""
    wide = console.width >= _WIDE
    table = Table(title="rollouts", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("release", "begun", "took", "outcome"):
        table.add_column(name, no_wrap=True)
    for name in ("highest", "by", "worst metric", *(["why"] if wide else [])):
        table.add_column(name)
    for row in rows:
        cells = [row["name"], _clock(row["begun"]), row["took"], row["outcome"], f"{row['highest']}%"]
        cells += [", ".join(row["by"]) or "controller", row["worst"], *([row["why"]] if wide else [])]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _worst(state: RolloutState) -> str:
    """The deciding metric whose interval reaches furthest towards worse, on the scale of its own margin."""
    from sluice.serving.interval_scale import difference_text, share_of

    metrics = state.analysis.metrics if state.analysis else ()
    known = [(share_of(one, one.high), one) for one in metrics if one.gating and one.high is not None]
    if not known:
        return ""
    _, worst = max(known, key=lambda pair: (pair[1].verdict == "fail", pair[0]))
    return f"{worst.name.replace('_', ' ')} {difference_text(worst, worst.estimate)} ({worst.verdict})"


def _clock(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M", time.localtime(seconds))
