"""Muon's update has singular values near one, and its state survives a checkpoint."""

import pytest
import torch

from train.muon import ConvMuon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (6, 40), (40, 6)])
def test_singular_values_come_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(orthogonalize(matrix))
    # Five steps bring what is not tiny into this band; a square random matrix has a small last value.
    assert values[:-1].min() > 0.5
    assert values.max() < 1.4


def test_an_update_has_the_root_mean_square_of_adamw():
    weight = torch.nn.Parameter(torch.zeros(16, 4, 3, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    ConvMuon([weight], lr=1.0).step()
    assert 0.1 < float(weight.detach().square().mean().sqrt()) < 0.3


def test_a_restored_optimizer_goes_on_as_the_first_would():
    def run(steps: int, state: tuple | None = None):
        weight = torch.nn.Parameter(torch.ones(4, 2, 3, 3, 3))
        optimizer = ConvMuon([weight], lr=0.1)
        done = 0
        if state is not None:
            weight.data, saved, done = state[0].clone(), state[1], state[2]
            optimizer.load_state_dict(saved)
        for step in range(done, steps):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return weight.detach(), optimizer.state_dict(), steps

    assert torch.equal(run(4, run(2))[0], run(4)[0])
