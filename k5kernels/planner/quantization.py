"""Bytes of a weight that is held in fewer bits."""

from k5kernels.planner.checks import one_of

# NF4 as bitsandbytes stores it with double quantization: half a byte, one byte of scale for 64 weights, and four more
# bytes for 256 of these scales.
WEIGHT_BYTES = {"bfloat16": 2.0, "int8": 1.0, "float8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}


def weight_bytes(field: str, dtype: str) -> float:
    """Bytes of one weight. Raises ValueError that names the field where the dtype is none of WEIGHT_BYTES."""
    return WEIGHT_BYTES[one_of(field, dtype, WEIGHT_BYTES)]
