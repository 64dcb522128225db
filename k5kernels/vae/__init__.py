"""The HunyuanVideo VAE: encoder, decoder and their weights; the VAE of FLUX for images."""

from k5kernels.vae.config import VAEConfig, latent_frames
from k5kernels.vae.decoder import HunyuanDecoder
from k5kernels.vae.encoder import HunyuanEncoder
from k5kernels.vae.image import FluxVAE
from k5kernels.vae.plan import Plan
from k5kernels.vae.posterior import Posterior
from k5kernels.vae.tiling import KANDINSKY_TILING, Tiling

__all__ = [
    "KANDINSKY_TILING",
    "FluxVAE",
    "HunyuanDecoder",
    "HunyuanEncoder",
    "Plan",
    "Posterior",
    "Tiling",
    "VAEConfig",
    "latent_frames",
]
