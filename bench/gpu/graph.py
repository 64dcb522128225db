"""A pass through several blocks, launch by launch and captured in a CUDA graph, and how much of it the GPU is busy."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.block import BLOCKS, MASK, NABLA, config_of
from bench.gpu.inputs import LITE
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.shaped_block import BlockInputs, block_inputs, shaped_block
from k5kernels import TokenLayout
from model.crossdit import VisualBlock

WARM_UPS = 3


@torch.no_grad()
def graph(run: Run) -> None:
    """Rows of time, and of the share of a pass in which a kernel ran."""
    for size in (size for size in run.sizes if size is LITE or run.device.type == "cpu"):
        inputs = block_inputs(config_of(size), TokenLayout((size.clip,)), run.device, torch.bfloat16)
        blocks = [shaped_block(config_of(size), seed).to(run.device, torch.bfloat16) for seed in range(BLOCKS)]
        eager = partial(_pass, blocks, inputs)
        variants = {"launches": eager}
        if run.device.type == "cuda":
            replay = captured(blocks, inputs)
            assert torch.equal(replay(), eager()), "a replayed graph gives other bits than its launches"
            variants["graph"] = replay
            for name, call in variants.items():
                run.keep(Row("busy", str(size), MASK, None, name, "share", busy_share(call)))
        run.measure("graph", size, variants, mask=MASK)


def captured(blocks: list[VisualBlock], inputs: BlockInputs) -> "partial[Tensor]":
    """The pass as a graph; what a call returns is overwritten by the next."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            _pass(blocks, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _pass(blocks, inputs)

    return partial(_replay, graph, out)


def busy_share(call: "partial[Tensor]") -> float:
    """Of the time from the first kernel's start to the last one's end, that in which one ran."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    events = (event.time_range for event in trace.events() if event.device_type == DeviceType.CUDA)
    return covered_share((event.start, event.end) for event in events)


def covered_share(spans: Iterable[tuple[float, float]]) -> float:
    """Of the time from the first start to the last end, that which lies in a span."""
    ordered = sorted(spans)
    covered, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered / (end - ordered[0][0])


def _pass(blocks: list[VisualBlock], inputs: BlockInputs) -> Tensor:
    x, context = inputs.x, inputs.context(NABLA)
    for block in blocks:
        x = block(x, context)
    return x


def _replay(graph: torch.cuda.CUDAGraph, out: Tensor) -> Tensor:
    graph.replay()
    return out
