"""What the planner knows of a machine: coefficients of the step formula, memory and bandwidths.

`H100` holds the report's figures (§7.3.1, §6.1) and, where the report is silent, the data sheet of the H100 SXM.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from k5kernels.atomic import replacing
from k5kernels.planner.checks import LARGEST, positive_integer

_COEFFICIENTS = ("constant_ms", "tokens_ms", "width_ms")


@dataclass(frozen=True)
class HardwareProfile:
    """Figures of one GPU and of its node.

    constant_ms, tokens_ms, width_ms: the step formula's 9, 14 and 6, in ms a block and clip at d0 and S0.
    memory_bytes: of one GPU. memory_reserve: share of what is used that the allocator and the driver take beside it.
    gpus_per_node: GPUs on one fast link. node_bytes_per_s, network_bytes_per_s, host_bytes_per_s: what one GPU sends
    in one direction to a GPU of its node, to one of another node, and to host memory.
    Raises ValueError that names the field where a figure is not a number above 0 (the coefficients may be 0).
    """

    name: str
    constant_ms: float = 9
    tokens_ms: float = 14
    width_ms: float = 6
    memory_bytes: float = 80 * 2**30
    memory_reserve: float = 0.06
    gpus_per_node: int = 8
    node_bytes_per_s: float = 450e9  # NVLink 4: 900 GB/s both ways
    network_bytes_per_s: float = 50e9  # InfiniBand NDR, one 400 Gbit/s port a GPU
    host_bytes_per_s: float = 64e9  # PCIe 5.0 ×16

    @property
    def speed(self) -> float:
        """How many times as fast as the report's H100 the formula's step is at d0 and S0."""
        return (H100.constant_ms + H100.tokens_ms + H100.width_ms) / (self.constant_ms + self.tokens_ms + self.width_ms)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: expected a text, got {self.name!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "gpus_per_node":
                positive_integer(field.name, value)
            elif field.name != "name":
                _check_number(field.name, value)
        if self.constant_ms + self.tokens_ms + self.width_ms == 0:
            raise ValueError("constant_ms, tokens_ms, width_ms: expected one above 0, got 0 for all")


def _check_number(field: str, value: object) -> None:
    largest = 1 if field == "memory_reserve" else LARGEST
    zero_is_fine = field in _COEFFICIENTS
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (0 < value <= largest or (value == 0 and zero_is_fine))
    ):
        return
    least = "from 0" if zero_is_fine else "above 0"
    raise ValueError(f"{field}: expected a number {least} up to {largest}, got {value!r}")


H100 = HardwareProfile(name="H100")


def save_profile(profile: HardwareProfile, path: str | Path) -> None:
    """Writes the profile as JSON; the file is whole or not there. Raises OSError where it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(asdict(profile), indent=2) + "\n")


def load_profile(path: str | Path) -> HardwareProfile:
    """The profile of a JSON file that `save_profile` wrote; fields left out keep the H100's figures.

    Raises OSError where the file cannot be read, ValueError that names the file and the field where it is no profile.
    """
    try:
        found = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected a hardware profile as JSON: {error}") from None
    names = [field.name for field in fields(HardwareProfile)]
    if not isinstance(found, dict) or "name" not in found:
        raise ValueError(f"{path}: expected a JSON object with a name, got {found!r:.80}")
    if unknown := sorted(found.keys() - set(names)):
        raise ValueError(f"{path}: expected the fields {', '.join(names)}, got {', '.join(unknown)}")
    try:
        return HardwareProfile(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
