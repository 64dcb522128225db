"""The main job on a real clip: encode, fine-tune, sample in three ways, decode, report.

python -m bench.demo --out out [--video path]
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from bench.demo.job import Job, check_video, clear
from bench.demo.page import write_page
from k5kernels.device import choose_device
from k5kernels.terminal import DeviceName, one_line_errors, one_line_stop
from train.clips import CAPTIONS, clip_path


def run(video: Path, out: Path, caption: str, device: torch.device, console: Console) -> None:
    """The whole job, with a progress bar for each step.

    A video that cannot be used is found first, and a former run's results stay; a job that fails later deletes all.
    """
    check_video(video)
    clear(out)
    try:
        page = run_steps(Job(video, out, caption, device), console)
    except BaseException:
        clear(out)
        raise
    console.print(f"Wrote {page}")


def run_steps(job: Job, console: Console) -> Path:
    """The job's steps in turn; the path of its page."""
    with Progress(console=console) as bars:

        def bar(name: str) -> Callable[[int, int], None]:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        job.encode(bar("encode"))
        job.train(bar("train"))
        for name in job.paths:
            job.sample(name, bar(f"sample: {name}"))
        job.write_video()
        job.measure_memory(bar("memory"))
    return write_page(job)


def main(
    video: Annotated[Path | None, typer.Option(help="any video; Big Buck Bunny without")] = None,
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("out"),
    caption: Annotated[str | None, typer.Option(help="what the video shows")] = None,
    device: DeviceName = None,
) -> None:
    """Run the demo; a second run overwrites the first."""
    console = Console()
    disable_progress_bar()  # that of the text encoder's weights
    with one_line_errors("demo"), one_line_stop("demo", lambda: "no results of this run are left"):
        chosen = choose_device(device)
        video = video or clip_path("bigbuckbunny")
        run(video, out, caption or CAPTIONS.get(video.stem, "A video."), chosen, console)


if __name__ == "__main__":
    typer.run(main)
