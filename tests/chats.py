"""A tiny model that can chat: random weights, a byte tokenizer, a template in the manner of ChatML."""

import tokenizers
import torch

import chat_templates
from qkv.checkpoints import Store
from qkv.data import BPETokenizerConfig, Tokenizer
from qkv.presets import llama
from qkv.yaml_files import dump_yaml


def chat_tokenizer(*texts):
    """257 bytes, up to ten words of the texts, and two special tokens."""
    vocab_size = 267 if texts else 257
    inner = tokenizers.Tokenizer.from_str(BPETokenizerConfig(vocab_size=vocab_size).train(texts).to_json())
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(inner, chat_template=chat_templates.CHATML, begin_of_text=inner.token_to_id("<|im_start|>"))


def write_chat_run(folder, *, context=400, template=True, d_model=8, d_ff=8, texts=()):
    """A run folder of it."""
    folder.mkdir()
    tokenizer = chat_tokenizer(*texts)
    if not template:
        tokenizer.chat_template = None
    sizes = {"d_model": d_model, "d_ff": d_ff, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
    config = llama(vocab_size=tokenizer.vocab_size, theta=100.0, context=context, **sizes)
    model = config.build()
    torch.manual_seed(2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    tokenizer.save(folder)
    (folder / "recipe.yaml").write_text(dump_yaml({"model": config.to_dict()}))
    Store(folder / "checkpoints").save(1, {"model": model.state_dict()}, {})
    return folder
