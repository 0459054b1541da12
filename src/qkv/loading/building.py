"""From the config and the weights of a file of ours to the model."""

from pathlib import Path
from typing import Any

import torch

from qkv.checkpoints import build_empty, check_fit
from qkv.errors import ConfigError
from qkv.models.model import Model, ModelConfig
from qkv.models.transformer import TransformerConfig
from qkv.shapes import Tensor


def model_config(data: Any, *, path: str = "model") -> ModelConfig:
    """The config of a model from plain data; without a type it is a Transformer's; `path` is where they stand.

    Raises:
        ConfigError: It is none.
    """
    plain = {"type": TransformerConfig.tag()} | data if isinstance(data, dict) else data
    return ModelConfig.from_dict(plain, path=path)


def build_with(config: ModelConfig, state: dict[str, Tensor], told: Path, source: str) -> Model:
    """The model of a config, in evaluation mode, with these weights, which are not copied.

    Args:
        config: Of the model.
        state: The weights.
        told: The file that the config is from.
        source: What errors call the weights.

    Raises:
        FileError: The model cannot be built, or the weights are those of another one.
    """
    model = build_empty(config.build, config.depth, len(state), source=str(told))
    check_fit(state, model.state_dict(), source=source)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


def to_type(model: Any, dtype: torch.dtype | None, device: str | torch.device | None = None) -> None:
    """Put a model's weights into another type, and on another device.

    Raises:
        ConfigError: There is no such type of weights or device, or a weight is beyond float16.
    """
    if not isinstance(dtype, torch.dtype | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"dtype={dtype!r} is no type of PyTorch; give one such as torch.bfloat16")
    try:
        model.to(device=device, dtype=dtype)
    except (RuntimeError, TypeError, AssertionError) as error:  # whatever torch says of types and devices
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the weights cannot become dtype={dtype!r} on device={device!r} ({reason}); give a type such as "
            "torch.bfloat16, and a device that is there"
        ) from None
    for name, tensor in model.state_dict().items() if dtype is torch.float16 else ():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(f"{name!r} is not finite in float16, whose numbers end at 65504; use bfloat16 or float32")
