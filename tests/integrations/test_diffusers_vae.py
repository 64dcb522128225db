"""diffusers' HunyuanVideo VAE by our encoder and decoder: its results and types, any mode, and as before afterwards."""

from typing import Any

import diffusers
import pytest
import torch
from small_kandinsky import generate, pipeline, snapshot
from torch import Tensor, nn

from k5kernels.integrations.diffusers import accelerate
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder

SIZES = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def made() -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(**SIZES)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return vae.eval()


@pytest.fixture
def vae(made: Any) -> Any:
    return made


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latent(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def difference(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


# Of up to 16 frames diffusers takes the clip whole, as "exact" and "stream" do.
@pytest.mark.parametrize("mode", ["exact", "stream"])
def test_a_short_clip_gives_the_stock_result_in_its_types(vae, mode):
    x, z = video(2, 3, 9, 32, 48), latent(2, 16, 3, 4, 6)
    stock, decoded = vae.encode(x), vae.decode(z)
    with accelerate(vae, vae=mode) as report:
        ours, again = vae.encode(x), vae.decode(z)
        as_tuples = vae.encode(x, return_dict=False), vae.decode(z, return_dict=False)
    assert type(ours) is type(stock)
    assert type(again) is type(decoded)
    assert difference(ours.latent_dist.parameters, stock.latent_dist.parameters) < 1e-5
    draws = [one.latent_dist.sample(torch.Generator().manual_seed(0)) for one in (ours, stock)]
    assert difference(*draws) < 1e-5
    assert difference(again.sample, decoded.sample) < 1e-5
    assert torch.equal(as_tuples[0][0].mean, ours.latent_dist.mean)
    assert torch.equal(as_tuples[1][0], again.sample)
    assert f"VAE, 2 calls: {mode}, encoder: 2 x 9 frames of 32 x 48" in str(report)


@pytest.mark.parametrize("mode", ["exact", "stream", "tile"])
def test_a_long_clip_goes_through_as_our_halves_take_it(vae, mode):
    x, z = video(1, 3, 37, 16, 16), latent(1, 16, 10, 2, 2)
    expected = HunyuanEncoder.from_diffusers(vae).encode(x, mode), HunyuanDecoder.from_diffusers(vae).decode(z, mode)
    with accelerate(vae, vae=mode):
        assert torch.equal(vae.encode(x).latent_dist.mean, expected[0].mean)
        assert torch.equal(vae.decode(z).sample, expected[1])


def test_exact_is_what_diffusers_gives_of_the_whole_clip(vae):
    x = video(1, 3, 37, 16, 16)
    vae.use_framewise_encoding = False
    whole = vae.encode(x).latent_dist.mean
    vae.use_framewise_encoding = True
    assert difference(vae.encode(x).latent_dist.mean, whole) > 1e-3
    with accelerate(vae, vae="exact"):
        assert difference(vae.encode(x).latent_dist.mean, whole) < 1e-5


def test_nothing_is_left_behind_whatever_happens_inside(vae):
    before, z = snapshot(vae), latent(1, 16, 2, 2, 2)
    plain = vae.decode(z).sample
    with accelerate(vae, vae="exact"):
        vae.decode(z)
    assert snapshot(vae) == before
    assert torch.equal(vae.decode(z).sample, plain)
    with accelerate(vae, vae="exact", vae_memory=1000), pytest.raises(ValueError, match="memory_budget: expected at"):
        vae.decode(z)
    assert snapshot(vae) == before


def test_a_budget_is_kept_and_changes_no_bit_but_of_rounding(vae):
    z = latent(1, 16, 4, 4, 4)
    with accelerate(vae, vae="exact"):
        whole = vae.decode(z).sample
    with accelerate(vae, vae="exact", vae_memory=800_000):
        assert difference(vae.decode(z).sample, whole) < 1e-5


def test_weights_changed_or_moved_since_are_the_ones_that_count(vae):
    z = latent(1, 16, 2, 2, 2)
    other = diffusers.AutoencoderKLHunyuanVideo(**SIZES).eval()
    with accelerate(other, vae="exact"):
        other.load_state_dict(vae.state_dict())
        assert difference(other.decode(z).sample, vae.decode(z).sample) < 1e-5
        other.bfloat16()
        assert other.decode(z.bfloat16()).sample.dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"vae: expected an input where its weights are, torch.bfloat16 on cpu"):
            other.decode(z)


def test_an_offloaded_vae_is_moved_first(vae):
    class Hook:
        calls = 0

        def pre_forward(self, module: nn.Module) -> None:
            self.calls += 1

    vae._hf_hook = Hook()
    try:
        with accelerate(vae, vae="exact"):
            vae.decode(latent(1, 16, 2, 2, 2))
        assert vae._hf_hook.calls == 1
    finally:
        del vae._hf_hook


def test_what_is_left_to_the_vae_is_told_with_the_reason(vae):
    inputs = {
        "the frames are not 1 + a multiple of 4": video(1, 3, 4, 16, 16),
        "the sides are no multiples of 8": video(1, 3, 5, 20, 16),
        "gradients may be asked for": video(1, 3, 5, 16, 16).requires_grad_(),
    }
    for reason, x in inputs.items():
        with torch.set_grad_enabled(x.requires_grad):
            plain = vae.encode(x).latent_dist.mean
            with accelerate(vae, vae="exact") as report:
                assert torch.equal(vae.encode(x).latent_dist.mean, plain)
        assert report.vae == {f"encode as before: {reason}": 1}


def test_a_pipeline_has_its_vae_taken_too(vae, transformer):
    pipe = pipeline(transformer, attention_type="regular")
    pipe.register_modules(vae=vae)
    plain = generate(pipe, 32, 48, output_type="pt")
    before = snapshot(vae)
    with accelerate(pipe, attention=None, vae="exact") as report:
        assert difference(generate(pipe, 32, 48, output_type="pt"), plain) < 1e-4
    assert list(report.vae.values()) == [1]
    assert snapshot(vae) == before


def test_other_vaes_are_refused_by_name_with_the_reason(transformer):
    with pytest.raises(ValueError, match=r"got AutoencoderKL: it is a VAE of images"):
        accelerate(diffusers.AutoencoderKL(block_out_channels=(32,)), vae="stream")
    with pytest.raises(ValueError, match="got AutoencoderTiny: its layers are not known here"):
        accelerate(diffusers.AutoencoderTiny(), vae="stream")
    with pytest.raises(ValueError, match="vae='stream': expected a pipeline with a VAE"):
        accelerate(transformer, vae="stream")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vae": "tiled"}, "vae: expected one of exact, stream, tile, got 'tiled'"),
        ({}, "a VAE alone takes vae and no cache, got vae=None"),
        ({"vae": "tile", "cache": "magcache"}, "a VAE alone takes vae and no cache"),
    ],
)
def test_wrong_settings_of_a_vae_are_refused_and_change_nothing(vae, settings, words):
    before = snapshot(vae)
    with pytest.raises(ValueError, match=words):
        accelerate(vae, **settings)
    assert snapshot(vae) == before


@pytest.mark.skipif(not hasattr(diffusers.ModelMixin, "enable_group_offload"), reason="no group offload")
def test_layers_that_diffusers_moves_one_by_one_are_refused():
    other = diffusers.AutoencoderKLHunyuanVideo(**SIZES).eval()
    other.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="hooks of diffusers"):
        accelerate(other, vae="exact")
