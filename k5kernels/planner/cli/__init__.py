"""`k5 plan`: one file a command.

Every answer comes as a table, and as JSON or CSV of the same figures (docs/planner.md has the schema); step, memory
and search also draw one.
"""

import typer

from k5kernels.planner.cli.calibrate import calibrate
from k5kernels.planner.cli.inference import inference
from k5kernels.planner.cli.memory import memory
from k5kernels.planner.cli.search import search
from k5kernels.planner.cli.stages import stages
from k5kernels.planner.cli.step import step
from k5kernels.terminal import one_line_errors

plan = typer.Typer(help="What trainings and generations take: time, memory, layouts.", no_args_is_help=True)
for command in (step, memory, search, stages, inference, calibrate):
    plan.command(command.__name__)(one_line_errors()(command))
