"""The processor that takes the place of diffusers' own in the visual self-attention of Kandinsky 5."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from k5kernels.attention import AttentionConfig, attention, record_block_masks
from k5kernels.integrations.diffusers.report import DENSE_STEPS, Report
from k5kernels.ops.qk_norm_rope import EPS, qk_norm_rope
from k5kernels.token_layout import TokenLayout


class Processor(Protocol):
    """As diffusers calls it, with the two settings that it puts on the processors of a model."""

    _attention_backend: Any
    _parallel_config: Any

    def __call__(self, attn: Any, hidden_states: Tensor, **rest: Any) -> Tensor: ...


@dataclass
class Pass:
    """What the processors of a model share. layout, step: of the pass that runs; None before the first.

    config: how attention runs. dense_steps: steps at the start of a run that run as before. densities: whether the
    report collects them.
    """

    config: AttentionConfig
    dense_steps: int
    densities: bool
    report: Report = field(default_factory=Report)
    layout: TokenLayout | None = None
    step: int = -1
    active: bool = True


class VisualSelfAttention:
    """Projections by the model's own layers (with their adapters and quantization), norm, rotation and attention by us.

    original: the processor whose place it has. It runs where we are told to leave a call as it was, and always once the
    acceleration has ended, should somebody still hold this object.
    """

    def __init__(self, original: Processor, layer: int, shared: Pass) -> None:
        self.original, self.layer, self.shared = original, layer, shared

    # diffusers sets these two on the processors of a model, and reads them.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: Any = None,
    ) -> Tensor:
        """attn: a Kandinsky5Attention. hidden_states: [B, S, d], tokens frame by frame, row by row. rotary_emb:
        rotations [B, S, 1, D/2, 2, 2], the same for all samples. Returns [B, S, d].
        """
        if (reason := self._why_not(hidden_states, encoder_hidden_states, rotary_emb)) is not None:
            if self.shared.active:
                self.shared.report.unchanged[reason] += 1
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                rotary_emb=rotary_emb,
                sparse_params=sparse_params,
            )
        assert rotary_emb is not None
        return self._attend(attn, hidden_states, rotary_emb)

    def _why_not(self, hidden_states: Tensor, text: Tensor | None, rotary_emb: Tensor | None) -> str | None:
        shared = self.shared
        if not shared.active:
            return "ended"
        if text is not None or rotary_emb is None:
            return "not self-attention with positions"
        if shared.layout is None or shared.layout.tokens != hidden_states.shape[1]:
            return "called outside a pass of the model, so that the shape of the clip is not known"
        if self._parallel_config is not None:
            return "context parallelism is on"
        if 0 <= shared.step < shared.dense_steps:
            return DENSE_STEPS
        return None

    def _attend(self, attn: Any, x: Tensor, rotations: Tensor) -> Tensor:
        layout, config = self.shared.layout, self.shared.config
        assert layout is not None
        order = layout.permutation(x.device) if config.sparse else None
        cos, sin = (rotations[0, :, 0, :, row, 0] for row in (0, 1))
        if order is not None:
            x, cos, sin = x[:, order], cos[order], sin[order]
        q, k, v = (
            layer(x).unflatten(-1, (attn.num_heads, -1)) for layer in (attn.to_query, attn.to_key, attn.to_value)
        )
        q, k = qk_norm_rope(q, k, *_weights(attn, q), cos, sin, EPS)
        out = self._run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layout, config)
        out = out.to(x.dtype).transpose(1, 2).flatten(2)
        return attn.out_layer(out if order is None else out[:, layout.inverse_permutation(x.device)])

    def _run(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, config: AttentionConfig) -> Tensor:
        shared = self.shared

        def run() -> Tensor:
            return attention(q, k, v, config.engine, layout, config.thr, config.sta)

        if torch.compiler.is_compiling():
            return run()
        shared.report.engines[config.engine] += 1
        if not (shared.densities and config.sparse):
            return run()
        found = shared.report.densities[self.layer][shared.step]
        with record_block_masks(lambda mask: found.append(mask.density)):
            return run()


def _weights(attn: Any, q: Tensor) -> tuple[Tensor, Tensor]:
    """Of the norms of q and k, on q's device also where offloading keeps them elsewhere."""
    return attn.query_norm.weight.to(q.device), attn.key_norm.weight.to(q.device)
