"""Batches are of one grid, carry their captions, and follow the generator."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from latent_samples import sample

from k5kernels.latents.shards import ShardWriter
from train.latents import LatentSet, read_shards


def test_a_batch_holds_one_grid_channels_last_with_captions():
    data = LatentSet([sample("cat.mp4", (2, 4, 6)), sample("dog.mp4", (1, 4, 4))], {"cat": "a cat"})
    for seed in range(8):
        batch = data.draw(torch.Generator().manual_seed(seed), 3)
        assert batch.latents.shape in [(3, 2, 4, 6, 16), (3, 1, 4, 4, 16)]
        assert batch.captions == (["a cat"] * 3 if batch.latents.shape[1] == 2 else [""] * 3)


def test_a_caption_travels_in_the_shard_and_one_that_is_given_goes_before_it():
    stored = sample("one/clip.mp4", (1, 2, 2))
    stored = replace(stored, record=replace(stored.record, caption="stored"))
    samples = [stored, sample("two/clip.mp4", (1, 2, 2), 1)]

    def captions(given):
        data = LatentSet(samples, given)
        drawn = data.draw(torch.Generator().manual_seed(0), 20)
        return data.captioned, set(drawn.captions)

    assert captions({}) == (1, {"stored", ""})
    assert captions({"two/clip": "given"}) == (2, {"stored", "given"})
    assert captions({"one/clip.mp4": "given"}) == (1, {"given", ""})
    assert captions(None) == (0, {""})
    with pytest.raises(ValueError, match=r"`one/clip\.mp4` and `two/clip\.mp4`"):
        captions({"clip": "whose?"})


def test_grids_are_drawn_as_often_as_they_have_samples():
    data = LatentSet([*(sample("a.mp4", (1, 2, 2), i) for i in range(9)), sample("b.mp4", (2, 2, 2))], {})
    draws = [data.draw(torch.Generator().manual_seed(seed), 1).latents.shape[1] for seed in range(200)]
    assert 160 < draws.count(1) < 198


def test_the_first_latent_frames_can_be_kept_alone():
    data = LatentSet([sample("a.mp4", (3, 2, 2))], {})
    assert data.draw(torch.Generator().manual_seed(0), 1, frames=1).latents.shape == (1, 1, 2, 2, 16)


def test_the_same_generator_gives_the_same_batch():
    data = LatentSet([sample("a.mp4", (1, 2, 2), i) for i in range(20)], {})
    batches = [data.draw(torch.Generator().manual_seed(3), 4).latents for _ in range(2)]
    assert torch.equal(*batches)


def test_shards_are_read_in_order(tmp_path):
    for shard in range(2):
        with ShardWriter(tmp_path / f"{shard:05d}.tar") as writer:
            for i in range(2):
                writer.write(sample("a.mp4", (1, 2, 2), 2 * shard + i))
    first_frames = [read.record.first_frame for read in read_shards(tmp_path)]
    assert all(a < b for a, b in pairwise(first_frames))
    assert len(first_frames) == 4


def test_a_folder_without_shards_says_how_to_make_some(tmp_path):
    with pytest.raises(ValueError, match="k5 encode"):
        list(read_shards(tmp_path))


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="at least one latent"):
        LatentSet([], {})
