"""The text encoder, Qwen2.5-VL-7B: what it holds, and what a prompt takes (§5.2)."""

from k5kernels.planner.quantization import weight_bytes

PARAMETERS = 7e9  # that a token of text passes through
FLOPS_PER_S = 400e12  # about what large bfloat16 products reach on an H100
STORED_PARAMETERS = 8.29e9  # the vision tower too
EMBEDDINGS = 2 * 152_064 * 3584  # of the tokens and of the output: never quantized
STORED_BYTES = 2 * STORED_PARAMETERS  # in bfloat16
TOKENS = 256
SHARDS = 32  # at most (§6.1.3)


def stored_bytes(dtype: str) -> float:
    """Bytes of all its weights with the linear layers in that dtype: 16.6 GB in bfloat16, 5.9 GB in NF4.

    Raises ValueError where the dtype is none of `quantization.WEIGHT_BYTES`.
    """
    return weight_bytes("text_encoder_dtype", dtype) * (STORED_PARAMETERS - EMBEDDINGS) + 2 * EMBEDDINGS
