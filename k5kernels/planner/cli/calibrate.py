"""`k5 plan calibrate`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from k5kernels.planner.calibration import MeasuredStep, fit, held_out_errors, predict_ms, read_steps
from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import print_json, write_csv
from k5kernels.planner.profile import H100, HardwareProfile, save_profile
from k5kernels.terminal import console, table


def calibrate(
    steps: Annotated[
        Path | None,
        typer.Option(help="CSV of measured steps: model_dim, tokens, blocks, batch, density, step_ms (of one device)."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure 24 runs of the trainer on this machine: a few minutes.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write the profile here, for --profile of the others.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the profile; the CSV's or this machine's without.")] = None,
    as_json: options.AsJSON = False,
    csv_path: Annotated[
        Path | None, typer.Option("--csv", help="Write the steps, measured and fitted; --steps reads them again.")
    ] = None,
) -> None:
    """Fit the step formula's coefficients to measured steps, and say how far it is off on steps it did not see."""
    if (steps is None) != sweep:
        raise typer.BadParameter("give either --steps FILE or --sweep")
    measured, base = _measure() if steps is None else (read_steps(steps), H100)
    profile = fit(measured, name or (base.name if steps is None else steps.stem), base)
    held_out = held_out_errors(measured)
    rows = [{**asdict(step), "fitted_ms": predict_ms(step, profile)} for step in measured]
    write_csv(csv_path, rows)
    if save is not None:
        save_profile(profile, save)
    if as_json:
        inputs = {"steps": len(measured), "source": "sweep" if steps is None else str(steps)}
        found = {"profile": asdict(profile), "measured": rows, "held_out": [asdict(each) for each in held_out]}
        print_json("calibrate", inputs, found)
        return
    terminal = console()
    header = ["model dim", "tokens", "blocks", "batch", "density", "measured [ms]", "fitted [ms]", "error"]
    terminal.print(table("Measured steps", header, [_cells(step, profile) for step in measured]))
    coefficients = [("tokenwise", "constant_ms"), ("attention", "tokens_ms"), ("linear", "width_ms")]
    shown = [[term, f"{getattr(profile, c):,.1f}", f"{getattr(H100, c):,.1f}"] for term, c in coefficients]
    terminal.print(
        table(f"Coefficients of {profile.name}, a block and clip at d0 and S0", ["term", "ms", "H100, ms"], shown)
    )
    for number, errors in enumerate(held_out, 1):
        terminal.print(
            f"fitted on third {number} of {len(held_out)}, the other {errors.steps} steps: mean error "
            f"{errors.mean:.1%}, worst {errors.worst:.1%}"
        )


def _measure() -> tuple[list[MeasuredStep], HardwareProfile]:
    """(steps of this machine, its profile but for the coefficients)."""
    from k5kernels.planner.sweep import points, sweep, this_machine

    terminal, chosen = console(stderr=True), points()
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        bar = bars.add_task("measuring", total=len(chosen))
        results = sweep(chosen, lambda result: bars.advance(bar))
    return [result.step for result in results], this_machine()


def _cells(step: MeasuredStep, profile: HardwareProfile) -> list[str]:
    said = predict_ms(step, profile)
    sizes = (step.model_dim, step.tokens, step.blocks, step.batch)
    times = [f"{step.step_ms:,.1f}", f"{said:,.1f}", f"{said / step.step_ms - 1:+.1%}"]
    return [*(f"{size:,}" for size in sizes), f"{step.density:.0%}", *times]
