"""Captions stored beside latents: as the text encoder gives them, without padding, and read back as a batch."""

from pathlib import Path

import pytest
import torch
from encoding_jobs import Encode, shards
from latent_samples import sample

from k5kernels.latents.shards import ShardError
from k5kernels.latents.text import CaptionEncoder, text_condition
from k5kernels.text_condition import TextCondition
from k5kernels.text_encoders import Kind

WIDTH = 6


class WordEncoder:
    """A random vector a word, and one for the end; a prompt is padded to eight of them. Counts its calls."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(100, WIDTH).to(dtype)
        self.calls: list[tuple[str, Kind]] = []

    def modules(self) -> list[torch.nn.Module]:
        return [self.table]

    @torch.no_grad()
    def encode(self, prompts: list[str], kind: Kind = "video") -> TextCondition:
        (prompt,) = prompts
        self.calls.append((prompt, kind))
        numbers = [sum(word.encode()) % 99 for word in prompt.split()] + [99]
        mask = torch.arange(8)[None] < len(numbers)
        tokens = self.table(torch.tensor([numbers + [0] * (8 - len(numbers))]))
        return TextCondition(tokens, mask, tokens[:, 0])


@pytest.fixture
def text_encoder() -> WordEncoder:
    return WordEncoder()


def test_each_clip_has_its_caption_as_the_encoder_gives_it(
    encode: Encode, tmp_path: Path, text_encoder: WordEncoder
) -> None:
    encode(captions={"a": "A red cat", "b": "Noise"}, text_encoder=text_encoder)
    for one in (one for shard in shards(tmp_path / "out") for one in shard):
        caption = one.record.caption or ""
        expected = WordEncoder().encode([caption])
        assert expected.mask is not None
        assert torch.equal(one.tensors["text_tokens"], expected.tokens[0, : int(expected.mask.sum())])
        assert torch.equal(one.tensors["text_pooled"], expected.pooled[0])
        assert one.tensors["text_tokens"].shape == (len(caption.split()) + 1, WIDTH)
    # The clips of a video share one call; those of b and c have others.
    assert text_encoder.calls == [("A red cat", "video"), ("Noise", "video"), ("", "video")]


def test_pictures_have_the_template_of_pictures(encode: Encode, text_encoder: WordEncoder) -> None:
    encode(clip_frames=1, max_clips=1, text_encoder=text_encoder)
    assert text_encoder.calls == [("", "image")]


@pytest.mark.parametrize("other", [None, WordEncoder(seed=1), WordEncoder(dtype=torch.float32)])
def test_another_text_encoder_is_another_job(
    encode: Encode, text_encoder: WordEncoder, other: WordEncoder | None
) -> None:
    encode(text_encoder=text_encoder)
    assert encode(text_encoder=WordEncoder()).shards_kept == 3
    with pytest.raises(ValueError, match="captions encoded by another text encoder, or by none"):
        encode(text_encoder=other)


def test_a_caption_that_is_not_finite_is_the_sources_failure(
    encode: Encode, folder: Path, text_encoder: WordEncoder
) -> None:
    with torch.no_grad():
        text_encoder.table.weight[sum(b"Noise") % 99] = float("nan")
    summary = encode(captions={"b": "Noise"}, text_encoder=text_encoder)
    assert list(summary.failures) == [str(folder / "b.mp4")]
    assert "expected a caption that is encoded to finite values" in summary.failures[str(folder / "b.mp4")]
    assert summary.samples == 5


def test_stored_captions_are_read_as_a_batch() -> None:
    texts = [CaptionEncoder(WordEncoder()).tensors(caption, "video") for caption in ("a b c", "")]
    samples = [sample("a.mp4", (2, 2, 4), tensors=text) for text in texts]
    condition = text_condition(samples)
    assert condition.mask is not None
    assert condition.mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert torch.equal(condition.tokens[0], texts[0]["text_tokens"])
    assert torch.equal(condition.tokens[1, 0], texts[1]["text_tokens"][0])
    assert not condition.tokens[1, 1:].any()
    assert torch.equal(condition.pooled[1], texts[1]["text_pooled"])


def test_samples_without_stored_captions_or_of_several_encoders_are_refused() -> None:
    stored = sample("a.mp4", (2, 2, 4), tensors=CaptionEncoder(WordEncoder()).tensors("a", "video"))
    with pytest.raises(ShardError, match="expected text_tokens and text_pooled; encode with --text-embeddings"):
        text_condition([stored, sample("b.mp4", (2, 2, 4))])
    other = CaptionEncoder(WordEncoder(dtype=torch.float32)).tensors("a", "video")
    with pytest.raises(ShardError, match="expected those of one text encoder"):
        text_condition([stored, sample("b.mp4", (2, 2, 4), tensors=other)])
