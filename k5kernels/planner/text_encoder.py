"""The text encoder, Qwen2.5-VL-7B: what it holds, and what a prompt takes (§5.2)."""

PARAMETERS = 7e9  # that a token of text passes through
FLOPS_PER_S = 400e12  # about what large bfloat16 products reach on an H100
STORED_BYTES = 2 * 8.29e9  # in bfloat16, the vision tower too
TOKENS = 256
SHARDS = 32  # at most (§6.1.3)
