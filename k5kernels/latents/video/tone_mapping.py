"""HDR and wide gamuts to BT.709, value by value as zimg does (FFmpeg's zscale, which PyAV's build does not have).

Light is scaled so that the reference white of HDR, 203 cd/m² (ITU-R BT.2408), becomes white; what is brighter or
outside the gamut is cut off. HLG's system gamma of 1.2 is applied to each channel.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

REFERENCE_WHITE = 203.0  # cd/m²
LEVELS = 1 << 16

# Chromaticities x, y of red, green, blue and white.
D65, DCI_WHITE = (0.3127, 0.3290), (0.314, 0.351)
Chromaticities = tuple[tuple[float, float], ...]
PRIMARIES: dict[str, Chromaticities] = {
    "BT.709": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65),
    "BT.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65),
    "DCI-P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), DCI_WHITE),
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
}


def _pq(e: Tensor) -> Tensor:
    """SMPTE ST 2084, in units of REFERENCE_WHITE."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    p = e ** (1 / m2)
    return ((p - c1).clamp(min=0) / (c2 - c3 * p)) ** (1 / m1) * (10_000 / REFERENCE_WHITE)


def _hlg(e: Tensor) -> Tensor:
    """ARIB STD-B67 on a display of 1000 cd/m², in units of REFERENCE_WHITE."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = torch.where(e <= 0.5, e * e / 3, (torch.exp((e - c) / a) + b) / 12)
    return scene**1.2 * (1000 / REFERENCE_WHITE)


def _srgb(e: Tensor) -> Tensor:
    return torch.where(e <= 0.04045, e / 12.92, ((e + 0.055) / 1.055) ** 2.4)


def _srgb_inverse(light: Tensor) -> Tensor:
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


TO_LIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "PQ": _pq,
    "HLG": _hlg,
    "sRGB": _srgb,
    "BT.709": lambda e: e**2.4,  # of a display: BT.1886
}


def to_bt709(rgb: Tensor, transfer: str, primaries: str) -> Tensor:
    """uint8 [..., 3] of values [..., 3] from 0 to 65535 (any integer dtype).

    transfer: a key of TO_LIGHT; PQ and HLG come out in BT.709, the others keep theirs. primaries: a key of PRIMARIES.
    """
    light = _light_table(transfer)[rgb.long()] @ _to_bt709_primaries(primaries).T
    light = light.clamp(0, 1)
    values = _srgb_inverse(light) if transfer == "sRGB" else light ** (1 / 2.4)
    return (values * 255).round().to(torch.uint8)


@cache
def _light_table(transfer: str) -> Tensor:
    values = torch.arange(LEVELS, dtype=torch.float64) / (LEVELS - 1)
    return TO_LIGHT[transfer](values).float()


@cache
def _to_bt709_primaries(primaries: str) -> Tensor:
    """float32 [3, 3]: light in these primaries to light in BT.709's."""
    return (torch.linalg.inv(_to_xyz(PRIMARIES["BT.709"])) @ _to_xyz(PRIMARIES[primaries])).float()


def _xyz(xy: tuple[float, float]) -> Tensor:
    x, y = xy
    return torch.tensor([x / y, 1.0, (1 - x - y) / y], dtype=torch.float64)


def _to_xyz(primaries: Chromaticities) -> Tensor:
    """float64 [3, 3]: light in these primaries to CIE XYZ, white at Y = 1."""
    columns = torch.stack([_xyz(xy) for xy in primaries[:3]], dim=1)
    return columns * torch.linalg.solve(columns, _xyz(primaries[3]))
