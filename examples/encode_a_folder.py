"""Encode a folder of videos into shards of latents, and read them back.

    python examples/encode_a_folder.py videos/ --out latents

The same command goes on where it was stopped. `k5 encode` is this with a progress bar and all options.
"""

import argparse
from pathlib import Path

from k5kernels.latents.job import encode_videos
from k5kernels.latents.shards import read_shard
from k5kernels.vae.weights import load_encoder
from model.nano import VAE_WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="+", help="files, and folders of them")
    parser.add_argument("--vae", type=Path, default=VAE_WEIGHTS, help="weights: a file, or a diffusers folder")
    parser.add_argument("--out", type=Path, default=Path("latents"), help="folder for the shards")
    options = parser.parse_args()

    summary = encode_videos(options.videos, load_encoder(options.vae), options.out, resolution=256, clip_frames=25)
    print(f"{summary.samples} clips in {summary.shards} shards")
    for failure in summary.failures.values():
        print(failure)

    for shard in sorted(options.out.glob("*.tar")):
        for sample in read_shard(shard):
            print(f"{shard.name} {sample.key} {list(sample.latent.shape)} of {sample.record.source}")


if __name__ == "__main__":
    main()
