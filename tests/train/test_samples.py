"""Pictures of samples at milestones: what is drawn and when, and that training goes on as without them."""

from pathlib import Path

import pytest
import torch
from matplotlib.pyplot import imread
from tiny_stage import parameters, tiny_loop, tiny_stage

from bench.gloo_processes import on_processes
from bench.train_equality import BATCH, NABLA, encode_text, latents, model
from k5kernels.vae.weights import load_decoder
from model.nano import VAE_WEIGHTS
from train import samples as module
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.log import Log
from train.loop import Loop
from train.parallel import processes, shard_model
from train.pictures import draw_losses
from train.samples import Samples, strip, strips
from train.schedule import Schedule

CPU = torch.device("cpu")
GRID = (1, 6, 10)


def test_a_strip_is_of_frames_at_even_distances():
    frames = torch.arange(25, dtype=torch.uint8)[:, None, None, None].expand(25, 2, 3, 3)
    assert strip(frames)[0, ::3, 0].tolist() == [0, 5, 10, 14, 19, 24]
    assert strip(frames[:1]).shape == (2, 3, 3)


class Sampled(Samples):
    """Without a picture: which rows were a milestone's."""

    def _sample(self):
        raise InterruptedError


@pytest.mark.parametrize(
    ("every", "milestones", "drawn"), [(1, 4, [3, 5, 8, 10]), (4, 2, [8, 10]), (3, 10, [3, 6, 9, 10]), (2, 0, [])]
)
def test_milestones_are_even_over_the_schedule_and_drawn_with_the_next_row(tmp_path, every, milestones, drawn):
    samples = Sampled(tiny_stage(), None, tmp_path, steps=10, every=every, milestones=milestones)
    found = []
    for row in [*range(every, 10, every), 10]:
        try:
            samples(row)
        except InterruptedError:
            found.append(row)
    assert found == drawn


def test_a_training_that_draws_is_the_training_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    plain, drawing = tiny_loop(steps=4, batch=2), tiny_loop(steps=4, batch=2)
    plain.run(tmp_path / "plain", every=1)
    out = tmp_path / "drawing"
    samples = Samples(drawing.stage, load_decoder(VAE_WEIGHTS), out, steps=4, every=1, milestones=2)
    drawing.run(out, every=1, after_row=samples)
    assert list(strips(out)) == [2, 4]
    assert losses(out) == losses(tmp_path / "plain")
    assert torch.equal(parameters(drawing), parameters(plain))
    first, second = (imread(path) for path in strips(out).values())
    assert first.shape == second.shape == (32, 5 * 32, 4)  # of 2 × 4 × 4 latents
    assert (first != second).any()
    draw_losses(Log(out / "log.jsonl").rows(), out / "loss.png", strips(out))
    alone, below = tmp_path / "alone.png", out / "loss.png"
    draw_losses(Log(out / "log.jsonl").rows(), alone)
    assert imread(below).shape[0] > imread(alone).shape[0] + 2 * 100


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in Log(out / "log.jsonl").rows()]


def sharded_losses(folder: Path) -> list[list[float]]:
    """Of a training on processes that share weights and sequences, without samples and with them."""
    found = []
    module.STEPS = 2
    for name, milestones in (("plain", 0), ("drawing", 2)):
        with processes(CPU, shard=1, sequence=2, where=f"file://{folder}/{name}-store") as parallel:
            config = FlowMatching(batch=BATCH, attention=NABLA)
            stage = CrossDiTStage(shard_model(model(), parallel), latents(GRID), encode_text, config, parallel=parallel)
            decoder = load_decoder(VAE_WEIGHTS) if parallel.first and milestones else None
            out = folder / name
            samples = Samples(stage, decoder, out, steps=2, every=1, milestones=milestones)
            Loop(stage, Schedule(2, warmup_steps=0), parallel).run(out, every=1, after_row=samples)
        found.append(losses(out) if parallel.first else [])
        if parallel.first:
            assert len(strips(out)) == milestones
    return found


@pytest.mark.slow
def test_processes_that_share_a_model_all_take_part_and_the_first_one_draws():
    plain, drawing = on_processes(2, sharded_losses)
    assert len(plain) == 2
    assert drawing == plain
