"""Two towers with what they read by: texts and pictures in, vectors in one space and classes of one's own words out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch

from qkv.data import Tokenizer
from qkv.data.pictures import PICTURE_SUFFIXES
from qkv.errors import ConfigError
from qkv.loading.encoder import Encoder, Guess, best
from qkv.loading.facts import Facts
from qkv.loading.reader import NOTHING
from qkv.loading.ready import Embeds
from qkv.models.two_towers import TwoTowers
from qkv.shapes import Float, Tensor


@final
@dataclass(frozen=True)
class Matcher(Embeds):
    """A model of texts and pictures.

    Attributes:
        model: In evaluation mode.
        tokenizer: Of the texts; None: there is none.
        facts: What is known of it besides.
    """

    what = "a model of texts and pictures"
    verbs = "qkv classify --labels, embed, eval or show"

    model: TwoTowers
    tokenizer: Tokenizer | None = None
    facts: Facts = NOTHING

    @property
    def text(self) -> Encoder:
        """The tower of texts alone."""
        return Encoder(self.model.text, self.tokenizer, self.facts)

    @property
    def picture(self) -> Encoder:
        """The tower of pictures alone."""
        return Encoder(self.model.picture, None, self.facts)

    def check(self, source: Path) -> None:
        self.text.check(source)

    def files(self) -> dict[str, bytes]:
        return self.text.files()

    def embed(self, inputs: Any, *, pool: Literal["own"] = "own", unit: bool | None = None) -> Float[Tensor, "N E"]:
        """A vector for each input: those of a text and of a picture that it describes are near each other.

        Args:
            inputs: One, or several: texts; or pictures, each the path of a file (a `Path`, or a text that ends like the
                name of one), a `PIL.Image`, or values (C, H, W) that are normalised already. Both may be mixed.
            pool: 'own': a tower knows one way to make a vector.
            unit: Whether vectors are scaled to length 1, as they are unless this is False.

        Returns:
            (N, E) on the CPU.

        Raises:
            ConfigError: An input is longer than the model can read, or no whole patches; or it is not known how.
            FileError: There is no such picture, or it cannot be read.
        """
        if pool != "own":
            raise ConfigError(f"pool={pool!r}: a tower makes vectors in one way; leave it out")
        given = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        are_texts = [isinstance(x, str) and not x.lower().endswith(PICTURE_SUFFIXES) for x in given]
        made: list[Any] = [None] * len(given)
        for tower, wanted in ((self.text, True), (self.picture, False)):
            places = [i for i, is_text in enumerate(are_texts) if is_text is wanted]
            for i, vector in zip(places, tower.embed([given[i] for i in places], unit=unit is not False), strict=True):
                made[i] = vector
        return torch.stack(made) if made else torch.empty(0, 0)

    def classify(
        self, pictures: Any, labels: Sequence[str], *, template: str = "{}", top: int = 5
    ) -> list[list[Guess]]:
        """Which of these words fits each picture; the model was not trained on them (Radford et al. 2021, section 3.1).

        Probabilities are those of the model's loss: with softmax they are shares among the labels; with sigmoid each is
        for itself, and none may fit.

        Args:
            pictures: One, or several, as for `embed`.
            labels: What they may be.
            template: The text that is read for a label, with {} where it stands.
            top: How many labels.

        Returns:
            The likeliest labels of each picture, the likeliest first.

        Raises:
            ConfigError: There are no labels, or the template has no place for them; or as `embed`.
            FileError: As `embed`.
        """
        if isinstance(labels, str) or not labels:
            raise ConfigError(f"labels={labels!r}: give a list of what the pictures may show, such as ['cat', 'dog']")
        if "{}" not in template:
            raise ConfigError(f"template={template!r} has no {{}}, where the label is to stand; put one there")
        texts = self.text.embed([template.replace("{}", label) for label in labels], unit=True)
        seen = self.picture.embed(pictures, unit=True)
        head, weight = self.model.head, self.model.head.log_scale
        assert isinstance(texts, Tensor)
        assert isinstance(seen, Tensor)
        with torch.inference_mode():
            logits = head.logits(seen.to(weight), texts.to(weight))
            return [best(row, labels.__getitem__, top) for row in head.probabilities(logits).cpu()]
