"""The convolution inside the VAE's causal ones: on a CPU Winograd's, where that is faster (§7.1)."""

from typing import Any

import torch
from torch import Tensor, nn

from k5kernels.ops.library import OPERATORS
from k5kernels.ops.winograd_conv3d import CHANNELS_IN, CHANNELS_OUT, TAPS, winograd_conv3d, winograd_filters

# Winograd's tiles are squares. A frame that fills less than this share of them is small: little time is to be gained,
# and Winograd's rounding would take `exact` of a deep model beyond its 1e-5.
TILE, LEAST_FILLED = 4, 0.4


class UnpaddedConv3d(nn.Conv3d):
    """`nn.Conv3d` without padding; its filters, transformed, are kept from one call to the next.

    Winograd's convolution takes over in float32 on a CPU, where no gradient is asked for, with unit strides and a
    kernel of 3 x 3 x 3. Shapes alone decide, never threads or load, so that a clip's latents stay the same; those of an
    installation without the C++ kernels differ by rounding. The kept filters are made again when the weight was
    changed, moved or loaded; a change through `weight.data` is not seen. They are four times as large as the weight.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: tuple[int, int, int]) -> None:
        super().__init__(channels_in, channels_out, kernel, stride)
        self._filters: Tensor | None = None
        self._made_of: tuple[Tensor, int, int] | None = None
        fits = channels_in % CHANNELS_IN == 0 and channels_out % CHANNELS_OUT == 0
        self._winograd = fits and kernel == TAPS and stride == (1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self._takes(x):
            return super().forward(x)
        assert self.bias is not None  # every convolution of the VAE has one
        return winograd_conv3d(x, self._filters_now(), self.bias)

    def _takes(self, x: Tensor) -> bool:
        if not self._winograd or torch.compiler.is_compiling() or "cpu" not in OPERATORS["winograd_conv3d"].kernels:
            return False
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or x.device.type != "cpu":
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return False
        height, width = (side - TAPS + 1 for side in x.shape[3:])
        return height * width >= LEAST_FILLED * (-(-height // TILE) * -(-width // TILE) * TILE * TILE)

    def _filters_now(self) -> Tensor:
        weight = self.weight
        # Tensors of inference mode count no changes.
        now = weight, weight.data_ptr(), 0 if weight.is_inference() else weight._version
        made_of = self._made_of
        if self._filters is None or made_of is None or made_of[0] is not weight or made_of[1:] != now[1:]:
            with torch.no_grad():
                self._filters, self._made_of = winograd_filters(weight), now
        return self._filters

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._filters = self._made_of = None
        super()._load_from_state_dict(*arguments)

    def _apply(self, *arguments: Any, **settings: Any) -> Any:  # of `to`, `float` and the like
        self._filters = self._made_of = None
        return super()._apply(*arguments, **settings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filters": None, "_made_of": None}
