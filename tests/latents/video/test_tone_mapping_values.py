"""Tone mapping, value by value: white, black, greys and gamut are where the standards have them."""

import pytest
import torch

from k5kernels.latents.video.tone_mapping import PRIMARIES, TO_LIGHT, to_bt709

WHITE = 65535


def pq_signal(luminance: float) -> float:
    """SMPTE ST 2084's signal, 0 to 1, of a luminance [cd/m²]: the inverse of what is tested."""
    y = (luminance / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)


def grey(signal: float, transfer: str, primaries: str = "BT.2020") -> list[int]:
    return to_bt709(torch.tensor([round(signal * WHITE)] * 3), transfer, primaries).tolist()


@pytest.mark.parametrize("transfer", TO_LIGHT)
@pytest.mark.parametrize("primaries", ["BT.709", "BT.2020", "Display P3"])
def test_black_is_black_and_greys_are_grey_and_rise(transfer: str, primaries: str) -> None:
    shades = [grey(step / 64, transfer, primaries) for step in range(65)]
    assert shades[0] == [0, 0, 0]
    assert max(max(shade) - min(shade) for shade in shades) <= 1
    assert shades == sorted(shades)
    assert shades[-1] == [255, 255, 255]


def test_the_reference_white_of_hdr_becomes_white() -> None:
    assert grey(pq_signal(203), "PQ") == [255] * 3
    assert grey(pq_signal(1000), "PQ") == [255] * 3
    assert grey(0.75, "HLG") == pytest.approx([255] * 3, abs=1)  # ITU-R BT.2408: 75% HLG is 203 cd/m²


def test_half_the_light_of_white_is_half_of_a_displays() -> None:
    assert grey(pq_signal(203 / 2), "PQ") == [round(255 * 0.5 ** (1 / 2.4))] * 3


@pytest.mark.parametrize("transfer", ["sRGB", "BT.709"])
def test_what_is_in_bt709_stays(transfer: str) -> None:
    values = torch.arange(256)[:, None].expand(256, 3) * 257
    assert (to_bt709(values, transfer, "BT.709").int() - torch.arange(256)[:, None]).abs().max() <= 1


@pytest.mark.parametrize("primaries", ["BT.2020", "Display P3"])
def test_the_pure_colours_of_a_wide_gamut_are_cut_off(primaries: str) -> None:
    pure = to_bt709(torch.eye(3, dtype=torch.int64) * WHITE, "sRGB", primaries)
    assert pure.diagonal().tolist() == [255, 255, 255]


def test_bt2020_primaries_of_bt709_red() -> None:
    """ITU-R BT.2087: light of BT.709's red in BT.2020 is (0.6274, 0.0691, 0.0164)."""
    light = torch.tensor([0.6274, 0.0691, 0.0164], dtype=torch.float64)
    values = (light ** (1 / 2.4) * WHITE).round().long()
    assert to_bt709(values, "BT.709", "BT.2020").tolist() == pytest.approx([255, 0, 0], abs=8)


def test_shape_and_dtype() -> None:
    for dtype in (torch.int32, torch.int64):
        out = to_bt709(torch.zeros(2, 5, 3, dtype=dtype), "PQ", "BT.2020")
        assert (out.shape, out.dtype) == ((2, 5, 3), torch.uint8)
    assert set(PRIMARIES) == {"BT.709", "BT.2020", "DCI-P3", "Display P3"}
