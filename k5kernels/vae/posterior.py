"""What the encoder knows of a latent: a mean and a variance for each of its values."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """Independent normal distributions, with the names of diffusers' DiagonalGaussianDistribution.

    mean, logvar: [B, C, T, h, w], unscaled: a model's latents are a sample or the mode times the VAE's scaling factor.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Posterior":
        """moments: [B, 2 * C, T, h, w], the encoder's output: means, then logarithms of variances, which are limited
        to -30 to 20."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw; a generator of another device than the mean's draws there, and its numbers are moved."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        return self.mean
