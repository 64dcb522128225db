"""Fixtures of the VAE's tests."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from vae_models import TINY, diffusers_vae


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny_vae() -> AutoencoderKLHunyuanVideo:
    return diffusers_vae(TINY)


@pytest.fixture(scope="session")
def tiny_vae_float64(tiny_vae: AutoencoderKLHunyuanVideo) -> AutoencoderKLHunyuanVideo:
    """The same weights: what diffusers itself rounds in float32, more on some processors, is not held against us."""
    return deepcopy(tiny_vae).double()
