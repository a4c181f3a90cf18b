"""The wheel: it has made the session's tiny run, in a folder that was empty, and here is seen that it was the wheel."""

import json
import subprocess
import sys
import tomllib
import zipfile

from installed import outside_the_checkout, packages
from repository import REPOSITORY

WHERE = """
import importlib, json, sys
print(json.dumps([importlib.import_module(name).__file__ for name in sys.argv[1:]]))
"""


def test_the_tiny_run_was_made_by_what_the_wheel_has_installed(tiny_run):
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = [*listed["packages"], *listed["py-modules"]]
    command = [str(tiny_run.programs / "python"), "-P", "-c", WHERE, *modules]
    done = subprocess.run(
        command, cwd=tiny_run.root, env=outside_the_checkout(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    environment = str(tiny_run.programs.parent)
    assert [path for path in json.loads(done.stdout) if not path.startswith(environment)] == []
    first = (tiny_run.programs / "siloweave").read_text().splitlines()[0]
    assert first == f"#!{tiny_run.programs / 'python'}"  # and so was the command that has made the run
    assert first != f"#!{sys.executable}"
    assert {path.name for path in tiny_run.root.iterdir()} == {"runs", "state"}


def test_the_wheel_holds_every_file_of_its_packages_and_nothing_else(tiny_run):
    (wheel,) = tiny_run.programs.parents[1].glob("siloweave-*.whl")
    with zipfile.ZipFile(wheel) as files:
        held = {name for name in files.namelist() if ".dist-info/" not in name and ".data/" not in name}
    kept = {".py", ".pyi", ".j2", ".toml", ".proto"}
    mine = {
        path.relative_to(REPOSITORY).as_posix()
        for name in packages() - {"siloweave"}
        for path in (REPOSITORY / name).rglob("*")
        if path.suffix in kept
    }
    assert mine <= held
    assert {name.split("/")[0].removesuffix(".py") for name in held} == packages()
