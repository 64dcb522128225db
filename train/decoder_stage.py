"""The stage that trains a VAE's decoder on whole frames, while its encoder stays as it is.

Crops leave one thing untaught: a GroupNorm normalizes by all pixels of a clip, and whole frames of many seconds have
other means and variances than crops of a few. The latents stay what they were, and with them what was trained on them.
"""

import torch
from torch import Tensor

from k5kernels.latents.video import to_model
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder
from train.muon import muon_and_adamw
from train.stage import Loss, Stage
from train.vae_stage import reconstruction_loss

MUON_LEARNING_RATE = 5e-4  # of filters and matrices
ADAM_LEARNING_RATE = 2e-4  # of biases and norms
EMA_DECAY = 0.97
WINDOWS = ((1, 0.05), (9, 0.15), (17, 0.2), (25, 0.3), (41, 0.3))  # frames, and how often they are drawn


class DecoderStage(Stage):
    """Muon for filters and matrices, AdamW for biases and norms; clips: name -> uint8 [F, H, W, 3]."""

    model: HunyuanDecoder

    def __init__(self, encoder: HunyuanEncoder, decoder: HunyuanDecoder, clips: dict[str, Tensor]) -> None:
        """encoder: on the decoder's device. Raises ValueError for a clip that is shorter than the longest window."""
        longest = max(frames for frames, _ in WINDOWS)
        for name, clip in clips.items():
            if clip.shape[0] < longest:
                raise ValueError(f"{name}: expected at least {longest} frames, got {clip.shape[0]}")
        self.encoder, self.names, self.clips = encoder, list(clips), list(clips.values())
        optimizers = muon_and_adamw(decoder, MUON_LEARNING_RATE, ADAM_LEARNING_RATE)
        super().__init__({"stage": "decoder", "clips": self.names}, decoder, optimizers, EMA_DECAY)

    def loss(self, step: int, generator: torch.Generator) -> Loss:
        """The error of a window's reconstruction from a sample of its latent, as `stream` encodes it."""
        index, video = self._draw(generator)
        latent = self.encoder.encode(video).sample(generator)
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.model.run_tile(latent.to(memory_format=torch.channels_last_3d))
        return Loss(reconstruction_loss(output.float(), video), [self.names[index]])

    def _draw(self, generator: torch.Generator) -> tuple[int, Tensor]:
        """A clip's number, each as often, and a window of its frames, half of them mirrored: [1, 3, F, H, W]."""
        index = int(torch.randint(len(self.clips), (), generator=generator))
        clip, shares = self.clips[index], torch.tensor([share for _, share in WINDOWS])
        frames, _ = WINDOWS[int(torch.multinomial(shares, 1, generator=generator))]
        start = int(torch.randint(clip.shape[0] - frames + 1, (), generator=generator))
        video = to_model(clip[start : start + frames]).to(self.device)
        return index, video.flip(-1) if int(torch.randint(2, (), generator=generator)) else video
