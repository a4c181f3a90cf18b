"""Large imports leave Python's collector as it was."""

import gc
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
    frozen = gc.get_freeze_count()
    sys.modules["large_module"] = module
    import_large("large_module")
    assert gc.get_freeze_count() == frozen
    del sys.modules["large_module"]
