"""The HunyuanVideo VAE: encoder, decoder and their weights."""

from k5kernels.vae.config import VAEConfig, latent_frames
from k5kernels.vae.decoder import HunyuanDecoder
from k5kernels.vae.encoder import HunyuanEncoder

__all__ = ["HunyuanDecoder", "HunyuanEncoder", "VAEConfig", "latent_frames"]
