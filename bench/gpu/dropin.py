"""A block of diffusers' Kandinsky 5 with our attention in it, beside what diffusers runs there itself."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.gpu.block import THR, config_of
from bench.gpu.compare import assert_near
from bench.gpu.inputs import LITE, STA, Size
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.shaped_block import ROPE_SCALE, TEXT_TOKENS, shaped_block
from k5kernels import TokenLayout, sta_mask
from k5kernels.integrations.diffusers import accelerate

TEXT_DIM = 64
MASK = f"NABLA {THR} ∪ STA"


def dropin(run: Run) -> None:
    """A pass of diffusers' transformer of one visual block: dense, by compiled FlexAttention, and accelerated; then
    the memory that NABLA takes in both."""
    for size in (size for size in run.sizes if size is LITE or run.device.type == "cpu"):
        if find_spec("diffusers") is None:
            run.absent("drop-in", size, "all", "the package diffusers is not installed")
            continue
        with torch.inference_mode():
            _measure(run, size)


def _measure(run: Run, size: Size) -> None:
    model = shaped_transformer(size).to(run.device)
    given = arguments(size, run.device)
    stock = partial(_pass, model, given, None)
    compiled = torch.compile(partial(_pass, model), mode="max-autotune-no-cudagraphs")
    theirs = partial(compiled, given, stock_sparse_params(size, run.device))
    with accelerate(model, thr=1.0):
        assert_near(_pass(model, given, None), stock(), "thr 1 against the stock pass")
    with accelerate(model, thr=THR, sta=STA, densities=True) as report:
        _pass(model, given, None)
    assert report.density is not None
    density = round(report.density, 4)

    def ours() -> Tensor:
        with accelerate(model, thr=THR, sta=STA):
            return _pass(model, given, None)

    variants: dict[str, Callable[[], Any]] = {"stock dense": stock, "accelerated": ours}
    if run.device.type == "cuda":  # elsewhere FlexAttention computes the whole map
        variants["stock flex, compiled"] = theirs
        assert_near(ours(), theirs(), "accelerated against stock NABLA")
    run.measure("drop-in", size, variants, mask=MASK, density=density)
    if run.device.type == "cuda":
        for name, call in variants.items():
            run.keep(Row("drop-in memory", str(size), MASK, density, name, "MiB", _peak(call) / 2**20))


def shaped_transformer(size: Size) -> Any:
    """diffusers' transformer of one visual block in bfloat16, whose attention has a shape."""
    from diffusers import Kandinsky5Transformer3DModel

    config = config_of(size)
    torch.manual_seed(0)
    model: Any = Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=TEXT_DIM, in_text_dim2=TEXT_DIM, time_dim=config.time_dim,
        model_dim=config.model_dim, ff_dim=config.ff_dim, num_text_blocks=1, num_visual_blocks=1,
        axes_dims=config.axes_dims, visual_cond=False,
    )  # fmt: skip
    model.visual_transformer_blocks[0].load_state_dict(shaped_block(config).state_dict())
    model.to(torch.bfloat16)
    for name, module in model.named_modules():  # as from_pretrained leaves them
        if any(kept in name for kept in model._keep_in_fp32_modules):
            module.float()
    return model.eval()


def arguments(size: Size, device: torch.device) -> dict[str, Any]:
    """Of a pass of one clip of this size."""
    random = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=random).to(torch.bfloat16)

    T, H, W = size.clip
    return {
        "hidden_states": normal(1, T, 2 * H, 2 * W, 16),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, TEXT_DIM),
        "timestep": torch.full((1,), 500.0, device=device),
        "pooled_projections": normal(1, TEXT_DIM),
        "visual_rope_pos": [torch.arange(side, device=device) for side in size.clip],
        "text_rope_pos": torch.arange(TEXT_TOKENS, device=device),
        "scale_factor": ROPE_SCALE,
    }


def stock_sparse_params(size: Size, device: torch.device) -> dict[str, Any]:
    """What its pipeline gives to the transformer for NABLA."""
    window = sta_mask(TokenLayout((size.clip,)), STA, device).to_dense()
    return {"to_fractal": True, "sta_mask": window, "P": THR}


def _pass(model: Any, given: dict[str, Any], sparse_params: dict[str, Any] | None) -> Tensor:
    return model(**given, sparse_params=sparse_params).sample


def _peak(call: Callable[[], Any]) -> int:
    """Bytes of the largest moment of a call beyond what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before
