"""Writes the two reference pages that the code itself knows: every setting, and every command.

``make docs`` runs it; ``tests/unit/test_documents.py`` fails where a page is older than the code.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import typer
from pydantic import BaseModel

import siloweave
from configs.schema.deployment import FederationConfig, RelayConfig
from configs.schema.schema import RunConfig
from configs.schema.silo import SiloConfig
from privacy.mandate import MandateTerms

DOCS = Path(__file__).parent
_SET = """`--set group.field=value` overrides one setting. Keys and values are those of TOML, and a bare word is text:
`--set run.name=second`, `--set 'privacy.evaluation_labels=["yes", "no"]'`, `--set 'federated.lora_ranks={north = 2}'`
(in place of the whole table), `--set 'data.private.public_record_counts."St. Mary"=100'` (one entry of it)."""
FILES: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("A run", f"`-c FILE` of every command of a run. {_SET}", RunConfig),
    ("A silo", "`silo.toml` of `siloweave silo`. The steward of the silo writes it.", SiloConfig),
    ("A mandate", "What `siloweave silo mandate add` reads. The steward of a silo writes it.", MandateTerms),
    ("A federation", "`federation.toml`. `siloweave federation init` writes it.", FederationConfig),
    ("A relay", "`relay.toml` of `siloweave silo relay`.", RelayConfig),
)
_HEADER = """Unknown settings are errors. A setting without a default has to be given. A relative path is below the
folder of the file that holds it; with `--set`, and in a preset, below the folder where the command is given.
[Start](index.md#where-files-are) has more."""
_HEAD = "<!-- Written by docs/generate.py (`make docs`): change the docstrings in the code instead. -->\n"
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_KINDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "none"}


def pages() -> dict[str, str]:
    """Each generated page by its file name."""
    return {"settings.md": settings_page(), "commands.md": commands_page()}


def settings_page() -> str:
    """Every setting of the five kinds of files, from the schema's own docstrings."""
    lines = [_HEAD, "# Settings", "", _HEADER, ""]
    for title, purpose, schema in FILES:
        lines += [f"## {title}", "", purpose, ""]
        tree = schema.model_json_schema()
        for name, group in _groups("", tree, tree.get("$defs", {})):
            lines += [f"### `[{name}]`", "", _prose(group["description"]), ""] if name else []
            lines += ["| setting | value | default | what it is |", "|---|---|---|---|", *_rows(group), ""]
    return "\n".join(lines).rstrip() + "\n"


def _groups(name: str, group: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A group of settings and those below it, by their names in a file."""
    fields = group["properties"].items()
    below = {field: definitions[_reference(value)] for field, value in fields if _reference(value)}
    listed = {field: _reference(value["items"]) for field, value in fields if "items" in value}
    own = {field: value for field, value in group["properties"].items() if field not in below}
    if own:
        yield name, {**group, "properties": own}
    for field, reference in listed.items():
        if reference:
            yield f"[{name}.{field}]", definitions[reference]
    for field, inner in below.items():
        yield from _groups(f"{name}.{field}".lstrip("."), inner, definitions)


def _reference(value: Mapping[str, Any]) -> str:
    """The group's name where the value is a group, also one that may be left out."""
    choices = (value, *value.get("anyOf", ()))
    return next((str(choice["$ref"]).rpartition("/")[2] for choice in choices if "$ref" in choice), "")


def _rows(group: Mapping[str, Any]) -> Iterator[str]:
    for name, field in group["properties"].items():
        default = "" if name in group.get("required", ()) else _value(field.get("default", {}))
        yield f"| `{name}` | {_kind(field)} | {default} | {_cell(_prose(field['description']))} |"


def _kind(field: Mapping[str, Any]) -> str:
    """What a setting may be, in words."""
    if "anyOf" in field:
        return " or ".join(_kind(choice) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
    if field["type"] == "array" and _reference(field["items"]):
        return "groups, in their order"
    if field["type"] == "array":
        return f"list of: {_kind(field['items'])}"
    if field["type"] == "object":
        inner = next(iter(field.get("patternProperties", {}).values()), field.get("additionalProperties", {}))
        return "groups by name" if _reference(inner) else f"by name: {_kind(inner)}"
    bounds = [f"{words} {field[bound]}" for bound, words in _BOUNDS.items() if bound in field]
    return ", ".join([_KINDS[field["type"]], *bounds])


def _value(default: Any) -> str:
    """A default as TOML has it."""
    if default is None or default == {}:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    quote = "'" if "\\" in str(default) else '"'
    text = f"{quote}{default}{quote}" if isinstance(default, str) else str(default).replace("'", quote)
    return _cell(f"`{text}`")


def _prose(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`").replace("\\[", "[")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands_page() -> str:
    """Every command with its arguments and options, from the command line's own help."""
    app = typer.main.get_command(siloweave.app)
    lines = [_HEAD, "# Commands", ""]
    lines += [
        "Exit status of every command: 0; 1 the run failed; 2 the input is wrong; 3 refused by a privacy policy;",
        "130 and 143 ended by SIGINT or SIGTERM.",
        "`siloweave --debug COMMAND` shows a traceback when something fails. `--help` works after each command.",
        "",
    ]
    for name, command, context in _commands("siloweave", app, None):
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        lines += [f"## `{name}`", "", _paragraphs(command.help or ""), "", f"```text\n{usage}\n```", ""]
        records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
        rows = [f"| `{_cell(names)}` | {_cell(_prose(words))} |" for names, words in records]
        lines += ["| parameter | what it does |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(lines).rstrip() + "\n"


def _commands(
    name: str, command: click.Command, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    """All commands that do something by themselves, in the order of the help."""
    context = click.Context(command, info_name=name.rpartition(" ")[2], parent=parent)
    if not isinstance(command, click.Group):
        yield name, command, context
        return
    if command.invoke_without_command:
        yield name, command, context
    for inner in command.list_commands(context):
        yield from _commands(f"{name} {inner}", command.commands[inner], context)


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def main() -> None:
    """Writes the pages."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
