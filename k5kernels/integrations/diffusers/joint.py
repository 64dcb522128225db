"""The processor for attention over visual and text tokens together, as HunyuanVideo has it.

Visual queries read the visual blocks that NABLA keeps and all of the text; text queries read everything. The two parts
of a visual query's softmax are computed apart and weighed by their sums. Text behind the end of a prompt is read by
nobody, and what it would read itself is left at zero.
"""

from typing import Any

import torch
from torch import Tensor

from k5kernels.attention import AttentionConfig, attention
from k5kernels.integrations.diffusers.attention import VisualSelfAttention
from k5kernels.integrations.diffusers.models import Heads
from k5kernels.ops.block_sparse_attention import block_sparse_attention_lse
from k5kernels.ops.nabla_mask import nabla_mask
from k5kernels.token_layout import TokenLayout


class JointAttention(VisualSelfAttention):
    """As `VisualSelfAttention`; it takes and gives the text too."""

    # diffusers asks for these names, and leaves out what has another.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """hidden_states: [B, S, d], encoder_hidden_states: [B, N, d]. Returns the two."""
        given = {"encoder_hidden_states": encoder_hidden_states, "image_rotary_emb": image_rotary_emb}
        reason = self._why_not(hidden_states, given) if self.shared.active else "ended"
        if reason is None and encoder_hidden_states is not None:
            return self._attend_jointly(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        if self.shared.active and not torch.compiler.is_compiling():
            self.shared.report.unchanged[str(reason)] += 1
        return self.original(attn, hidden_states, attention_mask=attention_mask, **given)

    def _attend_jointly(self, attn: Any, x: Tensor, text: Tensor, rotations: Any) -> tuple[Tensor, Tensor]:
        shared, config = self.shared, self.shared.configs[self.layer]
        layout, lengths = shared.layout, shared.text_lengths
        assert layout is not None
        assert lengths is not None
        order = layout.permutation(x.device) if config.sparse else None
        cos, sin = shared.family.rope(rotations)
        if order is not None:
            x, cos, sin = x[:, order], cos[order], sin[order]
        visual = _by_head(shared.family.heads(attn, x, cos, sin))
        words = _by_head(_text_heads(attn, text))
        if not torch.compiler.is_compiling():
            shared.report.engines["dense" if config.engine == "auto" else config.engine] += 1
        parts = []
        together = len(set(lengths)) == 1
        for sample, length in [(slice(None), lengths[0])] if together else enumerate(lengths):
            rows = sample if isinstance(sample, slice) else slice(sample, sample + 1)
            parts.append(
                self._attend_sample([part[rows] for part in visual], [part[rows, :, :length] for part in words], config)
            )
        out = torch.cat([part for part, _ in parts]).to(x.dtype).transpose(1, 2).flatten(2)
        spoken = torch.zeros_like(words[0])
        for sample, (_, part) in enumerate(parts):
            spoken[slice(None) if together else slice(sample, sample + 1), :, : part.shape[2]] = part
        if order is not None:
            out = out[:, layout.inverse_permutation(x.device)]
        spoken = spoken.to(x.dtype).transpose(1, 2).flatten(2)
        add_out = getattr(attn, "to_add_out", None)
        return shared.family.project(attn, out), spoken if add_out is None else add_out(spoken)

    def _attend_sample(
        self, visual: list[Tensor], words: list[Tensor], config: AttentionConfig
    ) -> tuple[Tensor, Tensor]:
        """Of q, k and v [B, h, S, D] and [B, h, N, D] of prompts of one length: visual and text outputs."""
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(visual, words, strict=True))
        S = visual[0].shape[2]
        if not config.sparse:
            # Dense attention asks of a layout which tokens are a clip; here all are.
            out = attention(q, k, v, config.engine, TokenLayout(((1, 1, q.shape[2]),)))
            return out[:, :, :S], out[:, :, S:]
        layout = self.shared.layout
        assert layout is not None
        mask = nabla_mask(visual[0], visual[1], layout, config.thr, config.sta)
        if not torch.compiler.is_compiling():
            self._note(mask, q.device)
        seen, seen_lse = block_sparse_attention_lse(visual[0], visual[1], visual[2], mask)
        read, read_lse = _attend_few(visual[0], words[1], words[2])
        share = torch.sigmoid(seen_lse - read_lse)[..., None]
        out = share * seen + (1 - share) * read
        return out.to(seen.dtype), attention(words[0], k, v)


def _by_head(heads: Heads) -> list[Tensor]:
    return [part.transpose(1, 2) for part in heads]


def _attend_few(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of many queries [B, h, S, D] to few keys, and its log-sum-exp, float32 [B, h, S]. Head by head, for the
    scores are S times as many as the keys."""
    outs, sums = [], []
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[:, head].transpose(1, 2)).float() * q.shape[-1] ** -0.5
        sums.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1).to(v.dtype) @ v[:, head])
    return torch.stack(outs, dim=1), torch.stack(sums, dim=1)


def _text_heads(attn: Any, text: Tensor) -> Heads:
    """q, k and v of the text: by layers of its own, or by those of the visual tokens, without positions."""
    apart = attn.add_q_proj is not None
    layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if apart else (attn.to_q, attn.to_k, attn.to_v)
    q, k, v = (layer(text).unflatten(-1, (attn.heads, -1)) for layer in layers)
    norms = (attn.norm_added_q, attn.norm_added_k) if apart else (attn.norm_q, attn.norm_k)
    q, k = (part if norm is None else norm(part) for part, norm in zip((q, k), norms, strict=True))
    return q, k, v
