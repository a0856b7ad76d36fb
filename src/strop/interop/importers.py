"""The tools whose configs are read, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from strop.errors import RecipeError, nearest
from strop.interop import axolotl, llamafactory, torchtune, trl
from strop.interop.draft import Draft, Imported

PEERS: Mapping[str, Callable[[Path], Draft]] = {
    "axolotl": axolotl.read,
    "llamafactory": llamafactory.read,
    "trl": partial(trl.read, peer="trl"),
    "unsloth": partial(trl.read, peer="unsloth"),
    "torchtune": torchtune.read,
}


def import_config(peer: str, path: Path) -> Imported:
    """A config of another tool as a recipe, and what became of each of its keys.

    Raises RecipeError for a tool that is not known and for values that strop cannot take, InputError for a file that is
    not such a config or trains in a way that strop does not.
    """
    if peer not in PEERS:
        raise RecipeError(
            f"{peer}: no tool that can be imported from{nearest(peer, PEERS)}", fix=f"give {', '.join(PEERS)}"
        )
    return PEERS[peer](path).finish()
