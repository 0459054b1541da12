"""The model shapes that all contestants build."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A GPT-2 or Llama shape, with tied embeddings.

    Attributes:
        family: "gpt2" (learned positions, LayerNorm, tanh-GELU, biases) or "llama" (RoPE, RMSNorm, SwiGLU, GQA).
        context: Longest sequence that the model is built for (tokens).
        n_parameters: Parameters of the published model; each contestant must have as many, within 1 %.
    """

    family: str
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    vocab_size: int
    context: int
    n_parameters: int
    theta: float = 1e5


SHAPES = {
    "gpt2": Shape("gpt2", 768, 12, 12, 12, 3072, 50_257, 1024, 124_439_808),
    "smollm2": Shape("llama", 576, 30, 9, 3, 1536, 49_152, 8192, 134_515_008),
    "tiny": Shape("gpt2", 256, 2, 4, 4, 1024, 50_257, 512, 14_576_896),
    "tiny-llama": Shape("llama", 256, 2, 4, 2, 768, 49_152, 512, 14_157_056),
}
