"""`k5 plan calibrate`."""

import subprocess
import sys
from dataclasses import asdict
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from k5kernels.planner.calibration import MeasuredStep, fit, held_out_errors, predict_ms, read_steps
from k5kernels.planner.cli import options
from k5kernels.planner.cli.answer import print_json, write_csv
from k5kernels.planner.gpu_results import profile_of_results
from k5kernels.planner.profile import H100, HardwareProfile, save_profile
from k5kernels.planner.this_machine import this_machine
from k5kernels.terminal import console, table

SWEEP = "train.sweep"


def calibrate(
    steps: Annotated[
        Path | None,
        typer.Option(help="CSV of measured steps: model_dim, tokens, blocks, batch, density, step_ms (of one device)."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure 24 runs of the trainer on this machine: a few minutes.")
    ] = False,
    from_results: Annotated[
        Path | None, typer.Option(help="Results file of `python -m bench.gpu`: attention as measured there.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the profile here, for --profile of the others.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the profile; the CSV's or this machine's without.")] = None,
    as_json: options.AsJSON = False,
    csv_path: Annotated[
        Path | None, typer.Option("--csv", help="Write the steps, measured and fitted; --steps reads them again.")
    ] = None,
) -> None:
    """Fit the step formula's coefficients to measured steps, and say how far it is off on steps it did not see.

    Or take the attention coefficient from a GPU's results file; the other two are then the report's.
    """
    if (steps is not None) + sweep + (from_results is not None) != 1:
        raise typer.BadParameter("give one of --steps FILE, --sweep and --from-results FILE")
    if from_results is not None:
        _from_results(from_results, name, save, as_json)
        return
    measured, base = (_sweep(), this_machine()) if steps is None else (read_steps(steps), H100)
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
    _print_coefficients(profile)
    for number, errors in enumerate(held_out, 1):
        terminal.print(
            f"fitted on third {number} of {len(held_out)}, the other {errors.steps} steps: mean error "
            f"{errors.mean:.1%}, worst {errors.worst:.1%}"
        )


def _from_results(path: Path, name: str | None, save: Path | None, as_json: bool) -> None:
    profile = profile_of_results(path, name)
    if save is not None:
        save_profile(profile, save)
    if as_json:
        inputs = {"steps": 0, "source": str(path)}
        print_json("calibrate", inputs, {"profile": asdict(profile), "measured": [], "held_out": []})
        return
    _print_coefficients(profile)
    console().print("attention is measured; tokenwise, linear, memory and bandwidths are the report's H100")


def _print_coefficients(profile: HardwareProfile) -> None:
    coefficients = [("tokenwise", "tokenwise_ms"), ("attention", "attention_ms"), ("linear", "linear_ms")]
    shown = [[term, f"{getattr(profile, c):,.1f}", f"{getattr(H100, c):,.1f}"] for term, c in coefficients]
    title = f"Coefficients of {profile.name}, a block and clip at d0 and S0"
    console().print(table(title, ["term", "ms", "H100, ms"], shown))


def _sweep() -> list[MeasuredStep]:
    """Steps of this machine, measured by the trainer: a program of the repository, which the library does not import.

    Raises ValueError where the trainer is not there, typer.Exit where it failed and has said why.
    """
    if not _trainer_is_here():
        raise ValueError(
            "--sweep: expected the trainer (train/sweep.py), which is in the repository and not in the installed "
            "package: run from the root of a clone, or measure steps yourself and give --steps FILE"
        )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "steps.csv"
        if subprocess.run([sys.executable, "-m", SWEEP, "--csv", path]).returncode:
            raise typer.Exit(1)
        return read_steps(path)


def _trainer_is_here() -> bool:
    """Whether `python -m train.sweep` would find it: in the working directory or on the path."""
    package, _, module = SWEEP.partition(".")
    found = PathFinder.find_spec(package, [str(Path.cwd()), *sys.path])
    return any(
        (Path(folder) / f"{module}.py").exists() for folder in (found and found.submodule_search_locations) or ()
    )


def _cells(step: MeasuredStep, profile: HardwareProfile) -> list[str]:
    said = predict_ms(step, profile)
    sizes = (step.model_dim, step.tokens, step.blocks, step.batch)
    times = [f"{step.step_ms:,.1f}", f"{said:,.1f}", f"{said / step.step_ms - 1:+.1%}"]
    return [*(f"{size:,}" for size in sizes), f"{step.density:.0%}", *times]
