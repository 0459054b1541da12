"""`qkv generate`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qkv.cli import STANDARD_INPUT
from qkv.cli.opening import NOTHING, DType, SamplingOptions, Whole, Width, json_line, open_model
from qkv.errors import ConfigError, FileError

if TYPE_CHECKING:
    from qkv.loading.loaded import Completion, HowToWrite, Loaded

_SEPARATOR = "─" * 40 + "\n"


def generate(
    model: str,
    prompt: str = "",
    /,
    *,
    file: Annotated[Path | None, Parameter(("--file", "-f"))] = None,
    batch_size: Whole = 8,
    as_json: Annotated[bool, Parameter("--json")] = False,
    max_new_tokens: Whole = 200,
    draw: SamplingOptions = NOTHING,
    expand: DType | None = None,
    quantize: Width | None = None,
    samples: Whole = 1,
    beams: Whole | None = None,
    length_penalty: float | None = None,
    stop: list[str] | None = None,
) -> None:
    """Let a trained model continue a text.

    The prompt and what follows go to standard output; everything else goes to standard error.

    Args:
        model: A run, a Hugging Face folder, a GGUF file, or a name that `qkv pull` knows (smollm2).
        prompt: How the text begins. Empty: the model begins a text of its own. A single dash: one prompt in each line
            of standard input.
        file: A file with one prompt in each line; in a .jsonl file, as "prompt". Empty lines do not count.
        batch_size: How many prompts of a file are read side by side.
        as_json: Print one JSON object in a line for each text: prompt, text, why it ended (stop, length, context), and
            the log-probability of its tokens under the model alone, in nats.
        max_new_tokens: How many tokens to add at most.
        draw: How tokens are drawn.
        expand: Type of all weights; packed ones are expanded to it.
        quantize: Pack the weights in memory: int8, or int4 in groups of 32; w8a8 is meant for encoders.
        samples: How many texts to write, one after the other; of a search the best ones.
        beams: Search for the likeliest text, and keep so many unfinished ones. By default tokens are drawn by chance.
        length_penalty: Of a search: 0 prefers the likeliest text, 1 (the default) the likeliest per token; more favours
            longer ones.
        stop: End the text before this string. May be given several times.
    """
    how: HowToWrite = {"max_new_tokens": max_new_tokens, "stop": stop or (), **draw.given()}
    how |= {"beams": beams, "length_penalty": length_penalty}
    prompts = _prompts(prompt, file, samples, batch_size)
    loaded = open_model(model, expand=expand, quantize=quantize)
    if prompts is None:
        _note(loaded, prompt, max_new_tokens)
        if samples == 1 and not as_json:
            pieces = loaded.stream(prompt, **how)
            print(prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
        else:
            _print(loaded.complete(prompt, n=samples, **how), as_json)
        return
    _check_lengths(loaded, prompts)
    for start in range(0, len(prompts), batch_size):
        _print(loaded.complete(prompts[start : start + batch_size], **how), as_json, begin=start == 0)


def read_standard_input() -> Iterator[str]:
    """The lines of standard input, as they come, without their ends.

    Raises:
        FileError: One is not UTF-8.
    """
    if sys.stdin is None:
        raise FileError("standard input: is closed; give a text, or a --file of them")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise FileError(f"standard input: line {number} is not UTF-8 ({error.reason}); convert it") from None


def _prompts(prompt: str, file: Path | None, samples: int, batch_size: int) -> list[str] | None:
    """The prompts of a file or of standard input, without blank lines; None: there is a single one."""
    if file is None and prompt != STANDARD_INPUT:
        return None
    if file is not None and prompt:
        raise ConfigError("there is a prompt and a --file of them; give one of the two")
    if samples != 1:
        raise ConfigError(f"--samples {samples} is for a single prompt; repeat the lines of a file instead")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size} must be at least 1")
    if file is None or file.suffix != ".jsonl" or not file.is_file():
        return [line for line in read_lines(file) if line.strip()]
    from qkv.data import FilesConfig

    prompts = [text for text in FilesConfig(path=str(file), field="prompt").documents() if text.strip()]
    if not prompts:
        raise FileError(f"{file}: holds no prompt; put one in each line")
    return prompts


def read_lines(file: Path | None) -> list[str]:
    """The lines of a text file, or of standard input where there is none; blank ones too.

    Raises:
        FileError: There is no text, or it cannot be read.
    """
    from qkv.data.sources import decode_text, read_bytes

    if file is None or str(file) == STANDARD_INPUT:
        lines, place = list(read_standard_input()), "standard input"
    elif file.is_dir() or not file.exists():
        raise FileError(
            f"{file}: {'is a folder' if file.is_dir() else 'no such file'}; give a file of texts, one a line"
        )
    else:
        lines, place = decode_text(read_bytes(file), str(file)).removesuffix("\n").split("\n"), str(file)
    if not any(line.strip() for line in lines):
        raise FileError(f"{place}: holds no text; put one in each line")
    return lines


def _check_lengths(loaded: "Loaded", prompts: list[str]) -> None:
    """Refuse a prompt that is too long before anything is written."""
    limit = loaded.config.limit
    for number, ids in enumerate(loaded.encode_prompts(prompts), 1):
        if limit is not None and len(ids) >= limit:
            raise ConfigError(
                f"prompt {number} of {len(prompts)} has {len(ids)} tokens and the context {limit}; "
                f"cut it to {limit - 1} or fewer"
            )


def _print(done: list["Completion"], as_json: bool, *, begin: bool = True) -> None:
    for place, one in enumerate(done):
        if as_json:
            finish = one.finish.name.lower() if one.finish else None
            facts = {"prompt": one.prompt, "text": one.text, "finish": finish}
            line = json_line(facts | {"log_probability": one.score.total})
        else:
            line = ("" if begin and place == 0 else _SEPARATOR) + one.prompt + one.text
        print(line, flush=True)


def _note(loaded: "Loaded", prompt: str, max_new_tokens: int) -> None:
    context = loaded.config.limit
    length = len(loaded.tokenizer.encode(prompt)) if loaded.tokenizer else 0
    if context and length < context < length + max_new_tokens:
        print(f"qkv: note: the text can have {context} tokens, the context of this model, and no more", file=sys.stderr)
