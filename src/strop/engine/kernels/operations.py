"""Names of the operations of a step on a GPU that are tried before they are used (cuda/selftest.py)."""

NORM, GLU, ROPE, LOSS, DORA = "RMSNorm", "gated activations", "rotary embedding", "cross entropy", "DoRA"
DROPOUT, FOUR_BIT, EIGHT_BIT = "dropout", "4-bit weights", "8-bit weights"
FLASH, EFFICIENT, SINKS = "flash attention", "memory-efficient attention", "attention sinks"
FP32_SUMS, FUSED_ADAMW = "products with fp32 results", "fused AdamW"
TRITON = frozenset({NORM, GLU, ROPE, LOSS, DORA, DROPOUT, FOUR_BIT, EIGHT_BIT})  # those that are Triton kernels
