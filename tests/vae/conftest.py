"""Fixtures of the VAE's tests."""

from collections.abc import Iterator

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
