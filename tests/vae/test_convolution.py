"""The VAE's convolution: Winograd's where it is faster, and never with filters of other weights."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vae_models import diffusers_vae, relative_error

from k5kernels.ops.library import kernel_for
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig, convolution
from k5kernels.vae.convolution import UnpaddedConv3d

pytestmark = pytest.mark.skipif(kernel_for("winograd_conv3d", "cpu") != "C++", reason="no C++ kernels were built")


@pytest.fixture
def calls(monkeypatch) -> list[Tensor]:
    """Inputs of every Winograd convolution."""
    inputs: list[Tensor] = []

    def counted(x, filters, bias):
        inputs.append(x)
        return torch.ops.k5.winograd_conv3d(x, filters, bias)

    monkeypatch.setattr(convolution, "winograd_conv3d", counted)
    return inputs


def convolution_of(channels_in: int = 16, channels_out: int = 32, kernel: int = 3, stride=(1, 1, 1)) -> UnpaddedConv3d:
    torch.manual_seed(0)
    return UnpaddedConv3d(channels_in, channels_out, kernel, stride)


def random_input(channels: int = 16, size: tuple[int, int, int] = (3, 10, 10)) -> Tensor:
    return torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))


def assert_is_its_weights(conv: UnpaddedConv3d, x: Tensor) -> None:
    with torch.no_grad():
        assert relative_error(conv(x), F.conv3d(x, conv.weight, conv.bias)) < 1e-5


def test_without_gradients_winograd_takes_over(calls):
    assert_is_its_weights(convolution_of(), random_input())
    assert len(calls) == 1


def test_filters_are_transformed_once(monkeypatch):
    conv, x = convolution_of(), random_input()
    assert_is_its_weights(conv, x)
    monkeypatch.setattr(convolution, "winograd_filters", None)
    assert_is_its_weights(conv, x)


def change_in_place(conv: UnpaddedConv3d) -> UnpaddedConv3d:
    with torch.no_grad():
        conv.weight.mul_(-2)
    return conv


def step_of_an_optimizer(conv: UnpaddedConv3d) -> UnpaddedConv3d:
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1)
    conv(random_input()).square().sum().backward()
    optimizer.step()
    return conv


def load(conv: UnpaddedConv3d) -> UnpaddedConv3d:
    conv.load_state_dict({name: 3 * tensor for name, tensor in conv.state_dict().items()})
    return conv


def replace_the_parameter(conv: UnpaddedConv3d) -> UnpaddedConv3d:
    conv.weight = nn.Parameter(-conv.weight.detach())
    return conv


def copy_and_change(conv: UnpaddedConv3d) -> UnpaddedConv3d:
    return change_in_place(copy.deepcopy(conv))


def pickle_and_change(conv: UnpaddedConv3d) -> UnpaddedConv3d:
    return change_in_place(pickle.loads(pickle.dumps(conv)))


def round_to_bfloat16(conv: UnpaddedConv3d) -> UnpaddedConv3d:
    return conv.bfloat16().float()


@pytest.mark.parametrize(
    "change",
    [
        round_to_bfloat16,
        change_in_place,
        step_of_an_optimizer,
        load,
        replace_the_parameter,
        copy_and_change,
        pickle_and_change,
    ],
    ids=lambda change: change.__name__,
)
def test_changed_weights_are_seen(calls, change):
    conv, x = convolution_of(), random_input()
    assert_is_its_weights(conv, x)
    assert_is_its_weights(change(conv), x)
    assert len(calls) >= 2


def test_weights_loaded_in_inference_mode_are_seen(calls):
    with torch.inference_mode():
        conv, x = convolution_of(), random_input()
        conv(x)
        assert_is_its_weights(load(conv), x)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("conv", "x"),
    [
        (convolution_of(stride=(1, 2, 2)), random_input()),
        (convolution_of(kernel=1), random_input()),
        (convolution_of(channels_in=3), random_input(3)),
        (convolution_of(channels_out=3), random_input()),
        (convolution_of().bfloat16(), random_input().bfloat16()),
        (convolution_of().double(), random_input().double()),
        (convolution_of(), random_input(size=(3, 3, 4))),
    ],
    ids=["stride", "pointwise", "channels in", "channels out", "bfloat16", "float64", "a frame smaller than a tile"],
)
def test_elsewhere_the_plain_convolution_stays(calls, conv, x):
    with torch.no_grad():
        torch.testing.assert_close(conv(x), F.conv3d(x, conv.weight, conv.bias, conv.stride), rtol=0, atol=0)
    assert not calls


def test_gradients_are_the_plain_convolutions(calls):
    conv, x = convolution_of(), random_input().requires_grad_()
    for source in (x, x.detach()):
        assert conv(source).requires_grad
    assert not calls


def test_of_a_black_clip_too_exact_is_diffusers(calls):
    """Its activations do not vary in space; a GroupNorm would magnify what rounding made of that."""
    vae = diffusers_vae(VAEConfig(widths=(32, 64, 128, 128), groups=8, layers_per_block=1))
    video = -torch.ones(1, 3, 5, 32, 40)
    with torch.no_grad():
        mean = HunyuanEncoder.from_diffusers(vae).encode(video, "exact").mean
        assert relative_error(mean, vae.encode(video).latent_dist.mean) < 1e-5
    assert calls


def test_with_128_channels_exact_stays_within_1e_5_of_diffusers(calls):
    vae = diffusers_vae(VAEConfig(widths=(32, 64, 128, 128), layers_per_block=1))
    video = torch.rand(1, 3, 5, 40, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(video).latent_dist
        posterior = HunyuanEncoder.from_diffusers(vae).encode(video, "exact")
        assert {x.shape[1] for x in calls} == {32, 64, 128}
        assert relative_error(posterior.mean, expected.mean) < 1e-5
        assert relative_error(posterior.logvar, expected.logvar) < 1e-5
        decoded = HunyuanDecoder.from_diffusers(vae).decode(expected.mean, "exact")
        assert relative_error(decoded, vae.decode(expected.mean).sample) < 1e-5
