"""Large imports leave Python's collector as it was."""

import gc
import os
import subprocess
import sys

import pytest

from configs.imports import import_large, uncollected


def test_what_an_import_makes_is_frozen_and_the_collector_is_as_before():
    before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)


def test_a_failed_import_leaves_the_collector_at_work():
    with pytest.raises(ModuleNotFoundError):
        import_large("siloweave_has_no_such_module")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_modules_are_imported_once(monkeypatch, tmp_path):
    (tmp_path / "large_module.py").write_text("import gc\nasked = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_large("large_module")
    module = sys.modules.pop("large_module")
    assert not module.asked
    frozen, kept = gc.get_freeze_count(), [[] for _ in range(1000)]
    sys.modules["large_module"] = module
    import_large("large_module")
    assert gc.get_freeze_count() < frozen + len(kept)  # some that are frozen may be freed meanwhile
    del sys.modules["large_module"]


READS = """
import builtins, collections, sys
opened, real = collections.Counter(), builtins.open

def counted(file, *rest, **options):
    opened[str(file)] += 1
    return real(file, *rest, **options)

builtins.open = counted
from configs.imports import import_large

import_large("transformers", "transformers.models.llama.modeling_llama")
from transformers import LlamaConfig

read = [number for file, number in opened.items() if "/transformers/models/" in file]
print(len(read) > 1000, sum(number > 1 for number in read) < 50, LlamaConfig.model_type)
"""


def test_transformers_reads_the_files_of_its_models_once():
    """Before: twice, which took every process with a model some tenths of a second. A model's own are read again."""
    done = subprocess.run(
        [sys.executable, "-c", READS], env=os.environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout.split(), done.returncode) == (["True", "True", "llama"], 0), done.stderr
