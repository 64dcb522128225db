"""Our modes of the HunyuanVideo VAE in diffusers' own.

    python examples/vae_in_diffusers.py

With a pipeline it is the same line: `with accelerate(pipe, vae="stream") as report: pipe(...)`. Here a VAE has
the nano weights, so that nothing has to be downloaded.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLHunyuanVideo
from safetensors import safe_open

from k5kernels.integrations.diffusers import accelerate
from model.nano import VAE_WEIGHTS


def main() -> None:
    with TemporaryDirectory() as folder, safe_open(VAE_WEIGHTS, "pt") as weights:
        config = json.loads(weights.metadata()["config"])
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shutil.copy(VAE_WEIGHTS, Path(folder) / "diffusion_pytorch_model.safetensors")
        vae = AutoencoderKLHunyuanVideo.from_pretrained(folder, torch_dtype=torch.float32)

    frames = torch.arange(21).view(1, 1, 21, 1, 1)
    columns = torch.arange(96).view(1, 1, 1, 1, 96)
    video = torch.sin((columns + 2 * frames) / 9).expand(1, 3, 21, 64, 96) * 0.8  # stripes that move

    with torch.no_grad():
        for mode in ("exact", "tile"):
            with accelerate(vae, vae=mode) as report:
                again = vae.decode(vae.encode(video).latent_dist.mode()).sample
            print(report)
            print(f"{mode}: mean error {(again - video).abs().mean().item():.3f}")
        stock = vae.decode(vae.encode(video).latent_dist.mode()).sample
    print(f"stock, tiles that fade into each other: mean error {(stock - video).abs().mean().item():.3f}")


if __name__ == "__main__":
    main()
