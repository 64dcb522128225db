"""NABLA attention in diffusers' Kandinsky 5, and out of it again.

    python examples/nabla_in_diffusers.py

With a pipeline it is the same line: `with accelerate(pipe, thr=0.9, sta=(11, 3, 3)) as report: pipe(...)`. Here the
nano weights run in diffusers' own transformer, so that nothing has to be downloaded.
"""

import torch
from diffusers import Kandinsky5Transformer3DModel

from k5kernels.integrations.diffusers import accelerate
from model.nano import CROSSDIT_WEIGHTS
from model.weights import config_to_json, load_crossdit


def main() -> None:
    nano = load_crossdit(CROSSDIT_WEIGHTS)
    transformer = Kandinsky5Transformer3DModel(**config_to_json(nano.config)).eval()
    transformer.load_state_dict(nano.state_dict())

    frames, height, width, words = 3, 12, 36, 7  # of the latent: any size, not only multiples of 16
    random = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, frames, height, width, nano.config.input_channels, generator=random),
        "encoder_hidden_states": torch.randn(1, words, nano.config.in_text_dim, generator=random),
        "pooled_projections": torch.randn(1, nano.config.in_text_dim2, generator=random),
        "timestep": torch.tensor([500.0]),
        "visual_rope_pos": [torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        "text_rope_pos": torch.arange(words),
    }
    with torch.no_grad():
        dense = transformer(**arguments).sample
        with accelerate(transformer, attention="nabla", thr=0.9, densities=True) as report:
            sparse = transformer(**arguments).sample
        again = transformer(**arguments).sample

    print(report)
    print(f"differs from dense attention by {((sparse - dense).norm() / dense.norm()).item():.1%}")
    print(f"as before afterwards: {torch.equal(again, dense)}")


if __name__ == "__main__":
    main()
