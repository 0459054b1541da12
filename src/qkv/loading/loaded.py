"""A model with its tokenizer: prompts in, text out."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack, cast, final, overload

import torch

from qkv.config import checked
from qkv.data import ChatTemplate, Message, TextStream, Tokenizer, template_of
from qkv.errors import ConfigError, FileError
from qkv.generation import (
    USUAL,
    BeamConfig,
    Finish,
    Kept,
    SamplingConfig,
    Step,
    StopFilter,
    forecast,
    generate,
    score,
    search,
)
from qkv.loading.facts import Facts
from qkv.loading.reader import Read, Reader
from qkv.models.transformer import Transformer
from qkv.shapes import Tensor

Stop = str | Sequence[str]


class HowToWrite(TypedDict, total=False):
    """How a text is written: its tokens are drawn by chance, or with `beams` it is searched for.

    Attributes:
        max_new_tokens: Tokens to generate at most; 100 by default, and 500 for an answer of `chat`.
        stop: Strings before which the text ends, wherever tokens begin and end. A search does not see them: what it has
            found is cut there.
        sampling: How tokens are drawn, as `SamplingConfig` or its fields; None: `Loaded.sampling`.
        temperature: As in `SamplingConfig`, and so are the others: they change what `sampling` says.
        beams: Unfinished texts that a search keeps, and 1 takes the likeliest token each time; see `BeamConfig`.
        length_penalty: Of a search, 1 by default; see `BeamConfig`.
    """

    max_new_tokens: int
    stop: Stop
    sampling: SamplingConfig | Mapping[str, Any] | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    beams: int | None
    length_penalty: float | None


@final
@dataclass(frozen=True)
class Score:
    """How likely tokens are, each after those before it, as the model alone has it: natural logarithms.

    Attributes:
        tokens: The text that each token adds; empty where a character needs more of them, and for one that ends a text.
        log_probabilities: Of each of them, in nats.
    """

    tokens: tuple[str, ...]
    log_probabilities: tuple[float, ...]

    @property
    def total(self) -> float:
        """The sum: the log-probability of all of them."""
        return math.fsum(self.log_probabilities)


@final
@dataclass(frozen=True)
class Completion:
    """How a text went on.

    Attributes:
        prompt: How it began.
        text: What the model wrote after that.
        finish: Why it ended there; `Finish.STOP` also where a stop string was found.
        score: How likely each token was that was drawn, also one that ended the text, and those of a stop string.
    """

    prompt: str
    text: str
    finish: Finish | None
    score: Score


@final
@dataclass(frozen=True)
class Loaded(Reader):
    """A language model, or one of vectors, with its tokenizer.

    Attributes:
        template: How a conversation is written; None: the model has no chat template.
    """

    what = "a language model"
    verbs = "qkv generate, chat, forecast or eval"

    template: ChatTemplate | None = None

    @classmethod
    def of(cls, model: Transformer, tokenizer: Tokenizer | None, facts: Facts | None = None) -> "Loaded":
        """The model with a tokenizer and its template; None for the facts: those of a model that qkv trained."""
        return cls(model, tokenizer, facts or Facts.of(tokenizer), template_of(tokenizer))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.facts.stop_ids

    @property
    def begin_id(self) -> int | None:
        """The token that begins a text."""
        return self.facts.begin_id

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn where nothing else is asked for: as the makers of the model say, else `USUAL`."""
        return self.facts.sampling or USUAL

    def files(self) -> dict[str, bytes]:
        files = super().files()
        return files if self.template is None else files | {"chat_template.jinja": self.template.source.encode()}

    def read(self, texts: Sequence[str]) -> list[Read]:
        return [Read(ids) for ids in self.encode_prompts(texts)]

    def to(self, device: str | torch.device) -> "Loaded":
        """The same, with the model's weights moved to a device, which changes the model itself."""
        self.model.to(device)
        return self

    @overload
    def generate(self, prompt: str, **how: Unpack[HowToWrite]) -> str: ...
    @overload
    def generate(self, prompt: list[str] | tuple[str, ...], **how: Unpack[HowToWrite]) -> list[str]: ...
    @overload
    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, n: int, **how: Unpack[HowToWrite]
    ) -> str | list[str]: ...

    def generate(
        self, prompt: str | list[str] | tuple[str, ...], *, n: int = 1, **how: Unpack[HowToWrite]
    ) -> str | list[str]:
        """How the text goes on after the prompt.

        Several prompts are read side by side. Each text is the one that its prompt alone would give (where tokens are
        drawn by chance, with a seed), to the rounding of the weights: packed ones round otherwise in larger batches.

        Args:
            prompt: The beginning, which is not repeated in the result; or a list of them, of any lengths.
            n: How many texts to write after a single prompt: samples, or of a search the best ones.
            how: See `HowToWrite`.

        Returns:
            The text, or a list where there are several prompts, or `n` is above 1.

        Raises:
            ConfigError: There is no tokenizer, or a prompt does not fit the model.
        """
        texts = [one.text for one in self.complete(prompt, n=n, **how)]
        return texts[0] if isinstance(prompt, str) and n == 1 else texts

    @checked
    def complete(self, prompts: str | Sequence[str], *, n: int = 1, **how: Unpack[HowToWrite]) -> list[Completion]:
        """How each text goes on, and why it ended. Arguments and errors as for `generate`."""
        streams = None
        if isinstance(prompts, str):
            if n < 1:
                raise ConfigError(f"n={n} samples: must be at least 1")
            prompts, streams = [prompts] * n, list(range(n))
        elif n != 1:
            raise ConfigError(f"n={n} samples of {len(prompts)} prompts: give one prompt, or each of them {n} times")
        if not prompts:
            return []
        writing = self._write(self.encode_prompts(prompts), self.facts.stop_ids, streams=streams, **how)
        texts = ["".join(row) for row in zip(*writing, strict=True)]
        return [Completion(*row) for row in zip(prompts, texts, writing.finish, writing.scores, strict=True)]

    @overload
    def score(self, text: str, *, batch_size: int = 8) -> Score: ...
    @overload
    def score(self, text: list[str] | tuple[str, ...], *, batch_size: int = 8) -> list[Score]: ...

    @checked
    def score(self, text: str | list[str] | tuple[str, ...], *, batch_size: int = 8) -> Score | list[Score]:
        """The log-probability of each token of a text, given those before it.

        Where `facts.begins`, as in Llama, the token that begins a text is put before it, and all tokens of the
        text count. Else there is nothing before the first token, and it is left out.

        Args:
            text: The text, or a list of them, of any lengths. They have no influence on each other.
            batch_size: Texts that are read at once.

        Raises:
            ConfigError: There is no tokenizer, or a text does not fit the model.
        """
        texts = self.encode_prompts([text] if isinstance(text, str) else text)
        found = score(self.model, texts, batch_size=batch_size) if texts else []
        scores = [Score(self._pieces(ids), tuple(row)) for ids, row in zip(texts, found, strict=True)]
        return scores[0] if isinstance(text, str) else scores

    def _pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text that each token adds, from the second on."""
        assert self.tokenizer is not None
        row = _Row(self.tokenizer.stream(ids[:1]), StopFilter(()))
        for token in ids[1:]:
            row.push(token, None, 0.0)
        row.flush()
        return tuple(row.tokens)

    @overload
    def stream(self, prompt: str, **how: Unpack[HowToWrite]) -> Iterator[str]: ...
    @overload
    def stream(self, prompt: list[str] | tuple[str, ...], **how: Unpack[HowToWrite]) -> Iterator[tuple[int, str]]: ...

    @checked
    def stream(
        self, prompt: str | list[str] | tuple[str, ...], **how: Unpack[HowToWrite]
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """The text of `generate`, piece by piece as it comes; of several prompts (number of the prompt, piece).

        Arguments and errors as there.
        """
        if isinstance(prompt, str):
            return self._write(self.encode_prompts([prompt]), self.facts.stop_ids, **how).single()
        return self._write(self.encode_prompts(prompt), self.facts.stop_ids, **how).pieces() if prompt else iter(())

    @overload
    def chat(self, messages: str | Sequence[Message], **how: Unpack[HowToWrite]) -> str: ...
    @overload
    def chat(self, messages: list[str] | Sequence[Sequence[Message]], **how: Unpack[HowToWrite]) -> list[str]: ...

    def chat(
        self, messages: str | Sequence[Message] | list[str] | Sequence[Sequence[Message]], **how: Unpack[HowToWrite]
    ) -> str | list[str]:
        """The assistant's answer to a conversation, or a list of those to several, each as it would be alone.

        Args:
            messages: From the first to the last, such as `[{"role": "user", "content": "Hello!"}]`; a text
                is what the user says. Or a list of such conversations.
            how: See `HowToWrite`.

        Raises:
            ConfigError: The model has no tokenizer or chat template, or a conversation does not fit it.
            FileError: The chat template cannot be used.
        """
        conversations, several = _conversations(messages)
        writing = self.answer([self.encode_chat(one) for one in conversations], **how)
        texts = ["".join(row) for row in zip(*writing, strict=True)]
        return texts if several else texts[0]

    @overload
    def stream_chat(self, messages: str | Sequence[Message], **how: Unpack[HowToWrite]) -> Iterator[str]: ...
    @overload
    def stream_chat(
        self, messages: list[str] | Sequence[Sequence[Message]], **how: Unpack[HowToWrite]
    ) -> Iterator[tuple[int, str]]: ...

    def stream_chat(
        self, messages: str | Sequence[Message] | list[str] | Sequence[Sequence[Message]], **how: Unpack[HowToWrite]
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """The answer of `chat`, piece by piece as it comes; of several conversations (number of it, piece).

        Arguments and errors as there.
        """
        conversations, several = _conversations(messages)
        writing = self.answer([self.encode_chat(one) for one in conversations], **how)
        return writing.pieces() if several else writing.single()

    @checked
    def forecast(self, values: Any, *, steps: int) -> Tensor:
        """The next vectors of series that a model of vectors reads: each is what it expects, and then read in its turn.

        Args:
            values: The series so far: an array, tensor or lists of one, (T, features), or of several, (N, T, features),
                scaled as the data were that the model learned from.
            steps: Vectors to come.

        Returns:
            (steps, features) or (N, steps, features).

        Raises:
            ConfigError: The model reads no vectors, or the series do not fit it.
        """
        weight = next(self.model.parameters())
        try:
            series = (values if isinstance(values, Tensor) else torch.tensor(values)).to(weight)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"the values are no array of numbers ({error}); give (T, features)") from None
        if series.dim() not in (2, 3):
            raise ConfigError(f"the values are {tuple(series.shape)}; give (T, features) or (N, T, features)")
        found = forecast(self.model, series if series.dim() == 3 else series[None], steps)
        return found if series.dim() == 3 else found[0]

    @checked
    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids that each prompt is read as; an empty one is the token that begins a text.

        Raises:
            ConfigError: There is no tokenizer, a text that it does not know, or no token to begin with.
            FileError: The token to begin with is none of the model's.
        """
        if self.vocab_size is None:
            raise ConfigError("the model reads vectors and writes no text; use forecast")
        if self.tokenizer is None:
            raise ConfigError("the model has no tokenizer; generate ids with qkv.generation.generate")
        begin = self.tokenizer.end_of_text if self.facts.begin_id is None else self.facts.begin_id
        texts = self.tokenizer.encode_batch(prompts)
        if self.facts.begins or not all(texts):
            self._check_begin(begin)
        if self.facts.begins and begin is not None:
            return [[begin, *ids] for ids in texts]
        encoded = [ids or ([] if begin is None else [begin]) for ids in texts]
        if not all(encoded):
            raise ConfigError("the prompt is empty and the tokenizer has no token to begin a text with; give a prompt")
        return encoded

    def _check_begin(self, begin: int | None) -> None:
        """Raise `FileError` where the model has no such token. Some files name one, which is never used."""
        n = self.vocab_size
        if begin is not None and n is not None and not 0 <= begin < n:
            raise FileError(
                f"the token that begins a text has the id {begin} and the model {n} tokens; fix the model's "
                "'bos_token_id' (in our own layout 'begin_id')"
            )

    def encode_chat(self, messages: str | Sequence[Message]) -> list[int]:
        """The ids that a conversation is read as, up to where the answer begins. Errors as for `chat`."""
        template, tokenizer = self._chat_parts()
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return tokenizer.encode_rendered(template.prompt(messages)).ids

    def answer(self, ids: Sequence[Sequence[int]], *, kept: Kept | None = None, **how: Unpack[HowToWrite]) -> "Writing":
        """The answers to conversations that `encode_chat` has encoded.

        They end with the model's stop ids, and with what the template writes after an answer, should those differ.

        Args:
            ids: Of each conversation, from `encode_chat`.
            kept: What was read for earlier answers of the same conversation, if it is a single one.
            how: See `HowToWrite`.
        """
        template, tokenizer = self._chat_parts()
        end = template.end_of_turn()
        special = tokenizer.special_ids(end)
        how.setdefault("max_new_tokens", 500)
        how["stop"] = (*_several(how.get("stop", ())), *([end] if end and not special else []))
        return self._write(ids, (*self.facts.stop_ids, *special), kept=kept, **how)

    def _chat_parts(self) -> tuple[ChatTemplate, Tokenizer]:
        return chat_parts(self.template, self.tokenizer)

    @checked
    def _write(
        self,
        ids: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        *,
        streams: Sequence[int] | None = None,
        kept: Kept | None = None,
        max_new_tokens: int = 100,
        stop: Stop = (),
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        beams: int | None = None,
        length_penalty: float | None = None,
        **drawing: Any,
    ) -> "Writing":
        assert self.tokenizer is not None
        streams = [0] * len(ids) if streams is None else streams  # each as if alone
        if beams is None:
            if length_penalty is not None:
                raise ConfigError(f"length_penalty={length_penalty} is of a search; give beams too, such as beams=4")
            sampling = self.sampling if sampling is None else sampling
            drawn = dataclasses.asdict(sampling) if isinstance(sampling, SamplingConfig) else dict(sampling)
            steps = generate(
                self.model,
                ids,
                max_new_tokens=max_new_tokens,
                sampling=SamplingConfig(**drawn | drawing),
                stop_ids=stop_ids,
                streams=streams,
                kept=kept,
                log_probabilities=True,
            )
        else:
            if sampling is not None or drawing:
                names = ", ".join(["sampling"] * (sampling is not None) + sorted(drawing))
                raise ConfigError(f"beams={beams} searches, and {names} is for tokens drawn by chance; leave one out")
            penalty = 1.0 if length_penalty is None else length_penalty
            how = BeamConfig(beams=beams, length_penalty=penalty, max_new_tokens=max_new_tokens)
            steps = search(self.model, ids, beams=how, stop_ids=stop_ids, ranks=streams)
        stops = _several(stop)
        return Writing(steps, [_Row(self.tokenizer.stream(row), StopFilter(stops)) for row in ids])


@final
class Writing:
    """Texts on their way. It can be gone through once: the new text of each row, step by step."""

    def __init__(self, steps: Iterator[Step], rows: "list[_Row]") -> None:
        self._steps, self._rows = steps, rows

    def __iter__(self) -> Iterator[list[str]]:
        for step in self._steps:
            drawn = zip(step.ids, step.finish, step.log_probabilities, strict=True)
            yield [row.push(*new) for row, new in zip(self._rows, drawn, strict=True)]
            if all(row.finish for row in self._rows):
                break
        yield [row.flush() for row in self._rows]

    def pieces(self) -> Iterator[tuple[int, str]]:
        """What is new, with the number of its row."""
        return ((row, piece) for new in self for row, piece in enumerate(new) if piece)

    def single(self) -> Iterator[str]:
        """The text of a single row, piece by piece."""
        return (piece for _, piece in self.pieces())

    @property
    def finish(self) -> list[Finish | None]:
        """Why each row has ended; None where it goes on."""
        return [row.finish for row in self._rows]

    @property
    def scores(self) -> list[Score]:
        """How likely the tokens of each row were."""
        return [Score(tuple(row.tokens), tuple(row.log_probabilities)) for row in self._rows]


@final
@dataclass
class _Row:
    """The text of one row of tokens."""

    text: TextStream
    stops: StopFilter
    finish: Finish | None = None
    tokens: list[str] = field(default_factory=list[str])
    log_probabilities: list[float] = field(default_factory=list[float])

    def push(self, token: int | None, finish: Finish | None, log_probability: float | None) -> str:
        if self.finish or log_probability is None:
            return ""
        self.log_probabilities.append(log_probability)
        self.tokens.append("" if token is None else self.text.push(token))
        text = self.stops.push(self.tokens[-1])
        self.finish = Finish.STOP if self.stops.stopped else finish
        return text

    def flush(self) -> str:
        rest = self.text.flush()
        if rest:
            self.tokens[-1] += rest
        return self.stops.push(rest) + self.stops.flush()


def chat_parts(template: ChatTemplate | None, tokenizer: Tokenizer | None) -> tuple[ChatTemplate, Tokenizer]:
    """What it takes to chat; `ConfigError` where one of them is missing."""
    if template is None or tokenizer is None:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise ConfigError(f"the model has no {missing} and cannot chat; take one that was trained on conversations")
    return template, tokenizer


def _conversations(
    messages: str | Sequence[Message] | list[str] | Sequence[Sequence[Message]],
) -> tuple[list[str | Sequence[Message]], bool]:
    """The conversations that are meant, and whether they were several."""
    if not isinstance(messages, str | Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        found = "a single message" if isinstance(messages, Mapping) else f"a {type(messages).__name__}"
        raise ConfigError(f"a conversation is a text or a list of messages, found {found}; give [{{...}}]")
    if isinstance(messages, str) or not messages or isinstance(messages[0], Mapping):
        return [cast("str | Sequence[Message]", messages)], False
    return list(cast("list[str] | Sequence[Sequence[Message]]", messages)), True


def _several(stop: Stop) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)
