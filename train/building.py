"""The model that a run starts with: sizes, weights, and what it does with its activations."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from k5kernels.offload import ActivationOffload
from k5kernels.presets import CrossDiTConfig
from model.crossdit import CrossDiT
from model.presets import PRESETS
from train.parallel import Parallel, fill_shard, shard_model
from train.settings import Settings
from train.stored_model import StoredModel

TEXT_WIDTH = 384  # of MiniLM's tokens
MLP_WIDENING = 4  # of the released models
SMALLEST_OFFLOADED = 1 << 16  # bytes; around checkpointed blocks nothing but their inputs is saved


def model_config(
    settings: Settings, start: StoredModel | None, model_dim: int | None, blocks: int | None
) -> CrossDiTConfig:
    """The config of the model to start from, or the preset's, with another width or depth where given.

    Raises ValueError where they contradict each other or the width cannot be.
    """
    if start is not None:
        if model_dim is not None or blocks is not None:
            raise ValueError("the weights of --init have their own sizes: leave out --model-dim and --blocks")
        return start.config
    config = PRESETS[settings.preset]
    if model_dim is not None:
        if model_dim % config.head_dim:
            raise ValueError(f"--model-dim: expected a multiple of the head dim {config.head_dim}, got {model_dim}")
        config = replace(config, model_dim=model_dim, ff_dim=MLP_WIDENING * model_dim)
    return config if blocks is None else replace(config, visual_blocks=blocks)


def check_text_width(config: CrossDiTConfig, preset: str) -> None:
    """Raises ValueError where the model takes text of another width than the trainer's encoder gives."""
    if config.in_text_dim != TEXT_WIDTH:
        raise ValueError(
            f"preset: expected nano: {preset} takes text of width {config.in_text_dim}, this trainer's encoder gives "
            f"{TEXT_WIDTH}"
        )


def build_model(
    config: CrossDiTConfig, start: StoredModel | None, seed: int, parallel: Parallel, bf16: bool = False
) -> CrossDiT:
    """The model, sharded over the ranks, with random weights or those to start from; all ranks together.

    A rank never holds more than its shards and one layer: the model is sharded before it has memory. The random weights
    are those of `CrossDiT(config)` after `torch.manual_seed(seed)`, bit for bit, however many ranks there are.
    """
    with torch.device("meta"):
        model = CrossDiT(config)
    model = shard_model(model, parallel, bf16).to_empty(device=parallel.device)
    if start is not None:
        start.fill(model)
        return model
    parameters = dict(model.named_parameters())
    for name, weight in random_weights(config, seed):
        fill_shard(parameters[name], weight)
    return model


def random_weights(config: CrossDiTConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of a fresh model, on the CPU, of one layer at a time: they are valid until the next layer's.

    All layers are drawn in the same memory. Were it freed for each, glibc would keep up to most of it: where tensors of
    such sizes are made and freed in turn, it seldom finds room for one in what another has left.
    """
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = CrossDiT(config)
    largest = max(sum(weight.numel() for weight in layer.parameters(recurse=False)) for layer in model.modules())
    room = torch.empty(largest)
    # Modules are listed in the order in which they were made, which is that of the draws.
    for prefix, layer in model.named_modules():
        weights = [name for name, _ in layer.named_parameters(recurse=False)]
        if weights:
            assert isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm)  # which draw in reset_parameters alone
            left = room
            for name in weights:
                weight = layer.get_parameter(name)
                own, left = left[: weight.numel()], left[weight.numel() :]
                setattr(layer, name, nn.Parameter(own.view(weight.shape)))
            layer.reset_parameters()
            yield from ((f"{prefix}.{name}", layer.get_parameter(name).detach()) for name in weights)


def offload_to(folder: Path, device: torch.device, budget_bytes: float) -> ActivationOffload:
    """Block inputs to host memory from a GPU, to a file in the folder from the CPU."""
    on_cpu = device.type == "cpu"
    return ActivationOffload(folder if on_cpu else None, budget_bytes=budget_bytes, min_bytes=SMALLEST_OFFLOADED)
