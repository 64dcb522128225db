"""Images, then short clips, then longer ones: each stage of nano starts from what the one before it has left."""

from types import SimpleNamespace

import pytest
import torch
import typer
from latent_samples import sample
from typer.testing import CliRunner

from k5kernels.latents.shards import ShardWriter
from k5kernels.text_condition import TextCondition
from model.weights import load_crossdit
from train import crossdit_stage, run
from train.checkpoint import Checkpoints
from train.latents import LatentSet

app = typer.Typer()
app.command()(run.main)
TEXT_WIDTH = 384
STEPS = 40


def encode_text(captions):
    tokens = torch.zeros(len(captions), 3, TEXT_WIDTH)
    return TextCondition(tokens, None, tokens.mean(1))


@pytest.fixture
def latents(tmp_path, monkeypatch):
    """Clips of 25 frames and an image, and a text encoder that takes no time."""
    monkeypatch.setattr(run, "MiniLMTextEncoder", lambda device: SimpleNamespace(encode=encode_text))
    folder = tmp_path / "latents"
    folder.mkdir()
    with ShardWriter(folder / "00000.tar") as shard:
        shard.write(sample("clip.mp4", (7, 4, 4), 1))
        shard.write(sample("image.png", (1, 4, 4), 2))
    return folder


def train(latents, out, *options: object) -> None:
    command = ["--latents", latents, "--out", out, "--no-captions", "--steps", STEPS, "--every", STEPS, "--no-bf16"]
    result = CliRunner().invoke(app, [str(word) for word in (*command, *options)])
    assert result.exit_code == 0, result.output


def test_stages_start_from_each_other_and_train_on_their_own_mix(latents, tmp_path, monkeypatch):
    started, frames, given = [], [], []
    build, draw, loss = run.build_model, LatentSet.draw, crossdit_stage.flow_matching_loss

    def building(*arguments):
        started.append({name: weight.clone() for name, weight in build(*arguments).state_dict().items()})
        return build(*arguments)

    def drawing(data, generator, size, *arguments, **options):
        batch = draw(data, generator, size, *arguments, **options)
        frames[-1].append((batch.latents.shape[1], size))
        return batch

    def losing(*arguments, first_frame, **options):
        given[-1].append((len(first_frame), int(first_frame.sum())))
        return loss(*arguments, first_frame=first_frame, **options)

    monkeypatch.setattr(run, "build_model", building)
    monkeypatch.setattr(LatentSet, "draw", drawing)
    monkeypatch.setattr(crossdit_stage, "flow_matching_loss", losing)
    stages = ("nano_t2i", "nano_t2v", "nano_t2v_long")
    before = None
    for name in stages:
        frames.append([])
        given.append([])
        options = ("--model-dim", 64, "--blocks", 1) if before is None else ("--init", before)
        train(latents, tmp_path / name, "--stage", name, *options, "--image-batch", 3)
        if before is not None:
            left = load_crossdit(before / "crossdit.safetensors").state_dict()
            assert all(torch.equal(started[-1][weight], left[weight]) for weight in left)
            saved, _ = Checkpoints(tmp_path / name / "checkpoints").newest()
            assert saved.settings["init"].startswith("sha256 ")
        before = tmp_path / name
    images, short, long = (drawn[:STEPS] for drawn in frames)
    assert set(images) == {(1, 3)}
    # A tenth of the steps are on images alone, and half of the samples of the others have their first frame.
    assert set(short) == {(1, 3), (3, 2)}
    assert set(long) == {(1, 3), (7, 1)}
    assert sum(count for _, count in given[0]) == 0
    for drawn, firsts in zip((short, long), given[1:], strict=True):
        of_clips = [count for (length, _), (_, count) in zip(drawn, firsts, strict=False) if length > 1]
        of_images = [count for (length, _), (_, count) in zip(drawn, firsts, strict=False) if length == 1]
        assert 0 < sum(of_clips) < sum(size for length, size in drawn if length > 1)
        assert sum(of_images) == 0
