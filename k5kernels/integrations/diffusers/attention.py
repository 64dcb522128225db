"""The processor that takes the place of diffusers' own in the self-attention over visual tokens."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from k5kernels.attention import AttentionConfig, attention, break_even, record_block_masks
from k5kernels.block_mask import BlockMask
from k5kernels.integrations.diffusers.models import Family
from k5kernels.integrations.diffusers.report import DENSE, DENSE_MASK, DENSE_STEPS, Report
from k5kernels.token_layout import TokenLayout


class Processor(Protocol):
    """As diffusers calls it, with the two settings that it puts on the processors of a model."""

    _attention_backend: Any
    _parallel_config: Any

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...


@dataclass
class Pass:
    """What the processors of a model share. layout, step, text_lengths: of the pass that runs;
    None before the first. text_lengths: of joint attention, the words of each sample.

    configs: how attention runs, layer by layer. dense_steps: steps at the start of a run that run as before.
    densities: whether the report collects them. auto: the configs of layers whose engine is chosen for each clip; such
    a layer turns to dense attention where its mask is too dense to gain by it; dense_layers: those that have.
    """

    family: Family
    configs: list[AttentionConfig]
    dense_steps: int
    densities: bool
    report: Report
    auto: list[AttentionConfig] | None = None
    dense_layers: set[int] = field(default_factory=set)
    layout: TokenLayout | None = None
    text_lengths: list[int] | None = None
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

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """attn: the module of diffusers. hidden_states: [B, S, d], tokens frame by frame, row by row, or in fractal
        order where the model has put them so. The rest is as the model gives it. Returns [B, S, d].
        """
        shared = self.shared
        if not shared.active:
            return self.original(attn, hidden_states, *args, **kwargs)
        family, config = shared.family, shared.configs[self.layer]
        given = dict(zip(family.arguments, args, strict=False)) | kwargs
        ordered = family.sparse_itself or (family.orders_tokens and given.get("sparse_params") is not None)
        reason = self._why_not(hidden_states, given)
        if reason is not None and not torch.compiler.is_compiling():
            shared.report.unchanged[reason] += 1
        if reason in DENSE and family.sparse_itself:  # as before would not be dense
            reason, config = None, replace(config, engine="auto")
        if reason is None:
            return self._attend(attn, hidden_states, given[family.rotations], config, ordered)
        if family.orders_tokens and not isinstance(self.original, VisualSelfAttention):
            # Ours, which says nothing but the order. Without it attention is dense, the same in any order.
            return self.original(attn, hidden_states, **given | {"sparse_params": None})
        return self.original(attn, hidden_states, *args, **kwargs)

    def _why_not(self, hidden_states: Tensor, given: dict[str, Any]) -> str | None:
        shared = self.shared
        if (reason := shared.family.why_not(given)) is not None:
            return reason
        if shared.layout is None or shared.layout.tokens != hidden_states.shape[1]:
            return "called outside a pass of the model, so that the shape of the clip is not known"
        if self._parallel_config is not None:
            return "context parallelism is on"
        if 0 <= shared.step < shared.dense_steps:
            return DENSE_STEPS
        return DENSE_MASK if self.layer in shared.dense_layers else None

    def _attend(self, attn: Any, x: Tensor, rotations: Any, config: AttentionConfig, ordered: bool) -> Tensor:
        """ordered: whether the tokens are in fractal order."""
        family, layout = self.shared.family, self.shared.layout
        assert layout is not None
        order = layout.permutation(x.device) if config.sparse and not ordered else None
        cos, sin = family.rope(rotations)
        if order is not None:
            x, cos, sin = x[:, order], cos[order], sin[order]
        q, k, v = (part.transpose(1, 2) for part in family.heads(attn, x, cos, sin))
        out = self._run(q, k, v, layout, config)
        out = out.to(x.dtype).transpose(1, 2).flatten(2)
        return family.project(attn, out if order is None else out[:, layout.inverse_permutation(x.device)])

    def _run(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, config: AttentionConfig) -> Tensor:
        shared = self.shared

        def run() -> Tensor:
            return attention(q, k, v, config.engine, layout, config.thr, config.sta)

        if torch.compiler.is_compiling():
            return run()
        shared.report.engines["dense" if config.engine == "auto" else config.engine] += 1
        if not config.sparse or not (shared.densities or shared.auto is not None):
            return run()
        with record_block_masks(lambda mask: self._note(mask, q.device)):
            return run()

    def _note(self, mask: BlockMask, device: torch.device) -> None:
        shared = self.shared
        if shared.densities:
            shared.report.add(self.layer, shared.step, mask)
        if shared.auto is not None and mask.density > break_even(device):
            shared.dense_layers.add(self.layer)
