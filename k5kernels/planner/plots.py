"""Pictures of the planner's answers: step time against tokens, memory against GPUs, the Pareto front of a search."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k5kernels.planner.search import SearchResult

FORMATS = (".png", ".svg")
SIZE_INCHES = (7, 4.2)


def draw_lines(
    path: Path, title: str, x: tuple[str, Sequence[float]], y: str, lines: Mapping[str, Sequence[float]], at: float
) -> None:
    """Lines over one axis, both logarithmic. x: label and values; y: label; at: where the answer stands.

    Raises ValueError where the file is neither .png nor .svg, or matplotlib is not there.
    """
    figure, axes = _figure(path, title)
    for name, values in lines.items():
        axes.plot(x[1], values, marker=".", label=name)
    axes.axvline(at, color="grey", linestyle=":")
    axes.set(xlabel=x[0], ylabel=y, xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=110)


def draw_pareto(path: Path, title: str, result: SearchResult) -> None:
    """The front of a search: GPU-hours against wall time, every plan with its GPUs; the best one marked.

    Raises as `draw_lines`.
    """
    figure, axes = _figure(path, title)
    days = [plan.wall_hours / 24 for plan in result.pareto]
    axes.plot(days, [plan.gpu_hours for plan in result.pareto], marker="o")
    for day, plan in zip(days, result.pareto, strict=True):
        words = f"{plan.layout.gpus} GPUs, SP {plan.layout.sequence_parallel}"
        axes.annotate(words, (day, plan.gpu_hours), xytext=(6, 4), textcoords="offset points", fontsize=7)
    best = f"best for {result.goal}"
    axes.plot(result.best.wall_hours / 24, result.best.gpu_hours, marker="*", markersize=14, linestyle="", label=best)
    axes.set(xlabel="wall time [days]", ylabel="GPU-hours", xscale="log")
    axes.margins(x=0.15)
    for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter, axes.yaxis.set_major_formatter):
        formatter(lambda value, position: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=110)


def _figure(path: Path, title: str) -> tuple[Any, Any]:
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot: expected a file that ends in {' or '.join(FORMATS)}, got {path}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: drawing needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=SIZE_INCHES)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes
