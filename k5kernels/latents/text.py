"""Captions as a text encoder gives them, stored beside latents when that is asked for.

The report computes them while training (§6.1.1): one is about 50 times as large as the latent of a 256×256 picture.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from k5kernels.latents.shards import Sample, ShardError
from k5kernels.text_condition import TextCondition
from k5kernels.text_encoders import Kind, TextEncoder

TOKENS, POOLED = "text_tokens", "text_pooled"
# Captions whose embeddings are kept: the clips of a video have the same one.
KEPT = 16


@dataclass(frozen=True)
class CaptionEncoder:
    """fingerprint: of the text encoder, which the embeddings depend on."""

    encoder: TextEncoder
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", _fingerprint(self.encoder))
        object.__setattr__(self, "tensors", lru_cache(KEPT)(self.tensors))

    def tensors(self, caption: str, kind: Kind) -> dict[str, Tensor]:
        """text_tokens [L, width], without padding, and text_pooled [width], in the encoder's dtype, on the CPU.

        kind: of the prompt template. The empty caption is encoded too.
        """
        condition = self.encoder.encode([caption], kind)
        tokens = condition.tokens[0] if condition.mask is None else condition.tokens[0, condition.mask[0]]
        return {TOKENS: tokens.to("cpu", copy=True), POOLED: condition.pooled[0].to("cpu", copy=True)}


def text_condition(samples: Sequence[Sample]) -> TextCondition:
    """The stored captions of samples as one batch, the shorter ones padded with zeros.

    Raises ShardError where a sample has none, or they are of several encoders.
    """
    for sample in samples:
        if not {TOKENS, POOLED} <= set(sample.tensors):
            raise ShardError(f"{sample.key}: expected {TOKENS} and {POOLED}; encode with --text-embeddings")
    tokens = [sample.tensors[TOKENS] for sample in samples]
    if len(kinds := {(one.shape[1:], one.dtype) for one in tokens}) != 1:
        raise ShardError(
            f"{TOKENS}: expected those of one text encoder, got widths and dtypes {sorted(map(str, kinds))}"
        )
    lengths = torch.tensor([len(one) for one in tokens])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return TextCondition(
        pad_sequence(tokens, batch_first=True), mask, torch.stack([sample.tensors[POOLED] for sample in samples])
    )


def _fingerprint(encoder: TextEncoder) -> str:
    """Hash of the weights, their names and dtypes."""
    digest = hashlib.sha256(type(encoder).__name__.encode())
    for module in encoder.modules():
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
