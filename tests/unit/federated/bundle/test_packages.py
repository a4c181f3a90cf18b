"""Wheels of what is installed: pip installs the same files from them, and nothing that was changed gets in."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from configs.errors import InputError
from federated.bundle.packages import required, write_wheel

PACKED = ("fonttools", "ninja", "typer")  # manual pages and commands, a program that is no entry point, dependencies


def files_of(distribution):
    """What a wheel decides: neither byte code nor what pip makes, such as the first line of a command."""
    (site,) = {Path(str(distribution.locate_file("")))}
    return {
        str(file): file.hash.value
        for file in distribution.files
        if file.hash
        and file.suffix != ".pyc"
        and file.name not in {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
        if not (site / file).read_bytes().startswith(b"#!") or "bin" not in file.parts
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An environment that pip has made of our wheels alone."""
    root = tmp_path_factory.mktemp("packed")
    for distribution in {each.name: each for name in PACKED for each in required(name)}.values():
        write_wheel(distribution, root)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "site"], check=True)
    offline = ("--quiet", "--no-index", f"--find-links={root}", "--disable-pip-version-check")
    pip = [sys.executable, "-m", "pip", "--python", str(root / "site" / "bin" / "python"), "install", *offline]
    subprocess.run([*pip, *PACKED], check=True)
    return root / "site"


def installed_at(site):
    (packages,) = (site / "lib").glob("python*/site-packages")
    return {found.name: found for found in importlib.metadata.distributions(path=[str(packages)])}


def test_pip_installs_the_files_that_were_here(site):
    there = installed_at(site)
    assert set(PACKED) <= set(there)
    assert {found.name for name in PACKED for found in required(name)} == set(there)
    for name in there:
        assert files_of(there[name]) == files_of(importlib.metadata.distribution(name)), name


def test_programs_run_where_they_were_installed(site):
    said = subprocess.run([site / "bin" / "ninja", "--version"], capture_output=True, text=True, check=True).stdout
    assert importlib.metadata.version("ninja").startswith(said.strip().split(".git")[0])
    subprocess.run([site / "bin" / "typer", "--help"], capture_output=True, check=True)


def test_equal_environments_make_equal_wheels(site, tmp_path):
    for distribution in installed_at(site).values():
        again = write_wheel(distribution, tmp_path)
        assert again.read_bytes() == (site.parent / again.name).read_bytes()


def test_a_file_that_was_changed_is_refused_and_one_that_is_gone(site, tmp_path):
    distribution = installed_at(site)["typer"]
    changed = Path(str(distribution.locate_file("typer/main.py")))
    content = changed.read_bytes()
    try:
        changed.write_bytes(content + b"\n")
        with pytest.raises(InputError, match=r"typer/main\.py: was changed since typer-.* was installed"):
            write_wheel(distribution, tmp_path)
        changed.unlink()
        with pytest.raises(InputError, match=r"typer/main\.py: can't be read"):
            write_wheel(distribution, tmp_path)
    finally:
        changed.write_bytes(content)


def test_what_is_not_here_is_named_by_who_needs_it(site, tmp_path):
    with pytest.raises(InputError, match="no-such-package: no-such-package needs it"):
        required("no-such-package")
    with pytest.raises(InputError, match="typer: has no extra 'more'"):
        required("typer", ("more",))
    with pytest.raises(InputError, match=r"siloweave.*(runs from a working folder|not installed by pip)"):
        write_wheel(importlib.metadata.distribution("siloweave"), tmp_path)


def test_extras_bring_what_they_ask_for():
    plain = {found.name for found in required("fsspec")}
    assert "aiohttp" not in plain
    assert plain | {"aiohttp"} <= {found.name for found in required("fsspec", ("http",))}


def test_names_and_tags_are_those_that_pip_reads(site):
    for wheel in site.parent.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            assert archive.testzip() is None
            assert [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
