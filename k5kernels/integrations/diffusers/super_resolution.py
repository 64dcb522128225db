"""Kandinsky 6's super-resolution at any size: diffusers' own pass takes token grids of multiples of 8 only."""

from typing import Any

import torch
from torch import Tensor

from k5kernels.integrations.diffusers.overlays import Overlay
from k5kernels.token_layout import TokenLayout


class AnySize(Overlay):
    """The pass of the model with the tokens in fractal order, whose blocks at the edges may be smaller."""

    def instead(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        """As the model's forward; hidden_states: [B, T, H, W, C] with sides of any number of patches."""
        model = self.owner
        T, H, W = (side // patch for side, patch in zip(hidden_states.shape[1:4], model.config.patch_size, strict=True))
        layout = TokenLayout((T, H, W))
        if layout.full_blocks or (torch.is_grad_enabled() and model.gradient_checkpointing):
            return self.former(hidden_states, timestep, return_dict)
        device = hidden_states.device
        order = layout.permutation(device)
        temb = model.time_embeddings(timestep) + model.pooled_bias
        positions = tuple(torch.arange(side, device=device) for side in (T, H, W))
        rotations = model.visual_rope_embeddings(positions, model.config.scale_factor).flatten(0, 2)[order]
        x = model.visual_embeddings(hidden_states).flatten(1, 3)[:, order]
        for block in model.visual_transformer_blocks:
            x = block(x, temb, rotations, None)  # the mask is our processors' business
        x = x[:, layout.inverse_permutation(device)].unflatten(1, (T, H, W))
        output = model.out_layer(x, temb)
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)
