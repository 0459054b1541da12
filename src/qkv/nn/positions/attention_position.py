"""What tells attention where tokens stand."""

from abc import ABC

from qkv.config import Config, config


@config
class AttentionPositionConfig(Config, ABC):
    """Base of the configs of rotations of queries and keys, and of biases of the scores."""
