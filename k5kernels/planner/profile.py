"""What the planner knows of a machine: coefficients of the step formula, memory and bandwidths.

`H100` holds the report's figures (§7.3.1, §6.1) and, where the report is silent, the data sheet of the H100 SXM.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from k5kernels.atomic import replacing
from k5kernels.planner.checks import LARGEST, positive_integer, read_text, shown

_COEFFICIENTS = ("tokenwise_ms", "attention_ms", "linear_ms")
# What the coefficients were called in the files of version 0.1.0.
_FORMER_NAMES = {"constant_ms": "tokenwise_ms", "tokens_ms": "attention_ms", "width_ms": "linear_ms"}


@dataclass(frozen=True)
class HardwareProfile:
    """Figures of one GPU and of its node.

    tokenwise_ms, attention_ms, linear_ms: the step formula's 9, 14 and 6: what each of its terms takes for one block
    and one clip at d0 and S0.
    memory_bytes: of one GPU. memory_reserve: share of what is used that the allocator and the driver take beside it.
    gpus_per_node: GPUs on one fast link. node_bytes_per_s, network_bytes_per_s, host_bytes_per_s: what one GPU sends
    in one direction to a GPU of its node, to one of another node, and to host memory.
    Raises ValueError that names the field where a figure is not a number above 0 (the coefficients may be 0).
    """

    name: str
    tokenwise_ms: float = 9
    attention_ms: float = 14
    linear_ms: float = 6
    memory_bytes: float = 80 * 2**30
    memory_reserve: float = 0.06
    gpus_per_node: int = 8
    node_bytes_per_s: float = 450e9  # NVLink 4: 900 GB/s both ways
    network_bytes_per_s: float = 50e9  # InfiniBand NDR, one 400 Gbit/s port a GPU
    host_bytes_per_s: float = 64e9  # PCIe 5.0 ×16

    @property
    def speed(self) -> float:
        """How many times as fast as the report's H100 the formula's step is at d0 and S0."""
        return (H100.tokenwise_ms + H100.attention_ms + H100.linear_ms) / (
            self.tokenwise_ms + self.attention_ms + self.linear_ms
        )

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: expected a text, got {shown(self.name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "gpus_per_node":
                positive_integer(field.name, value)
            elif field.name != "name":
                _check_number(field.name, value)
        if self.tokenwise_ms + self.attention_ms + self.linear_ms == 0:
            raise ValueError("tokenwise_ms, attention_ms, linear_ms: expected one above 0, got 0 for all")


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
    raise ValueError(f"{field}: expected a number {least} up to {largest}, got {shown(value)}")


H100 = HardwareProfile(name="H100")


def save_profile(profile: HardwareProfile, path: str | Path) -> None:
    """Writes the profile as JSON; the file is whole or not there. Raises OSError where it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(asdict(profile), indent=2) + "\n")


def load_profile(path: str | Path) -> HardwareProfile:
    """The profile of a JSON file that `save_profile` wrote, also under the names that version 0.1.0 gave the
    coefficients; fields left out keep the H100's figures.

    Raises OSError where the file cannot be read, ValueError that names the file and the field where it is no profile.
    """
    found = _read_object(Path(path))
    names = [field.name for field in fields(HardwareProfile)]
    if unknown := sorted(found.keys() - set(names) - set(_FORMER_NAMES)):
        raise ValueError(f"{path}: expected the fields {', '.join(names)}, got {', '.join(unknown)[:200]}")
    if twice := [f"{old} and {new}" for old, new in _FORMER_NAMES.items() if {old, new} <= found.keys()]:
        raise ValueError(f"{path}: expected one name for a coefficient, got {', '.join(twice)}; keep the second")
    try:
        return HardwareProfile(**{_FORMER_NAMES.get(name, name): value for name, value in found.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, which has a name."""
    text = read_text(path, "a hardware profile")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested without end
        raise ValueError(
            f"{path}: expected a hardware profile as JSON: {error}; `k5 plan calibrate` makes one"
        ) from None
    if not isinstance(found, dict) or "name" not in found:
        raise ValueError(
            f"{path}: expected a JSON object with a name, got {shown(found)}; `k5 plan calibrate` makes one"
        )
    return found
