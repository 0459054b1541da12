"""`qkv convert`."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def convert(
    source: str,
    target: Path,
    /,
    *,
    to: Literal["hf", "gguf", "qkv", "peft"],
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_0", "q4_1"] | None = None,
    certify: Annotated[bool, Parameter(negative="--no-certificate", name="--certificate")] = True,
) -> None:
    """Write a model in another layout.

    Args:
        source: A run, a Hugging Face folder, a GGUF file, or a name that `qkv pull` knows.
        target: The folder (hf, qkv, peft) or file (gguf) to write; it must not be there yet.
        to: hf for transformers and vLLM, gguf for llama.cpp, qkv for our own layout, peft for a run's adapters alone.
        dtype: Type of the weights; by default that of the source. The last three are for gguf.
        certify: Compare each layer with transformers, where it is installed, and write certificate.json (hf, qkv).
    """
    from qkv.cli.drawing import certificate_lines
    from qkv.loading.certificate import read_certificate
    from qkv.loading.convert import convert as run

    made = run(source, target, to=to, dtype=dtype, certify=certify)
    print(f"wrote {made}")
    if made.is_dir() and (found := read_certificate(made)):
        print("\n".join(certificate_lines(found)))
