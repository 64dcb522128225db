"""A training on many processes: who does which part, and what they do together (§6.1.3).

    world = replicate × shard × sequence        rank = (replicate · shards + shard) · sequences + sequence

replicate × shard are the data ranks: each takes its own samples of the global batch. The `sequence` ranks of a data
rank take the same samples and a piece of their tokens each. Weights, gradients, optimizer states and averages are
sharded over shard × sequence and the same in each replica (HSDP by `fully_shard`): masters and reductions in float32.

Every rank computes the loss of its data rank, and `fully_shard` averages gradients over all ranks. A parameter's
gradient on a sequence rank comes from its tokens alone and has to be summed over these ranks, not averaged: the
backward of `SequenceExchange.gather` sums the gradients of all sequence ranks, which is that factor.

One process needs no process group: `ALONE` stands for it, and nothing is sharded.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from k5kernels.terminal import Stopped
from model.crossdit import CrossDiT, Modulation, TimeEmbedding
from model.sequence_piece import Attend, piece_lengths

TIMEOUT = timedelta(minutes=10)  # of a collective: loading data and the first compilation fall between two
CPU = torch.device("cpu")
FAILED = "k5_failed"  # in the store that all processes share: who spoke of the failure


class PeerLostError(OSError):
    """Another process of the training has gone, and no collective can be finished without it."""


@dataclass(frozen=True)
class Parallel:
    """This process among all. Its methods are collectives: every rank has to call them, in the same order.

    replicate, shard, sequence: sides of the mesh. device: this process's. weights: the mesh [replicate, shard ·
    sequence] that weights are sharded over, without its first side where that is 1. exchange: this rank's with those
    that share its sequences.
    """

    replicate: int = 1
    shard: int = 1
    sequence: int = 1
    rank: int = 0
    device: torch.device = CPU
    weights: DeviceMesh | None = None
    exchange: "SequenceExchange | None" = None

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.replicate * self.shard * self.sequence

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes the log and shows the progress."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """How many ranks take samples of their own."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Whose samples this rank takes."""
        return self.rank // self.sequence

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of all ranks, for `train.ranks`; None where this is the only one."""
        return dist.group.WORLD if self.world > 1 else None

    def host_group(self) -> dist.ProcessGroup | None:
        """Another group of all ranks, of gloo, for a thread of its own; None where this is the only one."""
        return dist.new_group(backend="gloo") if self.world > 1 else None

    def own(self, batch: int) -> slice:
        """The samples of a global batch that this rank takes. Raises ValueError as `check_batch`."""
        self.check_batch(batch)
        size = batch // self.data_ranks
        return slice(self.data_rank * size, (self.data_rank + 1) * size)

    def check_batch(self, batch: int) -> None:
        """Raise ValueError where the data ranks do not divide the global batch."""
        if batch % self.data_ranks:
            raise ValueError(
                f"batch: expected a multiple of the {self.data_ranks} data ranks ({self.replicate} replicas × "
                f"{self.shard} shards), got {batch}: --batch counts the samples of all processes together"
            )

    def check_heads(self, heads: int) -> None:
        """Raise ValueError where the sequence ranks do not divide the heads."""
        if heads % self.sequence:
            raise ValueError(
                f"sequence: expected a divisor of the model's {heads} heads, got {self.sequence}: the ranks that share "
                "a sequence share its heads in self-attention"
            )

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks of a tensor on their devices, which is the mean over the data ranks."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def all_agree(self, mine: bool) -> bool:
        """Whether it is true on every rank."""
        if self.world == 1:
            return mine
        agreed = torch.tensor(int(mine))
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return bool(agreed)


ALONE = Parallel()


def processes_given() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def processes(
    device: torch.device, replicate: int = 1, shard: int | None = None, sequence: int = 1, where: str = "env://"
) -> Iterator[Parallel]:
    """This process among those of torchrun, with a process group inside; `ALONE` where it is the only one.

    device: "cuda" without a number is the GPU of this process's number on its machine. shard: None takes the ranks that
    the other sides leave. where: the processes meet.

    When a process fails inside, the first to do so raises; what fails on the others in consequence, or for the same
    reason, ends them without a word, with exit code 1, or after a signal with the signal's. A process that fails ends;
    the others then fail in their next collective, or torchrun ends them.
    Raises ValueError where the sides do not make the number of processes, PeerLostError where a process has gone
    without a word.
    """
    world = processes_given()
    if world == 1:
        _side_lengths(1, replicate, shard, sequence)
        yield Parallel(device=device)
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = device if device.index is not None else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, *_ = next(rendezvous(where, rank, world, timeout=TIMEOUT))
    try:
        replicate, shard, sequence = _side_lengths(world, replicate, shard, sequence)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("k5_group", store),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        weights = init_device_mesh(device.type, (replicate, shard * sequence), mesh_dim_names=("replicate", "shard"))
        # A mesh of one dimension where that is enough: every operation on a DTensor is planned over all of them.
        weights = weights["shard"] if replicate == 1 else weights
        exchange = None
        if sequence > 1:
            tokens = init_device_mesh(device.type, (replicate * shard, sequence), mesh_dim_names=("data", "sequence"))
            exchange = SequenceExchange(tokens.get_group("sequence"))
        yield Parallel(replicate, shard, sequence, rank, device, weights, exchange)
    except BaseException as error:
        if not _speaks(store, rank):
            raise typer.Exit(128 + error.number if isinstance(error, Stopped) else 1) from None
        if isinstance(error, RuntimeError) and _is_of_a_peer(error):
            raise PeerLostError(f"rank {rank}: another process has gone ({str(error).splitlines()[0]})") from error
        raise
    dist.destroy_process_group()


def shard_model(model: CrossDiT, parallel: Parallel, bf16: bool = False) -> CrossDiT:
    """Shard the model in place, before an optimizer is made of its parameters; alone it stays as it is.

    All ranks must give the same float32 weights, or none, on the device "meta". bf16: a block's weights are gathered
    and used in bfloat16; those of the time embedding and the modulations stay float32, as the model computes with them.
    """
    parallel.check_heads(model.config.heads)
    model.exchange = parallel.exchange
    if parallel.weights is None:
        return model
    mesh = parallel.weights
    # Of writing into the model's output, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if bf16:
        for module in model.modules():
            if isinstance(module, Modulation | TimeEmbedding):
                fully_shard(module, mesh=mesh)
    # Inputs are left as they are: among them are rotary tables and modulations, which are float32 at every precision.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in [*model.text_transformer_blocks, *model.visual_transformer_blocks]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, gathered in host memory on the first rank and empty on the others; a collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        name: tensor
        for name, tensor in get_model_state_dict(model, options=options).items()
        if isinstance(tensor, Tensor)
    }


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a DTensor is a shard of, gathered on every rank; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, of the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_shard(tensor: Tensor, values: Tensor) -> None:
    """Let a tensor take the values, of a DTensor this rank's part of them; every rank has all, and nothing is sent."""
    if isinstance(tensor, DTensor):
        for side, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                own = tensor.device_mesh.get_local_rank(side)
                parts = values.chunk(tensor.device_mesh.size(side), placement.dim)
                values = parts[own] if own < len(parts) else values.narrow(placement.dim, 0, 0)
    own_shard(tensor).copy_(values)


class SequenceExchange:
    """What the ranks that share a sequence do together; see `model.sequence_piece.Exchange`. Differentiable."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), group.size()

    def around(self, attend: Attend, tokens: int) -> Attend:
        """Two all-to-alls: of q, k and v together before the attention, of its output behind it."""

        def attend_piece(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._to_pieces(attend(*self._to_heads(torch.stack([q, k, v]), tokens)), tokens)

        return attend_piece

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """[B, s, c] of each rank → [B, S, c]; the gradient is the sum of those of all ranks."""
        lengths = piece_lengths(tokens, self.ranks)
        sent = x.transpose(0, 1).repeat(self.ranks, 1, 1)
        return self._all_to_all(sent, [x.shape[1]] * self.ranks, lengths).transpose(0, 1).contiguous()

    def _to_heads(self, qkv: Tensor, tokens: int) -> Tensor:
        """[3, B, h, s, D] of this rank's tokens → [3, B, h / ranks, S, D] of this rank's heads."""
        own = qkv.shape[3]
        sent = qkv.unflatten(2, (self.ranks, -1)).permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
        received = self._all_to_all(sent, [own] * self.ranks, piece_lengths(tokens, self.ranks))
        return received.permute(1, 2, 3, 0, 4)

    def _to_pieces(self, x: Tensor, tokens: int) -> Tensor:
        """[B, h / ranks, S, D] of this rank's heads → [B, h, s, D] of this rank's tokens."""
        lengths = piece_lengths(tokens, self.ranks)
        own = lengths[self.rank]
        received = self._all_to_all(x.permute(2, 0, 1, 3), lengths, [own] * self.ranks)
        return received.unflatten(0, (self.ranks, own)).permute(2, 0, 3, 1, 4).flatten(1, 2)

    def _all_to_all(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows of x to each rank in turn, rows from each rank in turn."""
        return all_to_all_single_autograd(x.contiguous(), received, sent, self.group)


def _side_lengths(world: int, replicate: int, shard: int | None, sequence: int) -> tuple[int, int, int]:
    """(replicate, shard, sequence), shard taking the ranks that the others leave where it is None."""
    sides = replicate * sequence
    if min(replicate, sequence, 1 if shard is None else shard) < 1 or world != sides * (shard or world // sides):
        raise ValueError(
            f"mesh: expected replicate × shard × sequence = {world} processes, got {replicate} × "
            f"{'the rest' if shard is None else shard} × {sequence}; change --replicate, --shard, --sequence or "
            "torchrun's --nproc-per-node"
        )
    return replicate, shard or world // sides, sequence


def _speaks(store: dist.Store, rank: int) -> bool:
    """Whether this rank is the first that failed; where the store has gone, its process speaks for itself."""
    try:
        return store.compare_set(FAILED, "", str(rank)).decode() == str(rank)
    except RuntimeError:
        return True


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process. Gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
