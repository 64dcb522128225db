"""The `k5` command: `k5 info`, `k5 plan …` (k5kernels/planner/cli), `k5 encode`.

What a user can get wrong ends in one line on stderr: exit code 2 where the command line is, 1 where its values or
files are.
"""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from k5_command import stop_in_one_line
from k5kernels.latents.cli import encode
from k5kernels.planner.cli import plan
from k5kernels.terminal import console, one_line_errors, table

app = typer.Typer(help="Kandinsky 5.0 on this machine.", no_args_is_help=True, add_completion=False)
app.add_typer(plan, name="plan")
app.command()(encode)


@app.command()
@one_line_errors()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """What this machine can run, and which kernel serves which operator."""
    from k5kernels.info import machine

    found = machine()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    terminal = console()
    terminal.print(", ".join(f"{name} {number}" for name, number in found.versions.items() if number))
    cpu = found.cpu
    terminal.print(
        f"CPU: {cpu.threads} threads, C++ kernels {cpu.instruction_set or 'not built'}, PyTorch {cpu.torch_capability}"
    )
    terminal.print(f"GPU: {', '.join(found.gpus) or 'none'}")
    here = ("cpu", "cuda") if found.gpus else ("cpu",)
    operators = [[o.name, o.device, o.kernel, o.reason] for o in found.operators if o.device in here]
    terminal.print(table("Operators", ["k5::", "device", "kernel", "why"], operators))
    engines = [[engine.name, "yes" if engine.available else "no", engine.reason] for engine in found.engines]
    terminal.print(table("Attention engines", ["engine", "usable", "why"], engines))


def main() -> None:
    """The program."""
    stop_in_one_line("k5")
    app(prog_name="k5")
