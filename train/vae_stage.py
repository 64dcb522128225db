"""The stage that trains the VAE's encoder and decoder together, on random crops of clips.

Three phases: single frames teach space at the most updates for the time, short videos then teach time, and large crops
at the end set the GroupNorm statistics of whole frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k5kernels.latents.video import to_model
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.layers import FrameCausalAttention, ResnetBlock
from train.muon import muon_and_adamw
from train.stage import Loss, Stage

MUON_LEARNING_RATE = 5e-3  # of filters and matrices
ADAM_LEARNING_RATE = 2e-3  # of biases and norms
EMA_DECAY = 0.99
KL_WEIGHT = 1e-5
L1_WEIGHT = 0.2
INITIAL_LOG_VARIANCE = -6.0
# Of each phase: (batch, frames, side) and how often it is drawn.
IMAGE_CROPS = ((8, 1, 64, 0.9), (2, 1, 128, 0.1))
VIDEO_CROPS = ((4, 1, 96, 0.2), (1, 5, 96, 0.5), (1, 9, 96, 0.3))
LARGE_CROPS = ((2, 1, 256, 0.2), (1, 9, 128, 0.4), (1, 17, 128, 0.2), (1, 9, 192, 0.2))
IMAGE_SHARE, VIDEO_SHARE = 0.45, 0.40  # of the steps; the rest are large crops
Crops = tuple[tuple[int, int, int, float], ...]


class VAE(nn.Module):
    """Encoder and decoder trained together."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = HunyuanEncoder(config)
        self.decoder = HunyuanDecoder(config)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Start as a linear autoencoder of single frames: residual branches add nothing, the latent has little noise.

        Filters see the present frame only. If past frames counted from the start, each of the many causal layers would
        delay the video, and training on single frames, where past and present are equal, could not undo it.
        """
        for convolution in self.convolutions():
            nn.init.kaiming_normal_(convolution.weight[:, :, -1], nonlinearity="linear")
            nn.init.zeros_(convolution.weight[:, :, :-1])
            nn.init.zeros_(convolution.get_parameter("bias"))
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.conv.weight)
            elif isinstance(module, FrameCausalAttention):
                nn.init.zeros_(module.to_out.get_parameter("0.weight"))
        self.encoder.quant_conv.get_parameter("bias")[self.config.latent_channels :] = INITIAL_LOG_VARIANCE

    def convolutions(self) -> list[nn.Conv3d]:
        """All convolutions; filters are [out, in, time, height, width], the present last in time."""
        return [module for module in self.modules() if isinstance(module, nn.Conv3d)]

    def loss(self, video: Tensor, noise: torch.Generator) -> Tensor:
        """MSE + L1 of the reconstruction of a sampled latent, plus a small KL term."""
        with torch.autocast(video.device.type, torch.bfloat16):
            mean, log_variance = (t.float() for t in self.encoder.moments(video))
            sampled = torch.randn(mean.shape, generator=noise).to(mean.device)
            latent = mean + sampled * torch.exp(0.5 * log_variance)
            output = self.decoder(latent).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(output, video) + KL_WEIGHT * kl


def reconstruction_loss(output: Tensor, video: Tensor) -> Tensor:
    """MSE + L1 of two videos of the same shape."""
    return F.mse_loss(output, video) + L1_WEIGHT * F.l1_loss(output, video)


def crops_at(step: int, steps: int) -> Crops:
    """Images, then short videos, then large crops."""
    if step < IMAGE_SHARE * steps:
        return IMAGE_CROPS
    return VIDEO_CROPS if step < (IMAGE_SHARE + VIDEO_SHARE) * steps else LARGE_CROPS


def draw_crops(clips: list[Tensor], crops: Crops, generator: torch.Generator) -> tuple[Tensor, list[int]]:
    """Random crops of random clips (weighted by length), some mirrored: [batch, 3, F, side, side]; whose they are."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    weights = torch.tensor([float(clip.shape[0]) for clip in clips])
    shape = torch.multinomial(torch.tensor([crop[-1] for crop in crops]), 1, generator=generator)
    batch, frames, side, _ = crops[int(shape)]
    videos = []
    indices = torch.multinomial(weights, batch, replacement=True, generator=generator).tolist()
    for index in indices:
        clip = clips[index]
        start, top, left = (below(clip.shape[i] - size + 1) for i, size in enumerate((frames, side, side)))
        video = to_model(clip[start : start + frames, top : top + side, left : left + side])
        videos.append(video.flip(-1) if below(2) else video)
    return torch.cat(videos), indices


class VAEStage(Stage):
    """Muon for filters and matrices, AdamW for biases and norms; clips: name -> uint8 [F, H, W, 3]."""

    model: VAE

    def __init__(self, model: VAE, clips: dict[str, Tensor], steps: int) -> None:
        """steps: of the whole schedule, which the phases divide."""
        self.names, self.clips, self.steps = list(clips), list(clips.values()), steps
        optimizers = muon_and_adamw(model, MUON_LEARNING_RATE, ADAM_LEARNING_RATE)
        super().__init__({"stage": "vae", "clips": self.names, "steps": steps}, model, optimizers, EMA_DECAY)
        self.on_images = True
        for convolution in model.convolutions():
            convolution.weight.register_post_accumulate_grad_hook(self._spare_past_frames)

    def loss(self, step: int, generator: torch.Generator) -> Loss:
        """The loss of the crops that the step's phase draws."""
        self.on_images = step < IMAGE_SHARE * self.steps
        crops, indices = draw_crops(self.clips, crops_at(step, self.steps), generator)
        return Loss(self.model.loss(crops.to(self.device), generator), [self.names[index] for index in indices])

    def _spare_past_frames(self, weight: Tensor) -> None:
        """While single frames train, filters of past frames stay as they are: zero."""
        if self.on_images and weight.grad is not None:
            weight.grad[:, :, :-1] = 0
