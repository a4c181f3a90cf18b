"""``siloweave chat``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.generate import DecodeOption
from cluster.commands.stages import quiet_libraries
from configs.ending import came_through
from configs.errors import InputError
from configs.load import load
from configs.printing import say, stream

if TYPE_CHECKING:
    from trainer.inference.decoding import Decoding
    from trainer.inference.dialogue import Dialogue

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run's directory, an adapter/ in one, or a merged model's folder.")
]
ElsewhereOption = Annotated[
    str, typer.Option("--config", "-c", help="The run's settings, for a merged model outside of its run.")
]


def chat(model: ModelArgument, config: ElsewhereOption = "", decode: DecodeOption = None) -> None:
    """Talks with a finished run's model in the terminal. `/reset` forgets what was said, `/exit` ends; so does Ctrl-D.

    Ctrl-C interrupts an answer. Up to 256 tokens are drawn at temperature 0.7 from 0.95 of the probability, if
    `--decode` says nothing else.
    """
    quiet_libraries()
    from cluster.finished import finished_model
    from trainer.inference.decoding import Decoding, with_settings
    from trainer.inference.dialogue import Dialogue

    decoding = with_settings(Decoding(256, temperature=0.7, top_p=0.95), decode or [])
    found = finished_model(model, load(config) if config else None)
    dialogue = Dialogue(found.model, found.tokenizer, found.task)
    say(found.privacy)
    if dialogue.plain:
        say("the model has no chat template: turns are lines that begin with User: and Assistant:")
    say("/reset forgets what was said, /exit ends, Ctrl-C interrupts an answer")
    while (said := _asked()) is not None and said != "/exit":
        if said == "/reset":
            dialogue.reset()
            say("forgotten")
        elif said:
            _answer(dialogue, said, decoding)


def _asked() -> str | None:
    """A line of the person's; None at the end of the input. Bytes that are no text are replaced."""
    stream("> ")
    try:
        return input().encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
    except EOFError:
        stream("\n")
        return None


def _answer(dialogue: "Dialogue", said: str, decoding: "Decoding") -> None:
    try:
        dialogue.answer(said, decoding, stream)
    except KeyboardInterrupt:
        came_through()
        stream(" (interrupted)")
    except InputError as error:  # the line is too long: the dialogue goes on
        say(f"error: {error}", err=True)
        return
    stream("\n")
