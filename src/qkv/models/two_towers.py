"""Two towers: one reads texts, the other pictures, and both put what belongs together at one place."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, config
from qkv.errors import ConfigError
from qkv.models.model import Model, ModelConfig
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.heads import EmbeddingHeadConfig
from qkv.nn.part import Part
from qkv.nn.sublayer import Aux, merge
from qkv.shapes import Bool, Float, Int, Tensor
from qkv.tokens import Tokens

# --- how texts and pictures are compared ------------------------------------------------------------------------------


class Contrast(Part, ABC):
    """Base of the losses: pictures and texts that belong together are to be more alike than others of their batch.

    The picture of one pair and the text of another belong together as well where both show the same thing, or have the
    same text, so that nothing true is learned as false; `targets` say so. Only pairs of one batch are compared:
    accumulation makes no larger batch of them.

    Attributes:
        log_scale: Of what cosines are multiplied with. It is not clipped, as it is in Radford et al. 2021.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def logits(self, pictures: Float[Tensor, "P E"], texts: Float[Tensor, "N E"]) -> Float[Tensor, "P N"]:
        """How well each text fits each picture; vectors of length 1."""
        return self.log_scale.exp() * pictures @ texts.T

    def loss(
        self, pictures: Float[Tensor, "P E"], texts: Float[Tensor, "N E"], targets: Int[Tensor, "M 2"], scale: float
    ) -> Float[Tensor, ""]:
        """`scale` times the loss in nats, summed over the pairs; `ConfigError` where P, N and M differ.

        Args:
            pictures: The vectors of pictures, of length 1.
            texts: Those of their texts.
            targets: Of each pair, what it shows and what its text says, as numbers.
            scale: By which the sum is multiplied.
        """
        if not len(pictures) == len(texts) == len(targets):
            raise ConfigError(
                f"there are {len(pictures)} pictures, {len(texts)} texts and {len(targets)} targets; give as many of "
                "each"
            )
        together = (targets[:, None] == targets).any(-1)
        wide = torch.promote_types(pictures.dtype, torch.float32)
        return self.total(self.logits(pictures, texts).to(wide), together) * scale

    @abstractmethod
    def total(self, logits: Float[Tensor, "N N"], together: Bool[Tensor, "N N"]) -> Float[Tensor, ""]:
        """The loss summed over the pairs; `together`: what belongs together, the pairs themselves included."""

    def count(self, targets: Tensor, tokens: Tokens) -> int:
        """Pairs."""
        return len(targets)

    def probabilities(self, logits: Float[Tensor, "P N"]) -> Float[Tensor, "P N"]:
        """How likely each text is: of these texts one is right."""
        return logits.float().softmax(-1)


@config
class ContrastConfig(Config, ABC):
    """Base of the configs of losses of two towers."""

    def build(self) -> Contrast:
        """The loss, with its trained numbers."""
        return self._build()


@final
@config
class SoftmaxContrastConfig(ContrastConfig):
    """The mean of two cross-entropies: of a text among those of its batch, and of a picture (Radford et al. 2021).

    What else belongs to a picture or text is left out of its sum.

    Attributes:
        scale: What cosines are multiplied with at first.
    """

    scale: float = 1 / 0.07


@final
class SoftmaxContrast(Contrast, config=SoftmaxContrastConfig):
    """Both ways."""

    def __init__(self, config: SoftmaxContrastConfig) -> None:
        super().__init__(config.scale)

    def total(self, logits: Float[Tensor, "N N"], together: Bool[Tensor, "N N"]) -> Float[Tensor, ""]:
        own = torch.arange(len(logits), device=logits.device)
        others = together & (own != own[:, None])
        logits = logits.masked_fill(others, -torch.inf)
        both = [F.cross_entropy(each, own, reduction="sum") for each in (logits, logits.T)]
        return torch.stack(both).sum() / 2


@final
@config
class SigmoidContrastConfig(ContrastConfig):
    """Of each picture and each text of a batch, whether they belong together (Zhai et al. 2023, SigLIP, equation 1).

    Attributes:
        scale: What cosines are multiplied with at first.
        bias: What is added to that at first.
    """

    scale: float = 10.0
    bias: float = -10.0


@final
class SigmoidContrast(Contrast, config=SigmoidContrastConfig):
    """A bias beside the scale, since most pictures and texts do not belong together."""

    def __init__(self, config: SigmoidContrastConfig) -> None:
        super().__init__(config.scale)
        self.bias = nn.Parameter(torch.tensor(config.bias))

    def logits(self, pictures: Float[Tensor, "P E"], texts: Float[Tensor, "N E"]) -> Float[Tensor, "P N"]:
        return super().logits(pictures, texts) + self.bias

    def total(self, logits: Float[Tensor, "N N"], together: Bool[Tensor, "N N"]) -> Float[Tensor, ""]:
        return -F.logsigmoid(torch.where(together, logits, -logits)).sum()

    def probabilities(self, logits: Float[Tensor, "P N"]) -> Float[Tensor, "P N"]:
        """How likely each text is by itself: several may be right, or none."""
        return logits.float().sigmoid()


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captioned:
    """The input of two towers: the pictures and texts of a batch.

    Attributes:
        texts: Ids.
        tokens: Where they stand. The documents of texts and of pictures belong together in their order.
        pictures: Patches.
    """

    texts: Int[Tensor, "B S"]
    tokens: Tokens
    pictures: Float[Tensor, "C T values"]

    def to(self, device: torch.device) -> "Captioned":
        """The same on a device."""
        return Captioned(self.texts.to(device), self.tokens.to(device), self.pictures.to(device))


@final
@config
class TwoTowersConfig(ModelConfig):
    """A model of texts and pictures as data.

    Attributes:
        text: What reads texts; its head gives a vector of each.
        picture: What reads pictures; its head gives a vector of each, as wide.
        contrast: How both are compared, and the loss.
    """

    text: TransformerConfig
    picture: TransformerConfig
    contrast: ContrastConfig = SigmoidContrastConfig()

    def __post_init__(self) -> None:
        widths = [_width(tower, name) for name, tower in (("text", self.text), ("picture", self.picture))]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"vectors of texts are {widths[0]} wide and those of pictures {widths[1]}; set text.head.width or "
                "picture.head.width"
            )

    def fitted(self, vocab_size: int, channels: int) -> "TwoTowersConfig":
        """The same for a tokenizer and for pictures; `ConfigError` where it does not fit them."""
        text, picture = self.text, self.picture
        return self.replace(
            text=text.replace(embed=text.embed.for_vocabulary(vocab_size)),
            picture=picture.replace(embed=picture.embed.for_pictures(channels)),
        )

    def closed(self) -> "TwoTowersConfig":
        return self.replace(text=self.text.closed(), picture=self.picture.closed())

    @property
    def sentence(self) -> str:
        text, picture = (f"{tower.depth} layers, {tower.d_model:,} wide" for tower in (self.text, self.picture))
        return f"two towers: one reads texts ({text}), one pictures ({picture})"

    @property
    def depth(self) -> int:
        return self.text.depth + self.picture.depth

    @property
    def longest(self) -> int | None:
        """Of a text."""
        return self.text.longest

    @property
    def limit(self) -> int | None:
        return self.text.limit


def _width(tower: TransformerConfig, name: str) -> int:
    """Of the vectors that it gives."""
    if not isinstance(tower.head, EmbeddingHeadConfig):
        found = "none" if tower.head is None else tower.head.tag()
        raise ConfigError(f"{name}.head is {found}, and a tower gives one vector of each document; use EmbeddingHead")
    return tower.head.width or tower.d_model


@final
class TwoTowers(Model, config=TwoTowersConfig):
    """Two Transformers, and what compares their vectors.

    Attributes:
        text: Reads texts.
        picture: Reads pictures.
        head: Compares them.
    """

    config: TwoTowersConfig

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__()
        self.config = config
        self.text: Transformer = config.text.build()
        self.picture: Transformer = config.picture.build()
        self.head: Contrast = config.contrast.build()

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Those of both towers."""
        return (*self.text.blocks, *self.picture.blocks)

    @property
    def table(self) -> None:
        """The head shares no vectors with an embedder."""
        return None

    @property
    def checkpoint_blocks(self) -> bool:
        """As in `Model`, of both towers."""
        return self.text.checkpoint_blocks

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, value: bool) -> None:
        self.text.checkpoint_blocks = self.picture.checkpoint_blocks = value

    def forward(
        self,
        inputs: Captioned,
        tokens: Tokens | None = None,
        *,
        targets: Int[Tensor, "N 2"] | None = None,
        scale: float | None = None,
    ) -> Float[Tensor, "P N"] | tuple[Tensor, Aux | None]:
        """How well each text fits each picture: cosines of their vectors, scaled.

        Args:
            inputs: Texts and pictures.
            tokens: Where the patches of the pictures stand: `Tokens.pictures`.
            targets: Given: what `loss` gives, instead. Of each pair, what it shows and what its text says, as numbers;
                pairs with an equal one belong together.
            scale: As in `loss`.
        """
        texts, read = embedded(self.text, inputs.texts, inputs.tokens)
        pictures, seen = embedded(self.picture, inputs.pictures, tokens)
        if targets is None:
            return self.head.logits(pictures, texts)
        scale = 1 / max(1, len(targets)) if scale is None else scale
        aux = merge(read and read.under("text"), seen and seen.under("picture"))
        return self.head.loss(pictures, texts, targets, scale), aux


def embedded(tower: Transformer, inputs: Tensor, tokens: Tokens | None) -> tuple[Float[Tensor, "N E"], Aux | None]:
    """The vectors of a tower, of length 1, and what its sublayers report."""
    stream, aux = tower.encode(inputs, tokens)
    return F.normalize(tower.readout(stream, tokens), dim=-1), aux
