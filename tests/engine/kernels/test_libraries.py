from __future__ import annotations

import gc
import sys

import pytest

from strop.engine.kernels import warmup


def test_the_search_for_rubbish_goes_on_afterwards() -> None:
    warmup.load()
    assert gc.isenabled() and gc.get_freeze_count() > 0 and "peft" in sys.modules


def test_it_goes_on_where_a_library_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError):
        warmup.load()
    assert gc.isenabled()
