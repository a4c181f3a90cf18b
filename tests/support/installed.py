"""Siloweave as its users get it: built to a wheel, and installed where nothing of this checkout can be found."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from repository import REPOSITORY


def packages() -> set[str]:
    """The top-level modules that a wheel has to hold."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    return {name.split(".")[0] for name in [*listed["packages"], *listed["py-modules"]]}


def outside_the_checkout() -> dict[str, str]:
    """This process's environment without what leads to the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def install(folder: Path) -> Path:
    """Builds a wheel, and makes an environment of it and of the dependencies that are installed here.

    Nothing is fetched, and the checkout stays as it is: what a build leaves there would be part of the next one.

    Returns:
        The environment's programs.
    """
    source, environment = folder / "source", folder / "environment"
    source.mkdir(parents=True)
    for name in packages() - {"siloweave"}:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "docs", source / "docs")
    for name in ("siloweave.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, source / name)
    offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", f"--wheel-dir={folder}", str(source))
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    (wheel,) = folder.glob("siloweave-*.whl")
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", *offline, str(wheel))
    # A path that stands in a .pth is searched last, and the .pth in it are not read: one is the checkout's own.
    found = [path for path in sys.path if Path(path).name == "site-packages"]
    place = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(place, "dependencies.pth").write_text("".join(f"{path}\n" for path in found))
    return environment / "bin"


def _run(*command: str) -> None:
    done = subprocess.run(command, env=outside_the_checkout(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
