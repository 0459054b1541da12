"""`qkv chat`."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from qkv.cli.generate import read_standard_input
from qkv.cli.opening import NOTHING, DType, SamplingOptions, Whole, Width, open_model
from qkv.errors import ConfigError

if TYPE_CHECKING:
    from qkv.loading.conversation import Conversation

_HELP = """\
/reset         forget what was said
/system TEXT   begin anew under another instruction; without TEXT: show the present one
/help          these lines
/exit          leave (as Ctrl-D, and Ctrl-C where nothing is being written)
Ctrl-C         stop the answer"""
_PROMPT = "> "


def chat(
    model: str,
    /,
    *,
    system: str | None = None,
    max_new_tokens: Whole = 1000,
    draw: SamplingOptions = NOTHING,
    expand: DType | None = None,
    quantize: Width | None = None,
) -> None:
    """Talk with a model that was trained on conversations.

    In a terminal, /help says what can be done besides talking. Where standard input is a file or a pipe, each of its
    lines is a message, and nothing but the answers is written.

    Args:
        model: A run, a Hugging Face folder, a GGUF file, or a name that `qkv pull` knows (smollm2).
        system: An instruction that stands before the conversation.
        max_new_tokens: Tokens of an answer at most.
        draw: How tokens are drawn.
        expand: Type of all weights; packed ones are expanded to it.
        quantize: Pack the weights in memory: int8, or int4 in groups of 32; w8a8 is meant for encoders.
    """
    from qkv.checkpoints import peft
    from qkv.data.chat import template_of
    from qkv.loading.conversation import Conversation
    from qkv.loading.loaded import chat_parts
    from qkv.loading.names import find
    from qkv.loading.ready import tokenizer_in

    given = draw.given()
    folder = find(model)
    tokenizer = None if (folder / peft.CONFIG).exists() else tokenizer_in(folder)  # that of adapters is their base's
    if tokenizer is not None:
        chat_parts(template_of(tokenizer), tokenizer)  # refuses before weights are read
    loaded = open_model(model, expand=expand, quantize=quantize)
    sampling = replace(loaded.sampling, **given)
    conversation = Conversation(loaded, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
    if sys.stdin.isatty():
        _talk(conversation)
        return
    for question in read_standard_input():
        if question.strip():
            _answer(conversation, question)


def _talk(conversation: "Conversation") -> None:
    """The conversation in a terminal, until it is left."""
    print("Talk; /help for help, /exit to leave.")
    for line in _typed():
        word, _, rest = line.strip().partition(" ")
        match word:
            case "":
                pass
            case "/exit" | "/quit":
                return
            case "/help":
                print(_HELP)
            case "/reset":
                conversation.begin(conversation.system)
                print("(begun anew)")
            case "/system" if rest.strip():
                conversation.begin(rest.strip())
                print("(begun anew under this instruction)")
            case "/system":
                print(conversation.system or "(no instruction)")
            case _ if word.startswith("/"):
                print(f"({word} is not known; /help lists what is)")
            case _:
                _try_to_answer(conversation, line)


def _typed() -> Iterator[str]:
    """The lines that are typed, until Ctrl-D. Ctrl-C while typing leaves the program, as everywhere."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` lets edit the line, and knows those before
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print("(that was not UTF-8)")
        except KeyboardInterrupt:
            print()
            raise


def _try_to_answer(conversation: "Conversation", question: str) -> None:
    try:
        _answer(conversation, question)
    except ConfigError as error:
        print(f"({error})")
    except KeyboardInterrupt:
        print(" (stopped)")


def _answer(conversation: "Conversation", question: str) -> None:
    from qkv.generation import Finish

    with closing(conversation.ask(question)) as pieces:
        if conversation.dropped:
            _note(f"the context is full: the oldest {conversation.dropped} messages were dropped")
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)
    if conversation.finish in (Finish.LENGTH, Finish.CONTEXT):
        _note(f"the answer is cut: {conversation.finish.value}")


def _note(text: str) -> None:
    print(f"qkv: note: {text}", file=sys.stderr)
