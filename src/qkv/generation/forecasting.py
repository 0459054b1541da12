"""How series of vectors go on."""

import torch

from qkv.errors import ConfigError
from qkv.models.model import evaluating
from qkv.models.transformer import Transformer
from qkv.nn.embedders import EmbedderConfig
from qkv.shapes import Float, Tensor


@torch.inference_mode()
def forecast(model: Transformer, values: Float[Tensor, "B T F"], steps: int) -> Float[Tensor, "B steps F"]:
    """The next `steps` vectors of each series: each is what the model expects, and is read as if it had come.

    Args:
        model: A model of vectors with causal masks, which puts out as many numbers as it reads. It is in evaluation
            mode while this runs.
        values: The series so far, of the type of the model's weights.
        steps: Vectors to come.

    Raises:
        ConfigError: The model is another one, or the series do not fit it.
    """
    embed, limit = model.config.embed, model.config.limit
    if type(embed).for_vectors is EmbedderConfig.for_vectors:  # its own says what it takes
        raise ConfigError("the model reads no vectors and has nothing to forecast; let it generate text")
    if (mask := model.config.mask_ahead) is not None:
        raise ConfigError(f"the mask {mask.tag()} lets a vector see what comes after it; forecast with a causal model")
    try:
        embed.for_vectors(values.shape[2])
    except ConfigError as error:
        raise ConfigError(f"the model does not read these series: {error}") from None
    if steps < 1 or not values.shape[1]:
        raise ConfigError(f"there are {values.shape[1]} vectors and steps={steps} to come; both must be at least 1")
    if limit is not None and (n := values.shape[1] + steps - 1) > limit:
        raise ConfigError(
            f"{values.shape[1]} vectors and steps={steps} are {n} to read and the context is {limit}; "
            f"give the last {max(0, limit + 1 - steps)} or fewer"
        )
    if not bool(values.isfinite().all()):
        raise ConfigError("the vectors hold a value that is not finite; remove or replace it")
    with evaluating(model):
        cache = model.make_cache(len(values), values.shape[1] + steps - 1)
        found = [model(values, cache=cache)[:, -1:]]
        if found[0].shape[2] != values.shape[2]:
            raise ConfigError(
                f"the model puts out {found[0].shape[2]} numbers for vectors of {values.shape[2]}, which is no forecast"
            )
        while len(found) < steps:
            found.append(model(found[-1], cache=cache))
    return torch.cat(found, 1)
