"""``siloweave generate``."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.stages import ConfigOption, JsonOption, SetOption, with_run
from configs.errors import InputError
from configs.load import load
from configs.printing import say, stream, to_json

DecodeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="How tokens are chosen: max_new_tokens, temperature (0: the likeliest), top_k, top_p, repetition_penalty, "
        "beams, stop (a text that ends it; may be repeated) or seed. May be repeated.",
    ),
]


def generate(
    config: ConfigOption = "demo",
    override: SetOption = None,
    prompt: Annotated[str | None, typer.Option(help="Start of the text. Default: evaluate.prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with a prompt on each line; each is answered by itself, in order.")
    ] = None,
    decode: DecodeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Streams what the final model writes.

    Without options it draws evaluate.sample_tokens at evaluate.temperature from the 50 likeliest tokens with 0.95 of
    the probability, by run.seed.
    """
    from cluster import pipeline
    from trainer.inference.decoding import with_settings

    settings = load(config, override or [])
    decoding = with_settings(pipeline.sample_decoding(settings), decode or [])
    asked = _asked(prompt, prompts)

    def on_text(text: str) -> None:
        if not as_json:
            stream(text)

    texts, _ = with_run(settings, lambda run: pipeline.generate(run, on_text, asked, decoding), as_json, quiet=True)
    if as_json:
        say(to_json({"texts": texts} if prompts else {"text": "".join(texts)}))


def _asked(prompt: str | None, prompts: Path | None) -> list[str]:
    from trainer.data.reading.counts import ReadCounts, mended

    if prompts is None:
        return [mended(prompt, ReadCounts())] if prompt else []
    if prompt is not None:
        raise InputError("--prompt and --prompts: both are given; give one of them")
    return lines_of(prompts)


def lines_of(path: Path) -> list[str]:
    """The lines of a file with text in them, read as data is: its encoding found, broken characters mended.

    Raises:
        InputError: it can't be read, or holds no text.
    """
    from trainer.data.reading.counts import ReadCounts, mended
    from trainer.data.reading.encodings import read_lines
    from trainer.data.reading.files import opened

    with opened(path) as file:
        found = [line for text in read_lines(file, str(path), "utf-8", "\n") if (line := text.strip("\r\n")).strip()]
    if not found:
        raise InputError(f"{path}: holds no text; give a file with a text on each line")
    return [mended(line, ReadCounts()) for line in found]
