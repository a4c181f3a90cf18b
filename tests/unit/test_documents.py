"""What the documents name exists: tests, files, commands with their options; the generated pages are those of today."""

import ast
import importlib.util
import re
import shlex

import pytest
import typer
from repository import REPOSITORY

DOCS = REPOSITORY / "docs"
DOCUMENTS = sorted([*DOCS.glob("*.md"), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"])
NAMED = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
ROOTS = "cluster|configs|federated|privacy|trainer|tests|benchmarks|docs"
PATHS = re.compile(rf"`((?:{ROOTS})/[\w/.-]*)`")
LINKS = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def named_by(path):
    return path.name


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named_by)


def functions_of(path):
    tree = ast.parse((REPOSITORY / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", ["privacy.md", "conformance.md"])
def test_every_test_that_a_document_names_exists(document):
    named = NAMED.findall((DOCS / document).read_text())
    assert named
    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(path)]
    assert not missing


def test_every_pitfall_names_a_test():
    text = (DOCS / "privacy.md").read_text().split("## Pitfalls, by severity")[1]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| pitfall")]
    assert len(rows) > 20
    assert not [row for row in rows if not NAMED.search(row)]


def test_tests_that_are_named_by_their_name_alone_exist():
    """As the threat model and the guides name them: `test_silo.py` is a file, `test_of_one_thing` a function."""
    files = list((REPOSITORY / "tests").rglob("test_*.py"))
    known = {path.name for path in files} | {name for path in files for name in functions_of(path)}
    named = {name for document in DOCUMENTS for name in re.findall(r"`(test_\w+(?:\.py)?)`", document.read_text())}
    assert len(named) > 80
    assert named - known == set()


@every_document
def test_every_file_that_a_document_names_exists(document):
    missing = [name for name in PATHS.findall(document.read_text()) if not (REPOSITORY / name).exists()]
    assert not missing


@every_document
def test_every_link_leads_somewhere(document):
    """`mkdocs build --strict` looks at the pages' links and anchors; this looks at README and CONTRIBUTING, too."""
    missing = [link for link in LINKS.findall(document.read_text()) if not (document.parent / link).exists()]
    assert not missing


def test_every_decision_keeps_its_number():
    """Other files refer to decisions by number: each is there once, wherever it stands."""
    numbers = [int(number) for number in re.findall(r"^\*\*(\d+)\.", (DOCS / "decisions.md").read_text(), re.MULTILINE)]
    assert len(numbers) >= 132
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


def command_lines(document):
    """Every siloweave command line in a document's code blocks."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            for part in line.split("  #")[0].split(";"):
                if found := re.match(r"(?:.*[$#] +|.*&& )?\s*(siloweave .*)", part):
                    yield shlex.split(found[1])[1:]


def parsed(arguments):
    """The context of the innermost command, its options and arguments checked."""
    import siloweave

    command = typer.main.get_command(siloweave.app)
    while hasattr(command, "commands") and arguments and arguments[0] in command.commands:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    context = command.make_context(command.name, list(arguments))
    if command.name == "submit":  # what comes after `--` is a command as well
        parsed(context.params["command"])
    return context


def test_every_command_in_a_code_block_exists_with_its_options():
    found = [line for document in DOCUMENTS if document.name != "commands.md" for line in command_lines(document)]
    assert len(found) > 40
    for arguments in found:
        assert parsed(arguments)


def test_every_command_in_a_sentence_exists():
    import siloweave

    app = typer.main.get_command(siloweave.app)
    for document in DOCUMENTS:
        for words in re.findall(r"`siloweave ([a-z][^`]*)`", document.read_text()):
            command, rest = app, words.split()
            while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
                assert rest[0] in command.commands, f"{document.name}: siloweave {words}"
                command, rest = command.commands[rest[0]], rest[1:]


def generated():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_the_generated_pages_are_those_of_today():
    """Where this fails: `make docs`, and commit what it changed."""
    pages = generated()
    assert pages["settings.md"].count("\n| `") > 150
    assert pages["commands.md"].count("\n## `siloweave") > 35
    for name, text in pages.items():
        assert (DOCS / name).read_text() == text, f"docs/{name} is older than the code: make docs"
