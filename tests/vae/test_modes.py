"""`HunyuanEncoder.encode`: exact equals untiled, all modes cover every size, plans depend on nothing but arguments."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor
from vae_models import TINY, relative_error

from k5kernels.latents.video import BUCKETS
from k5kernels.vae import HunyuanEncoder
from k5kernels.vae.tile_runners import CompiledTiles
from k5kernels.vae.tiling import KANDINSKY_TILING, Tiling

pytestmark = pytest.mark.usefixtures("without_gradients")

MODES = ("exact", "stream", "tile")
MIB = 2**20


@pytest.fixture(scope="module")
def encoder(tiny_vae: AutoencoderKLHunyuanVideo) -> HunyuanEncoder:
    return HunyuanEncoder.from_diffusers(tiny_vae)


def random_video(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("shape", [(1, 3, 1, 16, 24), (2, 3, 9, 24, 16), (1, 3, 25, 16, 16)])
@pytest.mark.parametrize("memory_budget", [None, 2 * MIB, 200_000])
def test_exact_is_untiled_diffusers_within_any_budget(tiny_vae_float64, encoder, shape, memory_budget):
    video = random_video(*shape)
    expected = tiny_vae_float64.encode(video.double()).latent_dist
    posterior = encoder.encode(video, "exact", memory_budget)
    assert relative_error(posterior.mean, expected.mean) < 1e-5
    assert relative_error(posterior.logvar, expected.logvar) < 1e-5


def test_what_spills_changes_no_bit(encoder):
    video = random_video(1, 3, 33, 24, 24)
    plan = encoder.plan(video.shape, "exact", 400_000)
    assert plan.spilled_bytes > 0
    kept = encoder.encode(video, "exact", 400_000)
    assert plan.chunks != encoder.plan(video.shape, "exact").chunks
    torch.testing.assert_close(kept.mean, encoder.encode(video, "exact", 400_000).mean, rtol=0, atol=0)
    assert relative_error(kept.mean, encoder.encode(video, "exact").mean) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("height", [8, 15, 32])
@pytest.mark.parametrize("frames", [1, 5, 29])
def test_any_side_and_frame_count_gives_the_latents_of_its_size(encoder, mode, height, frames):
    posterior = encoder.encode(random_video(1, 3, frames, height, 20), mode)
    assert posterior.mean.shape == (1, 16, 1 + (frames - 1) // 4, -(-height // 8), 3)
    assert posterior.mean.isfinite().all()


SIZES = [size for sizes in BUCKETS.values() for size in sizes] + [(480, 856), (8, 8), (720, 1280)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_budget", [None, 24 * 2**30])
def test_the_plan_covers_every_size_of_the_report(mode, memory_budget):
    with torch.device("meta"):
        encoder = HunyuanEncoder().bfloat16()
    for height, width in SIZES:
        for frames in (1, 5, 29, 121, 241):
            plan = encoder.plan((1, 3, frames, height, width), mode, memory_budget)
            assert plan.latent_shape == (1 + (frames - 1) // 4, height // 8, width // 8)
            assert sum(plan.chunks) == frames
            assert plan == encoder.plan((1, 3, frames, height, width), mode, memory_budget)
            if memory_budget is not None:
                assert plan.peak_bytes <= memory_budget
            for axis, latents in zip((plan.times, plan.rows, plan.columns), plan.latent_shape, strict=True):
                assert {latent for span in axis for latent in range(*span)} == set(range(latents))


def test_a_plan_says_and_draws_what_it_does(encoder):
    plan = encoder.plan((1, 3, 33, 64, 128), "tile", 12 * MIB, tiling=Tiling(overlap=8))
    assert len(plan.rows) * len(plan.columns) > 1
    assert f"2 x {len(plan.rows)} x {len(plan.columns)} tiles (time, height, width), not blended" in str(plan)
    assert plan.drawing().splitlines()[:3] == ["time (9 latents)", "#####", "    -####"]


def test_tiles_are_diffusers_whole_encoder_on_each_of_them(tiny_vae_float64, encoder):
    video = random_video(1, 3, 33, 16, 16)
    tiles = (video[:, :, start : start + 17].double() for start in (0, 16))
    first, second = (tiny_vae_float64.encode(tile).latent_dist.mean for tile in tiles)
    expected = torch.cat([first, second[:, :, 1:]], dim=2)
    assert relative_error(encoder.encode(video, "tile").mean, expected) < 1e-5


def test_tiles_as_kandinskys_fade_over_two_latents(tiny_vae_float64, encoder):
    video = random_video(1, 3, 25, 16, 16)
    tiles = (video[:, :, start : start + 17].double() for start in (0, 8))
    first, second = (tiny_vae_float64.encode(tile).latent_dist.mean for tile in tiles)
    expected = torch.cat([first[:, :, :4], (first[:, :, 4:] + second[:, :, 2:3]) / 2, second[:, :, 3:]], dim=2)
    assert relative_error(encoder.encode(video, "tile", tiling=KANDINSKY_TILING).mean, expected) < 1e-5


def test_a_batch_is_its_clips(encoder):
    video = random_video(3, 3, 9, 16, 16)
    for mode in MODES:
        for budget in (None, 64 * MIB):
            together = encoder.encode(video, mode, budget).mean
            assert relative_error(together[2:], encoder.encode(video[2:], mode, budget).mean) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_errs_as_bfloat16_errs(encoder, mode):
    video = random_video(1, 3, 9, 16, 16)
    narrow = HunyuanEncoder(TINY).bfloat16()
    narrow.load_state_dict(encoder.state_dict())
    exact = encoder.encode(video, mode).mean
    eager = narrow.moments(video.bfloat16())[0].float()
    error = (narrow.encode(video, mode).mean.float() - exact).norm()
    assert error <= 2 * (eager - exact).norm()


def test_the_posterior_has_diffusers_values(tiny_vae, encoder):
    video = random_video(1, 3, 5, 16, 16)
    ours, theirs = encoder.encode(video, "exact"), tiny_vae.encode(video).latent_dist
    assert relative_error(ours.mode(), theirs.mode()) < 1e-5
    assert relative_error(ours.std, theirs.std) < 1e-5
    draws = (one.sample(torch.Generator().manual_seed(0)) for one in (ours, theirs))
    assert relative_error(*draws) < 1e-5


@pytest.mark.parametrize(
    ("shape", "arguments", "expected"),
    [
        ((1, 3, 30, 16, 16), {}, r"1 \+ a multiple of 4 frames, got 30; give 29 or 33"),
        ((3, 5, 16, 16), {}, r"expected \[B, 3, frames, height, width\], got \[3, 5, 16, 16\]"),
        ((1, 3, 5, 16, 0), {}, r"expected \[B, 3, frames, height, width\], got \[1, 3, 5, 16, 0\]"),
        ((1, 3, 5, 16, 16), {"mode": "tiled"}, "mode: expected one of exact, stream, tile, got 'tiled'"),
        ((1, 3, 5, 16, 16), {"memory_budget": 1000}, r"memory_budget: expected at least \d+ bytes .* got 1000"),
        (
            (1, 3, 5, 16, 16),
            {"mode": "exact", "lookback": 2},
            "lookback: expected .* in mode stream, got 2 in mode exact",
        ),
    ],
)
def test_what_does_not_fit_is_refused(encoder, shape, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        encoder.encode(torch.zeros(shape), **arguments)


def test_compiled_tiles_are_the_tiles_and_say_what_compiling_took(encoder):
    video = random_video(1, 3, 37, 16, 16)
    runner = CompiledTiles(encoder, backend="aot_eager")
    compiled = encoder.encode(video, "tile", runner=runner).mean
    assert relative_error(compiled, encoder.encode(video, "tile").mean) < 1e-5
    assert set(runner.seconds) == {(1, 3, 17, 16, 16), (1, 3, 5, 16, 16)}
    assert all(seconds > 0 for seconds in runner.seconds.values())


@pytest.mark.slow
def test_tiles_compile_to_kernels(encoder):
    video = random_video(1, 3, 17, 16, 16)
    compiled = encoder.encode(video, "tile", runner=CompiledTiles(encoder)).mean
    assert relative_error(compiled, encoder.encode(video, "tile").mean) < 1e-5
