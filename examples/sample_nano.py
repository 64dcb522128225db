"""Sample a clip with the nano model that ships: NABLA attention and MagCache, from a text alone.

python examples/sample_nano.py --prompt "A rabbit in a meadow." --out clip.mp4
"""

import argparse
from fractions import Fraction
from pathlib import Path

import torch

from k5kernels.attention import AttentionConfig
from k5kernels.cache import MagCache
from k5kernels.latents.video import to_frames, write_video
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.vae.weights import load_decoder
from model.nano import CROSSDIT_WEIGHTS, VAE_WEIGHTS, load_settings
from model.sampler import sample
from model.weights import load_crossdit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="A big grey rabbit stands in a green meadow.")
    parser.add_argument("--frames", type=int, default=25, help="1 + a multiple of 4")
    parser.add_argument("--steps", type=int, default=50, help="MagCache's ratios are of 50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("clip.mp4"))
    options = parser.parse_args()

    settings, text = load_settings(), MiniLMTextEncoder()
    latent = sample(
        load_crossdit(CROSSDIT_WEIGHTS),
        text.encode([options.prompt]),
        text.encode([""]),
        shape=(1, 1 + (options.frames - 1) // 4, 32, 48, 16),  # [B, T, H, W, C]: 256×384 pixels
        steps=options.steps,
        guidance=settings.guidance,
        scheduler_scale=settings.scheduler_scale,
        seed=options.seed,
        attention=AttentionConfig("nabla", settings.thr, settings.sta),
        cache=MagCache(settings.mag_ratios),
        progress=lambda done, steps: print(f"step {done} of {steps}", end="\r"),
    )
    with torch.inference_mode():
        video = load_decoder(VAE_WEIGHTS)(latent.permute(0, 4, 1, 2, 3))
    write_video(options.out, to_frames(video), Fraction(25))
    print(f"\nwrote {options.out}, {video.shape[2]} frames")


if __name__ == "__main__":
    main()
