"""What the documents name exists."""

import ast
import re

import pytest
from repository import REPOSITORY

NAMED = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


def functions_of(path):
    tree = ast.parse((REPOSITORY / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", ["privacy.md", "conformance.md"])
def test_every_test_that_a_document_names_exists(document):
    named = NAMED.findall((REPOSITORY / "docs" / document).read_text())
    assert named
    missing = [f"{path}::{name}" for path, name in named if name not in functions_of(path)]
    assert not missing


def test_every_pitfall_names_a_test():
    text = (REPOSITORY / "docs" / "privacy.md").read_text().split("## Pitfalls, by severity")[1]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| pitfall")]
    assert len(rows) > 20
    assert not [row for row in rows if not NAMED.search(row)]
