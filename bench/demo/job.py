"""The demo's steps; each stores on the Job what later steps and the page need."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

import torch
from matplotlib.image import imsave

from bench.demo.memory import measure
from k5kernels.atomic import replacing
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.cache import MagCache
from k5kernels.latents.job import Step, encode_videos
from k5kernels.latents.shards import Sample
from k5kernels.latents.video import (
    MIN_FRAMES,
    VideoError,
    decode,
    nearest_bucket,
    probe,
    read_video,
    to_frames,
    write_video,
)
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.vae.weights import load_decoder, load_encoder
from model.nano import CLIP_FRAMES, CROSSDIT_WEIGHTS, RESOLUTION, VAE_WEIGHTS, load_settings
from model.weights import load_crossdit
from train.clips import reading_of
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.evaluation import Generation, Scene, generate, probe_loss, psnr
from train.latents import LatentSet, channels_last, read_shards
from train.loop import Loop
from train.schedule import Schedule

TRAIN_STEPS = 60
SAMPLE_STEPS = 50
MAX_CLIPS = 8  # of a long video; 60 training steps draw on few more
SEED = 0
STILL_RATE = Fraction(24)  # of a picture shown as a video
PLAIN = "full attention"
LATENTS = "latents"
FILES = ("samples.mp4", "samples.png", "loss.png", "block_masks.png", "magcache.png", "results.json", "report.html")

Progress = Callable[[int, int], None]


def check_video(path: Path) -> None:
    """Raises VideoError where the file is no video, or its first frames cannot be used."""
    reading = reading_of(path)
    info = probe(path, reading)
    height, width = nearest_bucket(info.height, info.width, RESOLUTION)
    read_video(path, height, width, max_frames=MIN_FRAMES, min_frames=MIN_FRAMES, reading=reading)


def clear(out: Path) -> None:
    """Make the folder and delete a former run's results, so that those of two runs never mix. Other files stay."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / LATENTS, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Training:
    """losses: of every step. before, after: loss over one fixed set of noises and times."""

    losses: list[float]
    before: float
    after: float
    seconds: float


@dataclass
class Job:
    """video: the file. out: the folder. caption: what the video shows. device: where the models are and compute."""

    video: Path
    out: Path
    caption: str
    device: torch.device
    encode_seconds: float = 0.0
    reconstruction_db: float = 0.0
    samples: dict[str, Generation] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.training: Training
        self.nano = load_settings()
        self.text = MiniLMTextEncoder(self.device)
        self.model = load_crossdit(CROSSDIT_WEIGHTS).to(self.device)
        self.decoder = load_decoder(VAE_WEIGHTS).to(self.device)
        nabla = AttentionConfig("nabla", self.nano.thr, self.nano.sta)
        self.magcache = MagCache(self.nano.mag_ratios)
        self.paths: dict[str, tuple[AttentionConfig, MagCache | None]] = {
            PLAIN: (DENSE, None),
            "NABLA": (nabla, None),
            "NABLA + MagCache": (nabla, self.magcache),
        }

    def encode(self, progress: Progress) -> None:
        """Encode the video's first clips. The last of the longest is the scene to sample; the others are trained on."""

        def show(step: Step) -> None:
            if step.announced:
                progress(step.frames, min(step.announced, MAX_CLIPS * CLIP_FRAMES))

        began = time.perf_counter()
        summary = encode_videos(
            [self.video],
            load_encoder(VAE_WEIGHTS).to(self.device),
            self.out / LATENTS,
            resolution=RESOLUTION,
            clip_frames=CLIP_FRAMES,
            max_clips=MAX_CLIPS,
            reading=reading_of(self.video),
            progress=show,
        )
        self.encode_seconds = time.perf_counter() - began
        if summary.failures:
            raise VideoError(next(iter(summary.failures.values())))
        progress(1, 1)  # the last frames of a video may be too few for a clip
        samples = list(read_shards(self.out / LATENTS))
        chosen = max(range(len(samples)), key=lambda i: (samples[i].record.frames, i))
        self.sample_record = samples[chosen].record
        self.scene = self._scene(samples[chosen])
        # Where the video has one clip only, the scene is trained on as well.
        others = samples[:chosen] + samples[chosen + 1 :] or samples
        self.data = LatentSet(others, {self.video.stem: self.caption})

    def train(self, progress: Progress) -> None:
        """Fine-tune the shipped weights on the clip: NABLA attention, checkpointing, text- and image-to-video."""
        attention = self.paths["NABLA"][0]
        config = FlowMatching(learning_rate=2e-4, scheduler_scale=self.nano.scheduler_scale, attention=attention)
        schedule = Schedule(TRAIN_STEPS, warmup_steps=4, decay_steps=TRAIN_STEPS // 2, seed=SEED)
        self.model.gradient_checkpointing = True
        loop = Loop(CrossDiTStage(self.model, self.data, self.text.encode, config), schedule)
        before = probe_loss(self.model, self.data, self.text.encode, attention)
        losses = []
        began = time.perf_counter()
        for step in range(TRAIN_STEPS):
            losses.append(loop.step())
            progress(step + 1, TRAIN_STEPS)
        seconds = time.perf_counter() - began
        after = probe_loss(self.model, self.data, self.text.encode, attention)
        self.training = Training(losses, before, after, seconds)

    def sample(self, name: str, progress: Progress) -> None:
        """Sample the scene by one of the paths, from the same seed as the others."""
        attention, cache = self.paths[name]
        self.samples[name] = generate(
            self.model,
            self.decoder,
            self.scene,
            self.nano,
            attention,
            cache,
            steps=SAMPLE_STEPS,
            seed=SEED,
            progress=progress,
        )

    def write_video(self) -> None:
        """Source, reconstruction and the samples side by side, as MP4 and one frame as PNG."""
        record = self.sample_record
        frames = decode(self.video, record.height, record.width, reading=reading_of(self.video))
        self.source = torch.stack(list(islice(frames, record.first_frame, record.first_frame + record.frames)))
        with torch.inference_mode():
            self.reconstruction = to_frames(self.decoder(self.scene.latent.permute(0, 4, 1, 2, 3))).cpu()
        self.reconstruction_db = psnr(self.reconstruction, self.source)
        videos = [self.source, self.reconstruction, *(sample.frames for sample in self.samples.values())]
        row = torch.cat(videos, dim=2)
        write_video(self.out / "samples.mp4", row, record.rate or STILL_RATE)
        with replacing(self.out / "samples.png") as partial:
            imsave(partial, row[len(row) // 2].numpy(), format="png")

    def measure_memory(self, progress: Progress) -> None:
        """Peak memory of a training step on the scene's grid, plain and with activation checkpointing."""
        _, T, H, W, _ = self.scene.latent.shape
        for done, (name, flags) in enumerate((("all activations kept", ()), ("checkpointing", ("--checkpointing",)))):
            self.memory[name] = measure((T, H, W), self.device, *flags)
            progress(done + 1, 2)

    def _scene(self, sample: Sample) -> Scene:
        return Scene(
            channels_last(sample)[None].to(self.device), self.text.encode([self.caption]), self.text.encode([""])
        )
