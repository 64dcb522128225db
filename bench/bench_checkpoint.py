"""How long a checkpoint holds a training up, and how much slower steps are while it is written.

The state is 201 MB: weights, their average and AdamW's two moments. Each checkpoint is read back and compared when it
is whole, before the next one is begun.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench import harness
from train.checkpoint import Checkpoints
from train.loop import Loop
from train.optimizer import adamw
from train.parallel import own_shard
from train.schedule import Schedule
from train.stage import Loss, Stage

T = TypeVar("T")
WIDTH, LAYERS, BATCH = 1024, 12, 192
ROUNDS = 5
# Times a copy of the state, and times a step that is taken alone.
LONGEST_STALL, SLOWEST_STEP = 1.5, 1.2


class Layers(Stage):
    """Square layers that learn the identity. mesh: that they are sharded over."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        if mesh is not None:
            for module in [*model, model]:
                fully_shard(module, mesh=mesh)
        super().__init__({"stage": "layers"}, model, {"adamw": adamw(model, 1e-3, 1e-2)}, ema_decay=0.9)

    def loss(self, step: int, generator: torch.Generator) -> Loss:
        x = torch.randn(BATCH, WIDTH, generator=generator)
        return Loss((self.model(x) - x).square().mean(), ["noise"])


@contextmanager
def one_rank() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("threads", "sharded"),
    [(1, False), (1, True), (2, False)],
    ids=["a core to spare", "a core to spare, sharded", "no core to spare"],
)
def test_checkpoint(benchmark: BenchmarkFixture, tmp_path: Path, threads: int, sharded: bool) -> None:
    """Floors with a core to spare, as the hosts of GPUs have; without one the writing takes turns with the steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with one_rank() if sharded else nullcontext() as mesh:
            stalls, steps = timed(Layers(mesh), Checkpoints(tmp_path, keep=1))
    finally:
        torch.set_num_threads(before)
    sizes = f"{LAYERS} layers of {WIDTH}, 201 MB{', sharded' if sharded else ''}"
    rows = [
        harness.Row("checkpoint_stall", sizes, threads, stalls),
        harness.Row("step_beside_a_checkpoint", sizes, threads, steps),
    ]
    harness.ROWS += rows
    benchmark.extra_info.update(machine=harness.machine(), rows=[row.medians() for row in rows])
    benchmark.pedantic(lambda: None)
    if threads == 1:
        (begun, copy), (beside, alone) = (row.medians().values() for row in rows)
        assert begun <= LONGEST_STALL * copy
        assert beside <= SLOWEST_STEP * alone


def timed(stage: Stage, checkpoints: Checkpoints) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of beginning a checkpoint and of a copy; of steps beside one and alone, their mean in each round."""
    loop = Loop(stage, Schedule(10_000))
    loop.step()
    stalls: dict[str, list[float]] = {"begun": [], "copy": []}
    steps: dict[str, list[float]] = {"beside": [], "alone": []}

    def begin() -> None:
        checkpoints.save(loop.done, loop.settings, loop.stage.state_dict())

    def copy() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in loop.stage.state_dict().items()}

    for number in range(ROUNDS + 1):
        one_copy = _milliseconds(copy)[0]  # its memory is free again for what comes next, as after a checkpoint
        alone = [_milliseconds(loop.step)[0] for _ in range(5)]
        expected, done = copy(), loop.done
        begun = _milliseconds(begin)[0]
        beside = []
        while checkpoints.saved != done:
            beside.append(_milliseconds(loop.step)[0])
        checkpoints.wait()
        check(checkpoints, done, expected)
        if number:  # the first round warms up
            stalls["begun"].append(begun)
            stalls["copy"].append(one_copy)
            steps["alone"].append(sum(alone) / len(alone))
            # The last one ended without the checkpoint.
            beside = beside[:-1] or beside
            steps["beside"].append(sum(beside) / len(beside))
    return stalls, steps


def check(checkpoints: Checkpoints, done: int, expected: dict[str, Tensor]) -> None:
    saved, refused = checkpoints.newest()
    assert saved is not None
    assert (saved.done, refused) == (done, [])
    read = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    saved.read_into(read)
    assert all(torch.equal(own_shard(read[name]), own_shard(expected[name])) for name in expected)


def _milliseconds(call: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = call()
    return 1e3 * (time.perf_counter() - began), result
