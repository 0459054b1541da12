"""`qkv generate`."""

import sys
from pathlib import Path

_SEPARATOR = "\n" + "─" * 40 + "\n"


def generate(
    model: Path,
    prompt: str = "",
    /,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    samples: int = 1,
    stop: list[str] | None = None,
) -> None:
    """Let a trained model go on with a text.

    The prompt and what follows go to standard output; everything else goes to standard error.

    Args:
        model: A run folder, or a Hugging Face folder.
        prompt: How the text begins. Empty: the model begins a text of its own.
        max_new_tokens: How many tokens to add at most.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the likeliest.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens that together have this probability.
        min_p: Draw from the tokens with at least this share of the likeliest one's probability.
        repetition_penalty: Above 1, tokens that have occurred become less likely.
        seed: Of the random numbers: the same seed writes the same text.
        samples: How many texts to write, one after the other.
        stop: End the text before this string. May be given several times.
    """
    from qkv.api import load
    from qkv.generation import SamplingConfig

    sampling = SamplingConfig(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    loaded = load(model)
    context = loaded.config.context
    length = len(loaded.tokenizer.encode(prompt)) if loaded.tokenizer else 0
    if context and length < context < length + max_new_tokens:
        print(f"qkv: note: the text can have {context} tokens, the context of this model, and no more", file=sys.stderr)
    options = {"max_new_tokens": max_new_tokens, "stop": stop or (), "sampling": sampling}
    if samples != 1:
        texts = loaded.generate(prompt, n=samples, **options)
        print(_SEPARATOR.join(prompt + text for text in texts))
        return
    pieces = loaded.stream(prompt, **options)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
