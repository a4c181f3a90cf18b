"""Imports hold in every process, whatever it has imported before: most tests' commands come from warm ones (281)."""

import ast
import json
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter

import pytest
from repository import REPOSITORY

PACKAGES = ("configs", "trainer", "privacy", "federated", "cluster")
# Those that warm processes have ready, and what these bring along. transformers finds its parts by itself; peft's are
# named in imports alone.
LIBRARIES = ("numpy", "scipy", "dp_accounting", "ray", "torch")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# Each library is imported by a process that has none of them.
RESOLVE = """
import functools, importlib, json, os, sys
for library, uses in json.load(sys.stdin).items():
    if (child := os.fork()) == 0:
        found = importlib.import_module(library)
        for use, file in uses.items():
            try:
                functools.reduce(getattr, use.split(".")[1:], found)
            except AttributeError:
                print(f"{file}: {use}", flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(f"{library}: its import has failed", flush=True)
"""


@pytest.fixture(scope="module")
def modules():
    """Every module of the program by its name, as its tree."""
    paths = [REPOSITORY / "siloweave.py", *(path for name in PACKAGES for path in (REPOSITORY / name).rglob("*.py"))]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def at_once(node):
    """What is executed when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS) or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            continue
        yield child
        yield from at_once(child)


def test_no_import_comes_back_to_a_module_that_is_not_ready(modules):
    """Without a circle, the imports that a module begins with succeed in any order; packages begin with none."""
    needed = {}
    for name, tree in modules.items():
        found = needed[name] = set()
        for node in at_once(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    TopologicalSorter({name: found & modules.keys() for name, found in needed.items()}).prepare()


def test_a_library_s_module_is_there_by_the_imports_of_the_file_that_uses_it(modules):
    """``import torch`` alone does not bring ``torch.utils.tensorboard``, which something else may have imported."""
    uses = defaultdict(dict)
    for module, tree in modules.items():
        named = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        bound = {alias.asname or top(alias.name): alias.name if alias.asname else top(alias.name) for alias in named}
        imported = tuple(f"{alias.name}." for alias in named if "." in alias.name)
        bound = {name: library for name, library in bound.items() if top(library) in LIBRARIES}
        for use in dotted(tree, bound) if bound else ():
            if not use.startswith(imported):
                uses[top(use)][use] = module
    assert len(uses["torch"]) > 50 and len(uses["ray"]) > 10
    command = [sys.executable, "-c", RESOLVE]
    done = subprocess.run(command, input=json.dumps(uses), capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.splitlines() == []


def dotted(tree, bound):
    """Names like ``torch.nn.functional`` in a file, given what its names are bound to."""
    for node in ast.walk(tree):
        first, parts = node, []
        while isinstance(first, ast.Attribute):
            parts.insert(0, first.attr)
            first = first.value
        if parts and isinstance(first, ast.Name) and first.id in bound:
            yield ".".join([bound[first.id], *parts])


def top(name):
    return name.split(".")[0]
