"""Which attention runs, and what is said where it cannot."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from block_masks import random_mask, same_clip
from dense_attention import over_tokens, random_tokens
from tolerances import assert_error_bounded, assert_matches
from torch.nn.functional import scaled_dot_product_attention

from k5kernels import TokenLayout, block_sparse_attention, nabla_attention
from k5kernels.attention import (
    ENGINES,
    Call,
    DenseEngine,
    EngineUnavailableError,
    attention,
    choose_engine,
    engine,
    native,
    register_engine,
)
from k5kernels.attention.engine import _constant
from k5kernels.attention.flash import FlashAttention2

CLIPS = TokenLayout([(2, 9, 17), (1, 8, 20)])
MODULES = {
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
    "flash2": "flash_attn",
    "sage": "sageattention",
}
CUDA = torch.device("cuda")


class Halves(DenseEngine):
    """An engine of someone else's: half of PyTorch's attention, in float32 alone."""

    name = "halves"

    def why_not(self, call):
        return None if call.dtype == torch.float32 else "it takes float32"

    def attend(self, q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask) / 2


@pytest.fixture
def halves():
    register_engine(Halves())
    yield
    del ENGINES["halves"]


@pytest.fixture
def gpu_with(monkeypatch):
    """Pretend that some engines' packages are installed and that the GPU has a compute capability."""

    def pretend(installed: list[str], capability: tuple[int, int]) -> None:
        modules = [MODULES[name] for name in installed]
        monkeypatch.setattr(
            engine, "find_spec", lambda module: ModuleSpec(module, None, origin="here") if module in modules else None
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


@pytest.mark.parametrize(
    ("height", "width", "seconds", "name"),
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
def test_long_or_large_videos_take_nabla_and_the_rest_is_dense_as_in_the_released_models(height, width, seconds, name):
    assert choose_engine(height, width, seconds, "cpu") == name


@pytest.mark.parametrize(
    ("installed", "capability", "name"),
    [
        (["flash3", "flash2", "sage"], (9, 0), "flash3"),
        (["flash3", "flash2", "sage"], (8, 0), "flash2"),
        (["flash3", "sage"], (12, 0), "sage"),
        (["flash3"], (12, 0), "sdpa"),
        (["flash3", "flash2", "sage"], (7, 5), "sdpa"),
        ([], (9, 0), "sdpa"),
    ],
)
def test_the_dense_engine_is_the_newest_that_is_installed_and_fits_the_gpu(gpu_with, installed, capability, name):
    gpu_with(installed, capability)
    assert choose_engine(512, 768, 5, "cuda") == name
    assert choose_engine(512, 768, 5, "cuda", torch.float32) == "sdpa"
    assert choose_engine(512, 768, 5, "cpu") == "sdpa"
    assert choose_engine(512, 768, 10, "cuda") == "nabla"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((0, 768, 5), "height: expected at least 1 pixel, got 0"),
        ((512, -1, 5), "width: expected at least 1 pixel, got -1"),
        ((512, 768, -1), "seconds: expected 0 for an image or the length of a video, got -1"),
    ],
)
def test_sizes_that_are_none_are_refused(size, words):
    with pytest.raises(ValueError, match=words):
        choose_engine(*size)


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_dense_is_pytorchs_attention(name, device):
    q, k, v = random_tokens(CLIPS, 2, 3, 16, device=device)
    assert_matches(attention(q, k, v, name), scaled_dot_product_attention(q, k, v))
    few_keys, few_values = k[:, :, :7], v[:, :, :7]
    mask = torch.rand(2, 1, 1, 7, device=device) < 0.7
    mask[..., 0] = True
    expected = scaled_dot_product_attention(q, few_keys, few_values, attn_mask=mask)
    assert_matches(attention(q, few_keys, few_values, name, mask=mask), expected)


def test_dense_with_a_layout_stays_inside_each_clip(device):
    q, k, v = random_tokens(CLIPS, 2, 3, 16, device=device)
    mask = over_tokens(same_clip(CLIPS, device), CLIPS)
    for name in ("auto", "sdpa"):
        assert_matches(attention(q, k, v, name, CLIPS), scaled_dot_product_attention(q, k, v, attn_mask=mask))


with_kernel = pytest.mark.skipif(not native.HAS_KERNEL, reason="installed without a C++ compiler")


@with_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clips", [(1, 1, 1), (1, 8, 8), (1, 5, 13), [(2, 9, 17), (1, 8, 20)]], ids=str)
def test_this_librarys_dense_attention_is_exact_at_every_length_forward_and_backward(clips, dtype):
    layout = TokenLayout(clips)
    q, k, v = (x.requires_grad_() for x in random_tokens(layout, 2, 3, 24, dtype=dtype))
    mask = over_tokens(same_clip(layout), layout)
    grad = torch.randn(q.shape).to(dtype)
    results = []
    for tensors, run in (
        ((q, k, v), lambda q, k, v: attention(q, k, v, "native", layout)),
        ((q, k, v), lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)),
        (
            [x.detach().double().requires_grad_() for x in (q, k, v)],
            lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask),
        ),
    ):
        out = run(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))))
    for ours, eager, exact in zip(*results, strict=True):
        assert_error_bounded(ours, eager, exact)


def test_this_librarys_dense_attention_needs_its_kernel_and_a_layout(monkeypatch):
    q, k, v = random_tokens(CLIPS, 1, 1, 16)
    with pytest.raises(EngineUnavailableError, match="layout: it needs the TokenLayout of the sequence, got None"):
        attention(q, k, v, "native")
    with pytest.raises(EngineUnavailableError, match="it takes float32 and bfloat16, the tensors are float64"):
        attention(q.double(), k.double(), v.double(), "native", CLIPS)
    monkeypatch.setattr(native, "HAS_KERNEL", False)
    with pytest.raises(EngineUnavailableError, match=r"'native': this library was installed without a C\+\+ compiler"):
        attention(q, k, v, "native", CLIPS)


def test_nabla_is_nabla_attention_or_takes_a_mask_of_ones_own(device):
    q, k, v = random_tokens(CLIPS, 2, 3, 16, device=device)
    assert torch.equal(attention(q, k, v, "nabla", CLIPS), nabla_attention(q, k, v, CLIPS, 0.9))
    out = attention(q, k, v, "nabla", CLIPS, 0.5, (3, 3, 3))
    assert torch.equal(out, nabla_attention(q, k, v, CLIPS, 0.5, (3, 3, 3)))
    mask = random_mask(CLIPS, 2, 3, device=device)
    out = attention(q, k, v, "nabla", CLIPS, mask=mask)
    assert torch.equal(out, block_sparse_attention(q, k, v, mask))
    assert torch.equal(out, attention(q, k, v, "nabla", mask=mask))


def refusal(name: str, **call) -> str | None:
    """Why the engine cannot run a call on a GPU, in bfloat16 with D = 64 unless told otherwise."""
    return ENGINES[name].why_not(Call(**{"device": CUDA, "dtype": torch.bfloat16, "head_dim": 64} | call))


@pytest.mark.parametrize("name", MODULES)
def test_an_engine_of_a_package_says_what_it_lacks(gpu_with, name):
    gpu_with([], (9, 0))
    assert "is not installed" in refusal(name)
    gpu_with([name], (7, 5))
    assert refusal(name).startswith("it is for GPUs of compute capability")
    gpu_with([name], (9, 0))
    assert refusal(name) is None
    assert refusal(name, device=torch.device("cpu")) == "it runs on CUDA, the tensors are on cpu"
    assert refusal(name, dtype=torch.float32) == "it takes float16 and bfloat16, the tensors are float32"
    assert refusal(name, head_dim=264).endswith("the tensors have 264")
    assert refusal(name, mask=torch.ones(1, 1, dtype=torch.bool)) == "mask: it takes none, got Tensor"
    assert refusal(name, backward=True) == (
        "it has no backward, and q, k or v require gradients" if name == "sage" else None
    )


def test_head_dims_are_told_in_words(gpu_with):
    gpu_with(list(MODULES), (9, 0))
    assert refusal("flash3", head_dim=60) == "it takes head dims that are multiples of 8 up to 256, the tensors have 60"
    assert refusal("sage", head_dim=72) == "it takes head dims 64, 96, 128, the tensors have 72"


def test_a_call_knows_whether_gradients_are_asked_for_and_autocasts_dtype():
    q = torch.zeros(1, 1, 2, 4, requires_grad=True)
    assert Call.of(q, q, q).backward
    with torch.no_grad():
        assert not Call.of(q, q, q).backward
    assert Call.of(q, q, q).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert Call.of(q, q, q).dtype == torch.bfloat16
        assert Call.of(*[q.double()] * 3).dtype == torch.float64


@pytest.mark.parametrize("name", MODULES)
def test_an_engine_that_cannot_run_is_refused_with_the_reason_and_those_that_can(name):
    q, k, v = random_tokens(CLIPS, 1, 1, 16)
    words = f"engine {name!r}: it runs on CUDA, the tensors are on cpu; 'sdpa' can run this call"
    with pytest.raises(EngineUnavailableError, match=words):
        attention(q, k, v, name)
    with pytest.raises(EngineUnavailableError, match="'sdpa' or 'native' or 'nabla' can run this call"):
        attention(q, k, v, name, CLIPS)


@pytest.fixture
def played_package(monkeypatch):
    """Put a module of PyTorch's attention in an engine's place, in the order of dimensions that its package wants."""

    def play(name: str, returns_lse: bool = False) -> None:
        def flash_attn_func(q, k, v):
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
            out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
            return (out, None) if returns_lse else out

        def sageattn(q, k, v, tensor_layout):
            assert q.dtype == k.dtype == v.dtype == torch.bfloat16
            assert tensor_layout == "HND"
            out = scaled_dot_product_attention(q, k, v)
            k.zero_()  # releases 1.x change k in place: by its mean
            return out

        module = ModuleType(MODULES[name])
        module.flash_attn_func, module.sageattn = flash_attn_func, sageattn
        parent, _, _ = module.__name__.partition(".")
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(type(ENGINES[name]), "why_not", lambda self, call: None)

    return play


@pytest.mark.parametrize(
    ("name", "returns_lse"),
    [("flash3", False), ("flash3", True), ("flash4", True), ("flash2", False), ("sage", False)],
)
def test_an_engine_gets_the_tensors_in_the_order_its_package_wants(played_package, name, returns_lse):
    played_package(name, returns_lse)
    q, k, v = random_tokens(CLIPS, 2, 3, 16, dtype=torch.bfloat16)
    assert_matches(attention(q, k, v, name), scaled_dot_product_attention(q, k, v))
    mask = over_tokens(same_clip(CLIPS), CLIPS)
    assert_matches(attention(q, k, v, name, CLIPS), scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_auto_takes_an_exact_package_before_pytorchs_own_and_a_quantized_one_never(played_package):
    played_package("sage")
    q, k, v = random_tokens(CLIPS, 1, 1, 16)
    assert_matches(attention(q, k, v), scaled_dot_product_attention(q, k, v))  # sage was played for bfloat16 alone
    played_package("flash2")
    with pytest.raises(AssertionError):
        attention(q, k, v)


def test_a_package_gets_autocasts_dtype(played_package):
    played_package("flash2")
    q, k, v = random_tokens(CLIPS, 1, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, "flash2")
    assert out.dtype == torch.bfloat16


@pytest.mark.usefixtures("halves")
def test_an_engine_of_ones_own_is_asked_for_by_its_name_and_never_chosen():
    q, k, v = random_tokens(CLIPS, 1, 2, 16)
    expected = scaled_dot_product_attention(q, k, v)
    assert_matches(attention(q, k, v, "halves"), expected / 2)
    assert_matches(attention(q, k, v), expected)
    assert choose_engine(512, 768, 5, "cpu", torch.float32) == "sdpa"
    with pytest.raises(EngineUnavailableError, match="engine 'halves': it takes float32; 'sdpa' can run"):
        attention(*(x.bfloat16() for x in (q, k, v)), "halves")


@pytest.mark.parametrize("name", ["auto", "sdpa", "native", "nabla"])
def test_a_name_that_is_taken_is_refused(name):
    taken = Halves()
    taken.name = name
    with pytest.raises(ValueError, match=f"engine: expected a name other than auto, .*, got '{name}'"):
        register_engine(taken)


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), "flash2"), ((7, 5), "sdpa")])
def test_the_engine_is_chosen_and_run_inside_a_compiled_function_in_one_graph(monkeypatch, capability, runs):
    class AskedAboutAGPU(FlashAttention2):
        """Asked as if the tensors were on one, so that the package and the capability are looked up while tracing."""

        def why_not(self, call):
            return super().why_not(Call(CUDA, call.dtype, call.head_dim))

    flash_attn = ModuleType("flash_attn")
    flash_attn.__spec__ = ModuleSpec("flash_attn", None, origin="here")
    flash_attn.flash_attn_func = lambda q, k, v: v
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(ENGINES, "flash2", AskedAboutAGPU())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q, k, v = random_tokens(CLIPS, 1, 2, 16, dtype=torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, "auto", CLIPS), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), v if runs == "flash2" else attention(q, k, v, runs, CLIPS))


def test_arguments_that_do_not_fit_the_engine_are_refused_by_name():
    q, k, v = random_tokens(CLIPS, 2, 3, 16)
    block_mask = random_mask(CLIPS, 1, 1)
    token_mask = torch.ones(CLIPS.tokens, CLIPS.tokens, dtype=torch.bool)
    with pytest.raises(
        ValueError,
        match="engine: expected one of auto, flash3, flash4, flash2, sage, sdpa, native, nabla, flex, got 'flash'",
    ):
        attention(q, k, v, "flash")
    with pytest.raises(ValueError, match="layout: it needs the TokenLayout of the sequence, got None"):
        attention(q, k, v, "nabla")
    with pytest.raises(ValueError, match="mask: it takes a BlockMask, got Tensor"):
        attention(q, k, v, "nabla", CLIPS, mask=token_mask)
    with pytest.raises(ValueError, match=r"mask: it takes a bool tensor, got a BlockMask.*'nabla' can run this call"):
        attention(q, k, v, "sdpa", CLIPS, mask=block_mask)
    for name in ("auto", "sdpa"):
        with pytest.raises(ValueError, match=r"mask: it takes a tensor or a layout, got both;.*no engine can run"):
            attention(q, k, v, name, CLIPS, mask=token_mask)
    with pytest.raises(ValueError, match="q: expected a floating"):
        attention(q[:, :, 1:], k, v, "sdpa", CLIPS)
    with pytest.raises(ValueError, match="thr: expected"):
        attention(q, k, v, "nabla", CLIPS, thr=1.5)


def test_what_compiled_code_takes_for_constant_is_marked_as_the_compiler_marks_it():
    def ours():
        pass

    def theirs():
        pass

    assert _constant(ours).__dict__ == torch.compiler.assume_constant_result(theirs).__dict__ != {}
