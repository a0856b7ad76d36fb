"""A decoder for a model that is at hand, kept with it as long as its weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from strop.engine.decode.batch import Batch
from strop.engine.decode.cache import BLOCK, ROWS, blocks_for
from strop.engine.decode.decoder import Decoder, position_bytes
from strop.engine.decode.sampling import Text
from strop.errors import ModelError
from strop.machine.probe import probe

SHARE = 0.5  # of the memory that is free, at most for keys and values
_PLACE = "_strop_decoder"


def batch_for(model: nn.Module, texts: Sequence[Text]) -> Batch:
    """A batch that these texts fit into: as many together as memory has room for, and ROWS at most.

    Raises ModelError where memory has no room for one of them.
    """
    blocks = sorted((blocks_for(text.room) for text in texts), reverse=True)
    a_block = BLOCK * position_bytes(model)
    has = _held(model)
    free = int(probe().free_bytes * SHARE) // a_block + (has.blocks.count if has else 0)
    rows = max((n for n in range(1, min(ROWS, len(blocks)) + 1) if sum(blocks[:n]) <= free), default=0)
    if not rows:
        need = blocks[0] * a_block / 2**30
        raise ModelError(f"no memory for the keys and values of a text: {need:.2f} GiB", fix="ask for shorter answers")
    wanted = sum(blocks[:rows])
    if has is None or has.blocks.count < wanted:
        setattr(model, _PLACE, None)  # the old cache goes before the new one comes
        has = Decoder(model, wanted * BLOCK)
        setattr(model, _PLACE, (_state(model), has))
    return Batch(has, rows)


def let_go(model: nn.Module) -> None:
    """The decoder that is kept for a model, if there is one, and its cache go."""
    setattr(model, _PLACE, None)


def _held(model: nn.Module) -> Decoder | None:
    state, decoder = getattr(model, _PLACE, None) or (None, None)
    if decoder is not None and state != _state(model):
        setattr(model, _PLACE, None)
        return None
    return decoder


def _state(model: nn.Module) -> list[tuple[int, int]]:
    """Changes when a weight is changed or replaced."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
