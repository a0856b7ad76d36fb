"""Flash attention 3: taken where it is there and right, and left where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from strop.engine.kernels.cuda import flash

CARD = torch.device("cuda", 0)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hopper card, and a flash attention 3 that is `off` by this much, or raises it."""
    state: dict[str, Any] = {"now": None, "off": 0.0, "told": []}

    def activate(name: str) -> None:
        state["now"] = name
        if isinstance(state["off"], Exception):
            raise state["off"]

    def trial(device: torch.device) -> list[torch.Tensor]:
        return [torch.zeros(2), torch.ones(3) + (state["off"] if state["now"] else 0.0)]

    known: Any = torch.nn.attention
    monkeypatch.setattr(known, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(known, "restore_flash_attention_impl", lambda: state.update(now=None), raising=False)
    monkeypatch.setattr(known, "list_flash_attention_impls", lambda: ["FA3"], raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "find_spec", lambda name: object())
    monkeypatch.setattr(flash, "_trial", trial)
    flash.why_not.cache_clear()
    return state


def test_it_is_taken_where_its_numbers_are_right(attention: dict[str, Any]) -> None:
    attention["off"] = 0.01
    assert flash.why_not(CARD) is None and attention["now"] == "FA3"


@pytest.mark.parametrize(
    ("off", "why"),
    [
        (0.5, "its numbers are wrong here"),
        (float("nan"), "its numbers are wrong here"),
        (OSError("no symbol"), "no symbol"),
    ],
)
def test_it_is_left_where_it_does_not_work(
    attention: dict[str, Any], off: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    attention["off"] = off
    assert flash.why_not(CARD) == why and attention["now"] is None
    assert why in caplog.text


def test_it_is_not_looked_for_where_it_cannot_be(attention: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    assert flash.why_not(CARD) == "it is not installed"
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", list, raising=False)
    flash.why_not.cache_clear()
    assert flash.why_not(CARD) == "this PyTorch does not know of it"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    flash.why_not.cache_clear()
    assert flash.why_not(CARD) == "it is for Hopper" and attention["now"] is None


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    yield
    flash.why_not.cache_clear()
