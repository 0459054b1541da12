"""Hugging Face transformers: GPT2LMHeadModel or LlamaForCausalLM on SDPA, with the library's own loss."""

from typing import Any

from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from peers.shapes import Shape


class HuggingFace(nn.Module):
    """What the model does with `labels`, for labels that are shifted already."""

    def __init__(self, model: GPT2LMHeadModel | LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy."""
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=targets)


def build(shape: Shape) -> nn.Module:
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": True,
    }
    if shape.family == "gpt2":
        config = GPT2Config(
            **common,
            n_embd=shape.d_model,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_inner=shape.d_ff,
            n_positions=shape.context,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return HuggingFace(GPT2LMHeadModel(config))
    config = LlamaConfig(
        **common,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        intermediate_size=shape.d_ff,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
    )
    return HuggingFace(LlamaForCausalLM(config))
