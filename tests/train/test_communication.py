"""The share of a step that goes to collectives: none of one process, and of two what they wait for each other."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sharded_training import wide_loop
from tiny_stage import tiny_loop
from torch.autograd import DeviceType

from bench.gloo_processes import on_processes
from train.communication import exposed_ns, spans
from train.log import Log
from train.parallel import Parallel, processes

STEPS, DELAY_MS = 4, 200.0  # so long that it is most of a step: no share that is the same in every step passes


def test_what_others_hide_does_not_count():
    assert exposed_ns([], [(0, 9)]) == 0
    assert exposed_ns([(10, 20), (12, 15), (18, 30)], []) == 20
    assert exposed_ns([(10, 20), (12, 15), (18, 30)], [(0, 11), (29, 40)]) == 18
    assert exposed_ns([(10, 20)], [(5, 25)]) == 0


@dataclass
class Event:
    """As the profiler has them."""

    called: str
    device: DeviceType
    begin: int
    end: int

    def name(self) -> str:
        return self.called

    def device_type(self) -> DeviceType:
        return self.device

    def start_ns(self) -> int:
        return self.begin

    def end_ns(self) -> int:
        return self.end


def test_on_a_gpu_kernels_of_nccl_count_and_other_kernels_hide_them():
    events = [
        Event("aten::mm", DeviceType.CPU, 0, 9),
        Event("c10d::_allgather_base_", DeviceType.CPU, 1, 4),
        Event("ncclDevKernel_AllGather_RING_LL", DeviceType.CUDA, 20, 40),
        Event("Memcpy DtoH (Device -> Pinned)", DeviceType.CUDA, 15, 60),
        Event("gemm", DeviceType.CUDA, 30, 50),
    ]
    assert spans(events, on_gpu=True) == ([(20, 40)], [(30, 50)])
    assert spans(events, on_gpu=False) == ([(1, 4)], [])


def test_one_process_communicates_nothing(tmp_path):
    tiny_loop(steps=2).run(tmp_path, every=1)
    assert [row["communication_ms"] for row in Log(tmp_path / "log.jsonl").rows()] == [0.0, 0.0]


def communicate(folder: Path) -> list[dict[str, float]]:
    """The rows of a training, and of another with a collective in each step that the second rank comes late to."""
    rows = []
    for name in ("prompt", "late"):
        with processes(torch.device("cpu"), where=f"file://{folder}/{name}-store") as parallel:
            loop = wide_loop(STEPS, parallel)
            if name == "late":
                delay_second_rank(parallel, loop)
            loop.run(folder / name, every=1)
        rows += Log(folder / name / "log.jsonl").rows() if parallel.first else []
    return rows


def delay_second_rank(parallel: Parallel, loop) -> None:
    """Before the last collective of the backward, so that the first rank waits there."""
    loss_of = loop.stage.loss

    def slow(gradient):
        time.sleep(DELAY_MS / 1e3 if parallel.rank == 1 else 0)

    def late(step, generator):
        loss = loss_of(step, generator)
        loss.value.register_hook(slow)
        return loss

    loop.stage.loss = late


def test_a_rank_that_comes_late_to_a_collective_shows_in_the_communication_of_a_step():
    rows = on_processes(2, communicate)
    prompt, late = rows[:STEPS], rows[STEPS:]
    assert all(0 < row["communication_ms"] < row["step_ms"] for row in rows)
    # The mean over ranks: the one that comes late waits for nobody.
    waited = min(row["communication_ms"] for row in late[1:])
    assert waited > DELAY_MS / 2 * 0.9
    assert waited - min(row["communication_ms"] for row in prompt) > DELAY_MS / 2 * 0.5
