"""A class names its config, and the config builds it."""

from abc import ABC

import pytest

from qkv import GLUConfig
from qkv.config import Config, Configured, config
from qkv.errors import ConfigError
from qkv.nn.ffn import GLU


@config
class ShapeConfig(Config, ABC):
    """A kind, which nobody makes."""

    def build(self, side: int) -> "Shape":
        """The shape."""
        return self._build(side)


class Shape(Configured):
    """The base of what is built."""

    def __init__(self, config: ShapeConfig, side: int) -> None:
        self.config, self.side = config, side


@config
class SquareConfig(ShapeConfig):
    """One of the kind."""


class Square(Shape, config=SquareConfig):
    """What it builds."""


@config
class LonelyConfig(ShapeConfig):
    """No class names it."""


def test_a_config_builds_the_class_that_names_it():
    square = SquareConfig().build(3)
    assert (type(square), square.config, square.side) == (Square, SquareConfig(), 3)
    assert type(GLUConfig().build(8)) is GLU


def test_a_config_that_no_class_names_says_so():
    with pytest.raises(TypeError, match="LonelyConfig has nothing to build; declare a class with config=LonelyConfig"):
        LonelyConfig().build(3)


def test_a_config_belongs_to_one_class():
    with pytest.raises(TypeError, match="SquareConfig already builds Square"):
        type("Other", (Shape,), {}, config=SquareConfig)
    assert type(SquareConfig().build(3)) is Square


def test_the_base_of_a_kind_is_not_made_nor_named_in_a_file():
    with pytest.raises(TypeError, match="ShapeConfig is abstract; make one of its subclasses"):
        ShapeConfig()
    with pytest.raises(ConfigError, match="no type 'Shape' fits here"):
        ShapeConfig.from_dict({"type": "Shape"})
    assert ShapeConfig.from_dict({"type": "Square"}) == SquareConfig()
