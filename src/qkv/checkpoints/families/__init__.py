"""Families of models as Hugging Face lays them out: one file each, its config and the map of its keys, in and out."""

from qkv.checkpoints.families.family import Family
from qkv.checkpoints.families.gemma import GEMMA2, GEMMA3_TEXT
from qkv.checkpoints.families.gpt2 import GPT2
from qkv.checkpoints.families.gpt_neox import GPT_NEOX
from qkv.checkpoints.families.llama import LLAMA
from qkv.checkpoints.families.mistral import MISTRAL
from qkv.checkpoints.families.olmo2 import OLMO2
from qkv.checkpoints.families.phi3 import PHI3
from qkv.checkpoints.families.qwen import QWEN2, QWEN3
from qkv.errors import ConfigError, suggest
from qkv.models.transformer import TransformerConfig

FAMILIES: dict[str, Family] = {
    family.name: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GEMMA2, GEMMA3_TEXT, GPT_NEOX, PHI3)
}
"""By the `model_type` of `config.json`; plainer ones first."""


def family_of(config: TransformerConfig, name: str | None = None) -> Family:
    """The family that can express a model.

    Args:
        config: The model.
        name: The family to take; None: the first that can.

    Raises:
        ConfigError: It cannot, or none can; the message says why.
    """
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"no family {name!r}; {suggest(name, FAMILIES)}")
    reasons: list[str] = []
    for family in FAMILIES.values() if name is None else (FAMILIES[name],):
        try:
            family.write(config)
        except ConfigError as error:
            reasons.append(str(error))
        else:
            return family
    raise ConfigError("; ".join(reasons))


__all__ = ["FAMILIES", "Family", "family_of"]
