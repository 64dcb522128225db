"""What a training step of a LoRA adapter, and the decoding of a tile, hold in memory: counted under fake tensors.

The models are diffusers' own, which public trainers run; shapes and lifetimes are real, numbers are not computed. What
is alive is counted by storage: every operator's outputs from when they appear until they are freed.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k5kernels.planner import ClipShape, ModelShape
from k5kernels.planner.decoding import CHANNELS, FRAMES
from k5kernels.planner.lora import Adapter

TEXT_TOKENS = 256
QKV = ("to_query", "to_key", "to_value")
ALL = (*QKV, "out_layer", "in_layer")
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BLOCKS = (2, 3)  # what the third adds is what every block adds; the rest is one block's and the ends'


class Alive(TorchDispatchMode):
    """Counts bytes of storages: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class WithAdapter(nn.Module):
    """A frozen linear layer and the two small ones that learn beside it."""

    def __init__(self, frozen: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, frozen.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x.to(self.down.weight.dtype)))


def block_bytes(model: ModelShape, adapter: Adapter, grid: tuple[int, int, int]) -> float:
    """Bytes of what one block keeps at the peak of a step with checkpointing, gradients inside it too, on one clip of
    T·H·W tokens in bfloat16.
    """
    peaks = [_step_peak(model, adapter, grid, blocks) for blocks in BLOCKS]
    of_one_input = 2 * grid[0] * grid[1] * grid[2] * model.model_dim
    each = peaks[1] - peaks[0]  # its input; its adapter is counted apart, its weights are not counted
    assert each == of_one_input, (each, of_one_input)
    return peaks[0] - BLOCKS[0] * of_one_input


def decoder_bytes_per_value(height: int, width: int) -> float:
    """Bytes that decoding one tile of 17 frames in float16 holds at most, over the values of the widest layer."""
    from diffusers import AutoencoderKLHunyuanVideo

    clip = ClipShape(height, width, FRAMES)
    with FakeTensorMode(), _default(torch.float16), torch.no_grad():
        vae: Any = AutoencoderKLHunyuanVideo()
        latent = torch.empty(1, 16, clip.latent_frames, height // 8, width // 8)
        alive = Alive()
        for weight in vae.parameters():
            alive.add(weight)
        before = alive.now
        with alive:
            vae.decoder(vae.post_quant_conv(latent))
    return (alive.peak - before) / (CHANNELS * FRAMES * height * width)


def _step_peak(shape: ModelShape, adapter: Adapter, grid: tuple[int, int, int], blocks: int) -> int:
    """Bytes alive at most in a step beside weights, adapter, moments and gradients of the adapter."""
    T, H, W = grid
    with FakeTensorMode():
        model = _transformer(shape, adapter, blocks)
        model.enable_gradient_checkpointing()
        latent = torch.empty(1, T, 2 * H, 2 * W, 2 * 16 + 1, dtype=torch.bfloat16)
        inputs = {
            "hidden_states": latent,
            "encoder_hidden_states": torch.empty(1, TEXT_TOKENS, 3584, dtype=torch.bfloat16),
            "pooled_projections": torch.empty(1, 768, dtype=torch.bfloat16),
            "timestep": torch.empty(1),
            "visual_rope_pos": [torch.arange(side) for side in grid],
            "text_rope_pos": torch.arange(TEXT_TOKENS),
        }

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs, return_dict=False)[0].float().square().mean()
            loss.backward()

        step()  # gradients of the adapter are there from now on
        alive = Alive()
        for weight in model.parameters():
            alive.add(weight)
            if weight.grad is not None:
                alive.add(weight.grad)
        before = alive.now
        with alive:
            step()
    return alive.peak - before


def _transformer(shape: ModelShape, adapter: Adapter, blocks: int) -> Any:
    from diffusers import Kandinsky5Transformer3DModel

    half = shape.head_dim // 8  # rotary halves: 1/4 of the head for time, 3/8 for height and for width
    with _default(torch.bfloat16):
        model: Any = Kandinsky5Transformer3DModel(
            in_visual_dim=16,
            out_visual_dim=16,
            in_text_dim=3584,
            in_text_dim2=768,
            time_dim=shape.time_dim,
            model_dim=shape.model_dim,
            ff_dim=shape.ff_dim,
            num_text_blocks=2,
            num_visual_blocks=blocks,
            axes_dims=(2 * half, 3 * half, 3 * half),
            visual_cond=True,
        )
    model.requires_grad_(False)
    for block in model.visual_transformer_blocks:
        for part in (block.self_attention, block.cross_attention, block.feed_forward):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear) and name in (QKV if adapter.layers == "qkv" else ALL):
                    setattr(part, name, WithAdapter(layer, adapter.rank, TORCH_DTYPES[adapter.dtype]))
    return model.train()


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """New tensors and layers are of that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
