"""MagCache in a diffusers pipeline: calibrate it in one run, then skip what hardly changes.

    python examples/cache_in_diffusers.py

For a released model there is nothing to calibrate: `with accelerate(pipe, cache="magcache") as report: pipe(...)`.
Here the nano weights run in diffusers' own pipeline on random text, so that nothing has to be downloaded.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

from k5kernels.cache import MagCache, MagCalibration
from k5kernels.integrations.diffusers import accelerate
from model.diffusers_folder import export_transformer
from model.nano import CROSSDIT_WEIGHTS
from model.weights import load_crossdit


def main() -> None:
    with TemporaryDirectory() as folder:
        export_transformer(load_crossdit(CROSSDIT_WEIGHTS), Path(folder))
        transformer = Kandinsky5Transformer3DModel.from_pretrained(folder)
    encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = Kandinsky5T2VPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3), **encoders
    )
    pipe.set_progress_bar_config(disable=True)

    random = torch.Generator().manual_seed(0)
    text = {
        "prompt_embeds_qwen": torch.randn(1, 7, 384, generator=random),
        "prompt_embeds_clip": torch.randn(1, 384, generator=random),
        "prompt_cu_seqlens": torch.tensor([0, 7]),
    }

    def generate() -> torch.Tensor:
        size = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 20, "guidance_scale": 1.0}
        return pipe(**text, **size, generator=torch.Generator().manual_seed(1), output_type="latent").frames

    calibration = MagCalibration()
    with accelerate(pipe, attention=None, cache=calibration):
        full = generate()
    calibration.save("ratios.json")

    cache = MagCache.load("ratios.json", threshold=0.2, max_skips=2, extrapolate=1.0)
    with accelerate(pipe, attention=None, cache=cache) as report:
        cached = generate()

    print(report)
    print(f"differs from the uncached latent by {((cached - full).norm() / full.norm()).item():.1%}")


if __name__ == "__main__":
    main()
