"""How close is close: each constant with its reason. The values are of order 1 to 10 unless a test says otherwise."""

FLOAT64 = 1e-10
"""Both sides compute in float64; their sums run in different orders."""

HF_FLOAT32_INSIDE = 2e-5
"""Hugging Face computes rotary angles and RMSNorm in float32 inside a float64 model; ours are float64."""

FLOAT32 = 2e-5
"""float32 logits of a few layers with sums in another order: a hundred roundings of 6e-8 on values around 3."""

BF16 = 0.05
"""bfloat16 logits of a few layers: one rounding is 4e-3 relative."""
