"""Families of models as Hugging Face lays them out: a config and the map of its keys, in and out."""

from qkv.checkpoints.families import bert, relatives, two_towers, vision
from qkv.checkpoints.families.dinov3 import DINOV3
from qkv.checkpoints.families.family import Family
from qkv.checkpoints.families.gpt2 import GPT2
from qkv.checkpoints.families.gpt_neox import GPT_NEOX
from qkv.checkpoints.families.modernbert import MODERNBERT
from qkv.errors import ConfigError, suggest
from qkv.models.model import ModelConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GPT2,
        relatives.LLAMA.family(),
        relatives.MISTRAL.family(),
        relatives.QWEN2.family(),
        relatives.QWEN3.family(),
        relatives.OLMO2.family(),
        relatives.OLMO3.family(),
        relatives.GEMMA.family(),
        relatives.GEMMA2.family(),
        relatives.GEMMA3_TEXT.family(),
        GPT_NEOX,
        relatives.PHI3.family(),
        *(each.family() for each in (bert.BERT, bert.ROBERTA, bert.XLM_ROBERTA, bert.CAMEMBERT, bert.ALBERT)),
        MODERNBERT,
        *(each.family() for each in vision.VISION),
        *(each.family() for each in two_towers.TWO_TOWERS),
        DINOV3,
    )
}
"""By the `model_type` of `config.json`; plainer ones first."""


def family_of(config: ModelConfig, name: str | None = None) -> Family:
    """The family that can express a model.

    Args:
        config: The model.
        name: The family to take; None: the first that can.

    Raises:
        ConfigError: It cannot, or none can; the message says why.
    """
    if name is not None and name not in FAMILIES:
        raise ConfigError(f"no family {name!r}; {suggest(name, FAMILIES)}")
    reasons: dict[str, list[str]] = {}  # and the families that have each
    for family in FAMILIES.values() if name is None else (FAMILIES[name],):
        try:
            family.write(config)
        except ConfigError as error:
            reasons.setdefault(str(error).removeprefix(family.name), []).append(family.name)
        else:
            return family
    raise ConfigError("; ".join(f"{', '.join(names)}{reason}" for reason, names in reasons.items()))


__all__ = ["FAMILIES", "Family", "family_of"]
