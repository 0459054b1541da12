"""A GPT in the style of nanoGPT: one short file, everything explicit. For a Llama shape the same in Llama's parts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.shapes import Shape


class Attention(nn.Module):
    """Causal self-attention from one fused projection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.head_dim = shape.d_model // shape.n_heads
        width = (shape.n_heads + 2 * shape.n_kv_heads) * self.head_dim
        self.c_attn = nn.Linear(shape.d_model, width, bias=shape.family == "gpt2")
        self.c_proj = nn.Linear(shape.d_model, shape.d_model, bias=shape.family == "gpt2")

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, D) to (B, T, D); `turn` holds the cosines and sines of the rotary positions."""
        n, groups = self.shape.n_heads, self.shape.n_kv_heads
        heads = self.c_attn(x).unflatten(-1, (n + 2 * groups, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((n, groups, groups), dim=1)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n != groups)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MLP(nn.Module):
    """Two layers with GELU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.d_model, shape.d_ff)
        self.c_proj = nn.Linear(shape.d_ff, shape.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_gate = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.c_fc = nn.Linear(shape.d_model, shape.d_ff, bias=False)
        self.c_proj = nn.Linear(shape.d_ff, shape.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Block(nn.Module):
    """Norm, attention, norm, MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = norm(shape), norm(shape)
        self.attn = Attention(shape)
        self.mlp = MLP(shape) if shape.family == "gpt2" else SwiGLU(shape)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, T, D) to (B, T, D); `turn` holds the cosines and sines of the rotary positions."""
        x = x + self.attn(self.ln_1(x), turn)
        return x + self.mlp(self.ln_2(x))


def norm(shape: Shape) -> nn.Module:
    return nn.LayerNorm(shape.d_model) if shape.family == "gpt2" else nn.RMSNorm(shape.d_model, eps=1e-5)


class GPT(nn.Module):
    """Maps ids and targets (B, T) to the mean cross-entropy."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.wpe = nn.Embedding(shape.context, shape.d_model) if shape.family == "gpt2" else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.ln_f = norm(shape)
        head_dim = shape.d_model // shape.n_heads
        angles = torch.outer(torch.arange(shape.context), shape.theta ** -(torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.reset(shape.n_layers)

    def reset(self, n_layers: int) -> None:
        """Weights as nanoGPT draws them."""
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layers) if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        n = inputs.shape[1]
        if self.wpe is None:
            x, turn = self.wte(inputs), (self.cos[:n], self.sin[:n])
        else:
            x, turn = self.wte(inputs) + self.wpe.weight[:n], None
        for block in self.blocks:
            x = block(x, turn)
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(self.logits(inputs).float().flatten(0, 1), targets.flatten())


def build(shape: Shape) -> nn.Module:
    return GPT(shape)
