"""Which attention runs, and what is said where it cannot."""

import sys
from types import ModuleType

import pytest
import torch
from block_masks import random_mask, same_clip
from dense_attention import over_tokens, random_tokens
from tolerances import assert_matches
from torch.nn.functional import scaled_dot_product_attention

from k5kernels import TokenLayout, block_sparse_attention, nabla_attention
from k5kernels.attention import ENGINES, EngineUnavailableError, attention, choose_engine, engines

CLIPS = TokenLayout([(2, 9, 17), (1, 8, 20)])
PACKAGE_ENGINES = ["flash3", "flash2", "sage"]


@pytest.fixture
def gpu_with(monkeypatch):
    """Pretend that some engines' packages are installed and that the GPU has a compute capability."""

    def pretend(installed: list[str], capability: tuple[int, int]) -> None:
        modules = [engines.PACKAGES[name].module for name in installed]
        monkeypatch.setattr(engines, "find_spec", lambda module: module if module in modules else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


@pytest.mark.parametrize(
    ("height", "width", "seconds", "engine"),
    [
        (512, 768, 5, "sdpa"),
        (768, 512, 121 / 24, "sdpa"),
        (512, 768, 10, "nabla"),
        (768, 1280, 5, "nabla"),
        (768, 1280, 10, "nabla"),
        (256, 256, 5.2, "nabla"),
        (1024, 1024, 0, "sdpa"),
    ],
)
def test_long_or_large_videos_take_nabla_and_the_rest_is_dense_as_in_the_released_models(
    height, width, seconds, engine
):
    assert choose_engine(height, width, seconds, "cpu") == engine


@pytest.mark.parametrize(
    ("installed", "capability", "engine"),
    [
        (PACKAGE_ENGINES, (9, 0), "flash3"),
        (PACKAGE_ENGINES, (8, 0), "flash2"),
        (["flash3", "sage"], (12, 0), "sage"),
        (["flash3"], (12, 0), "sdpa"),
        (PACKAGE_ENGINES, (7, 5), "sdpa"),
        ([], (9, 0), "sdpa"),
    ],
)
def test_the_dense_engine_is_the_newest_that_is_installed_and_fits_the_gpu(gpu_with, installed, capability, engine):
    gpu_with(installed, capability)
    assert choose_engine(512, 768, 5, "cuda") == engine
    assert choose_engine(512, 768, 5, "cpu") == "sdpa"


@pytest.mark.parametrize(("height", "width", "seconds"), [(0, 768, 5), (512, -1, 5), (512, 768, -1)])
def test_sizes_that_are_none_are_refused(height, width, seconds):
    with pytest.raises(ValueError, match="expected positive height and width"):
        choose_engine(height, width, seconds)


@pytest.mark.parametrize("engine", ["auto", "sdpa"])
def test_dense_is_pytorchs_attention(engine, device):
    q, k, v = random_tokens(CLIPS, 2, 3, 16, device=device)
    assert_matches(attention(q, k, v, engine), scaled_dot_product_attention(q, k, v))
    few_keys, few_values = k[:, :, :7], v[:, :, :7]
    mask = torch.rand(2, 1, 1, 7, device=device) < 0.7
    mask[..., 0] = True
    expected = scaled_dot_product_attention(q, few_keys, few_values, attn_mask=mask)
    assert_matches(attention(q, few_keys, few_values, engine, mask=mask), expected)


def test_dense_with_a_layout_stays_inside_each_clip(device):
    q, k, v = random_tokens(CLIPS, 2, 3, 16, device=device)
    mask = over_tokens(same_clip(CLIPS, device), CLIPS)
    assert_matches(attention(q, k, v, "sdpa", CLIPS), scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_nabla_is_nabla_attention_with_the_released_window_or_a_mask_of_ones_own(device):
    q, k, v = random_tokens(CLIPS, 2, 3, 16, device=device)
    out = attention(q, k, v, "nabla", CLIPS)
    assert torch.equal(out, nabla_attention(q, k, v, CLIPS, 0.9, (11, 3, 3)))
    mask = random_mask(CLIPS, 2, 3, device=device)
    out = attention(q, k, v, "nabla", CLIPS, mask=mask)
    assert torch.equal(out, block_sparse_attention(q, k, v, mask, CLIPS))


@pytest.mark.parametrize("engine", PACKAGE_ENGINES)
def test_an_engine_that_is_not_installed_says_which_package_and_what_else(monkeypatch, engine):
    monkeypatch.setattr(engines, "find_spec", lambda module: None)
    q, k, v = random_tokens(CLIPS, 1, 1, 16)
    with pytest.raises(EngineUnavailableError, match=rf"(?s){engine}.*is not installed.*sdpa"):
        attention(q, k, v, engine)


@pytest.mark.parametrize("engine", PACKAGE_ENGINES)
def test_an_installed_engine_refuses_what_it_cannot_take(gpu_with, engine):
    gpu_with([engine], (9, 0))
    q, k, v = random_tokens(CLIPS, 1, 1, 16)
    with pytest.raises(EngineUnavailableError, match="it runs on CUDA, the tensors are on cpu"):
        attention(q, k, v, engine)
    cuda = torch.device("cuda")
    assert "takes float16 and bfloat16" in engines._obstacle(engine, cuda, torch.float32)
    assert engines._obstacle(engine, cuda, torch.bfloat16) is None
    gpu_with([engine], (7, 5))
    assert "compute capability" in engines._obstacle(engine, cuda, torch.bfloat16)


@pytest.mark.parametrize("engine", PACKAGE_ENGINES)
@pytest.mark.parametrize("returns_lse", [False, True])
def test_an_engine_gets_the_tensors_in_the_order_its_package_wants(monkeypatch, engine, returns_lse):
    """The package is played by PyTorch: [B, S, h, D] for FlashAttention, [B, h, S, D] for SageAttention."""

    def flash_attn_func(q, k, v):
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, None) if returns_lse else out

    def sageattn(q, k, v, tensor_layout):
        assert tensor_layout == "HND"
        return scaled_dot_product_attention(q, k, v)

    module = ModuleType(engines.PACKAGES[engine].module)
    module.flash_attn_func, module.sageattn = flash_attn_func, sageattn
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(engines, "_obstacle", lambda *arguments: None)
    q, k, v = random_tokens(CLIPS, 2, 3, 16)
    assert_matches(attention(q, k, v, engine), scaled_dot_product_attention(q, k, v))
    mask = over_tokens(same_clip(CLIPS), CLIPS)
    assert_matches(attention(q, k, v, engine, CLIPS), scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_arguments_that_do_not_fit_the_engine_are_refused():
    q, k, v = random_tokens(CLIPS, 2, 3, 16)
    block_mask = random_mask(CLIPS, 1, 1)
    token_mask = torch.ones(CLIPS.tokens, CLIPS.tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"expected one of {', '.join(ENGINES)}, got 'flash'"):
        attention(q, k, v, "flash")
    with pytest.raises(ValueError, match="needs the TokenLayout"):
        attention(q, k, v, "nabla")
    with pytest.raises(ValueError, match="takes a BlockMask, got Tensor"):
        attention(q, k, v, "nabla", CLIPS, mask=token_mask)
    with pytest.raises(ValueError, match='a BlockMask needs engine="nabla"'):
        attention(q, k, v, "sdpa", CLIPS, mask=block_mask)
    with pytest.raises(ValueError, match='only engine="sdpa" without a layout'):
        attention(q, k, v, "sdpa", CLIPS, mask=token_mask)
    with pytest.raises(ValueError, match='only engine="sdpa" without a layout'):
        attention(q, k, v, "flash2", mask=token_mask)
    with pytest.raises(ValueError, match="q: expected a floating"):
        attention(q[:, :, 1:], k, v, "sdpa", CLIPS)
