"""Run by tests/test_device.py in a process of its own.

Training and sampling on a device: every tensor is there, the draws are the CPU's, and checkpoints change place.

The toy device computes with the CPU's kernels: what differs by more than the order of a sum is a draw of its own.
"""

import pytest
import torch
from tiny_stage import TINY, encode_text, parameters, tiny_loop
from torch import nn
from torch.utils._pytree import tree_leaves
from toy_device import toy_device

from k5kernels.attention import AttentionConfig
from k5kernels.device import device_of
from k5kernels.text_condition import TextCondition
from k5kernels.vae import VAEConfig
from model.crossdit import CrossDiT
from model.sampler import sample
from train import vae_stage
from train.loop import Loop
from train.schedule import Schedule
from train.vae_stage import VAE, VAEStage

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
NABLA = AttentionConfig("nabla", 0.9, (1, 3, 3))


def test_the_toy_device_computes_as_the_cpu_and_does_not_mix_with_it():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = layer(x)
    with toy_device() as toy:
        layer.to(toy)
        assert device_of(layer) == toy
        out = layer(x.to(toy))
        assert out.device == toy
        out.sum().backward()
        assert layer.weight.grad.device == toy
        with pytest.raises(RuntimeError, match="one device"):
            layer(x)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("attention", [AttentionConfig(), NABLA], ids=["dense", "nabla"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_crossdit_trains_there_as_on_the_cpu(attention, checkpointing):
    on_cpu = tiny_loop(attention=attention, batch=2)
    losses = [on_cpu.step() for _ in range(3)]
    with toy_device() as toy:
        there = tiny_loop(device=toy, attention=attention, batch=2)
        there.stage.model.gradient_checkpointing = checkpointing
        assert [there.step() for _ in range(3)] == pytest.approx(losses, rel=1e-6)
        torch.testing.assert_close(parameters(there).cpu(), parameters(on_cpu), **ROUNDING)
        state = there.stage.state_dict()
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        assert {tensor.device for tensor in tensors} == {toy}


def test_autocast_is_of_the_devices_kind(monkeypatch):
    kinds = []
    autocast = torch.autocast

    def spy(kind, *arguments, **settings):
        kinds.append(kind)
        return autocast(kind, *arguments, **settings)

    monkeypatch.setattr(torch, "autocast", spy)
    with toy_device() as toy:
        tiny_loop(device=toy, bf16=True).step()
    assert kinds
    assert set(kinds) == {"toy"}


def test_a_checkpoint_goes_from_a_device_to_the_cpu_and_back(tmp_path):
    whole = tiny_loop()
    losses = [whole.step() for _ in range(6)]
    with toy_device() as toy:
        first = tiny_loop(device=toy)
        for _ in range(2):
            first.step()
        first.save(tmp_path / "there")
    second = tiny_loop()
    second.resume(tmp_path / "there")
    assert [second.step() for _ in range(2)] == pytest.approx(losses[2:4], rel=1e-6)
    second.save(tmp_path / "back")
    with toy_device() as toy:
        third = tiny_loop(device=toy)
        third.resume(tmp_path / "back")
        assert [third.step() for _ in range(2)] == pytest.approx(losses[4:], rel=1e-6)
        torch.testing.assert_close(parameters(third).cpu(), parameters(whole), **ROUNDING)


def test_the_vae_trains_there_from_the_same_draws(monkeypatch):
    """Under autocast the CPU computes in bfloat16 and the toy device in float32: close, from the same crops."""
    monkeypatch.setattr(vae_stage, "IMAGE_CROPS", ((2, 1, 16, 1.0),))
    torch.manual_seed(0)
    clips = {"noise": torch.randint(0, 256, (12, 24, 24, 3), dtype=torch.uint8)}

    def make_loop(device):
        torch.manual_seed(0)
        vae = VAE(VAEConfig(widths=(8, 8, 8, 8), groups=4, scaling_factor=1.0)).to(device)
        return Loop(VAEStage(vae, clips, 4), Schedule(4, warmup_steps=1, max_grad_norm=None))

    on_cpu = make_loop("cpu").step()
    with toy_device() as toy:
        assert make_loop(toy).step() == pytest.approx(on_cpu, rel=0.02)


def test_a_sample_there_is_the_cpus():
    torch.manual_seed(0)
    model, shape = CrossDiT(TINY).eval(), (1, 2, 4, 4, 16)
    text, negative = encode_text(["a"]), encode_text([""])
    first_frame = torch.randn(1, 1, 4, 4, 16)
    for attention in (AttentionConfig(), NABLA):
        settings = {"first_frame": first_frame, "steps": 3, "attention": attention}
        expected = sample(model, text, negative, shape, **settings)
        with toy_device() as toy:
            there = [TextCondition(part.tokens.to(toy), None, part.pooled.to(toy)) for part in (text, negative)]
            out = sample(model.to(toy), *there, shape, **settings)
            assert out.device == toy
            torch.testing.assert_close(out.cpu(), expected, **ROUNDING)
            model.to("cpu")
