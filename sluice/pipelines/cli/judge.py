"""judge show, calibrate: the model that scores answers, and whether its scores may decide anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sluice.pipelines.cli.output import JsonFlag, console, progress_line, show_json, show_table
from sluice.provenance.canonical import short

if TYPE_CHECKING:
    from sluice.evaluation.calibration import MetricCalibration
    from sluice.evaluation.policy import JudgeFloor
    from sluice.pipelines.judging import JudgeView

judge_app = typer.Typer(no_args_is_help=True, help="The model that judges answers: who it is, and what it is worth.")

SuiteOption = Annotated[str, typer.Option("--suite", help="A bundled suite by name, or the path of one")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(judge_app, name="judge")


@judge_app.command()
def show(suite: SuiteOption = "demo", as_json: JsonFlag = False) -> None:
    """The judge of a suite, what pins it, and its calibration if there is one. Asks the judge nothing.

    A judge is pinned by a digest of its weights, RAGAS's prompts and schemas, and the sampling. Scores of judges with
    different digests are never compared.
    """
    from sluice.infra.settings import load_settings
    from sluice.pipelines.judging import view_judge

    _print(view_judge(load_settings(), suite), as_json)


@judge_app.command()
def calibrate(
    suite: SuiteOption = "demo",
    whole: Annotated[
        bool, typer.Option("--whole", help="Measure every figure, also of a metric that can gate no more")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Let the judge score answers that people labelled, and say whether its metrics may gate.

    A metric below the policy's floor (section `judge` of gate.yaml) is advisory: shown, never gating. It is measured
    no further once that is certain. The result is kept for this judge and these labels: the next run finds it.

    Example: [bold]sluice judge calibrate --suite demo[/]
    """
    from sluice.infra.access import require
    from sluice.infra.settings import load_settings
    from sluice.pipelines.judging import calibrate_judge

    settings = load_settings()
    require(settings, "judge calibrate", suite)
    with progress_line(as_json) as report:
        view = calibrate_judge(settings, suite, whole=whole, report=report)
    _print(view, as_json)


def _print(view: JudgeView, as_json: bool) -> None:
    judge, found = view.judge, view.calibration
    if as_json:
        show_json(
            {
                "suite": view.suite.name,
                "judge": {
                    "url": judge.base_url,
                    "model": judge.model,
                    "identity": judge.identity,
                    "digest": judge.digest,
                    "max_tokens": judge.sampling.max_tokens,
                    "temperature": judge.sampling.temperature,
                    "seed": judge.sampling.seed,
                },
                "floor": view.floor.model_dump(mode="json"),
                "artifact": view.digest or None,
                "calibration": found.to_json() if found else None,
                "advisory": view.demoted,
            }
        )
        return
    sampling = judge.sampling
    console.print(f"[bold]judge of suite {escape(view.suite.name)}[/]")
    console.print(f"  {escape(judge.model)} at {escape(judge.base_url)}, digest {short(judge.digest)}")
    console.print(
        f"  temperature {sampling.temperature:g}, seed {sampling.seed}, at most {sampling.max_tokens} tokens an answer"
    )
    if found is None:
        console.print("  [yellow]not calibrated[/]: its metrics are advisory. `sluice judge calibrate` measures it.")
        return
    people = escape(", ".join(found.labelled_by))
    console.print(f"  calibrated on labels of {people}; artifact {short(view.digest)}\n")
    for one in found.metrics:
        verdict = "advisory" if one.metric in view.demoted else "may gate"
        show_table(f"{one.metric}: {verdict}", ["", "figure", "judge", "floor", "what it says"], _rows(one, view.floor))
        console.print()
    for name in view.suite.judged.metrics if view.suite.judged else ():
        if name in view.demoted:
            console.print(f"[yellow]![/] {escape(name)} is advisory: {escape(view.demoted[name])}.")
        else:
            console.print(f"[green]✔[/] {escape(name)} may gate.")


def _rows(one: MetricCalibration, floor: JudgeFloor) -> list[list[str]]:
    """A metric's figures, each beside its floor. `-`: not measured, the metric could gate no more by then."""
    bias = _share(one.position_bias) + (f" of {one.pairs}" if one.position_bias is not None else "")
    length = "-" if one.length_bias is None else f"{one.length_bias:+.2f}"
    causes = ", ".join(f"{count} {cause}" for cause, count in one.causes.items())
    return [
        [
            _mark(one.labelled >= floor.minimum_n),
            "labelled items",
            str(one.labelled),
            f"≥ {floor.minimum_n}",
            "answers that people judged",
        ],
        [
            _mark(one.valid_share >= floor.valid_share),
            "scored",
            f"{one.valid} of {one.asked}",
            f"≥ {floor.valid_share:.0%}",
            causes or "the judge failed on none",
        ],
        [
            _mark(one.kappa_low >= floor.kappa),
            "agreement",
            f"{one.kappa:.2f} [{one.kappa_low:.2f}, {one.kappa_high:.2f}]",
            f"from {floor.kappa:.2f}",
            "with people: 1 always, 0 by chance (kappa, 95% interval)",
        ],
        [
            _mark(one.self_agreement is not None and one.self_agreement >= floor.self_agreement, one.self_agreement),
            "self-agreement",
            _share(one.self_agreement),
            f"≥ {floor.self_agreement:.0%}",
            "same verdict when asked again",
        ],
        [
            _mark(one.position_bias is not None and one.position_bias <= floor.position_bias, one.position_bias),
            "position bias",
            bias,
            f"≤ {floor.position_bias:.0%}",
            "pairs where the order decides, not the answer",
        ],
        [
            _mark(one.length_bias is not None and abs(one.length_bias) <= floor.length_bias, one.length_bias),
            "length bias",
            length,
            f"± {floor.length_bias:.2f}",
            "does a longer answer get more than it is worth?",
        ],
    ]


def _mark(good: bool, measured: float | None = 0.0) -> str:
    return "-" if measured is None else "✔" if good else "✘"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
