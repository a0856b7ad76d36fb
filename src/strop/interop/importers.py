"""The tools whose configs can be imported, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from strop.errors import RecipeError, nearest
from strop.interop import axolotl, llamafactory, torchtune, trl
from strop.interop.draft import Draft, Imported

IMPORTERS: Mapping[str, Callable[[Path], Draft]] = {
    "axolotl": axolotl.read,
    "llamafactory": llamafactory.read,
    "trl": partial(trl.read, peer="trl"),
    "unsloth": partial(trl.read, peer="unsloth"),
    "torchtune": torchtune.read,
}


def import_config(peer: str, path: Path) -> Imported:
    """Import another tool's config as a recipe, with a note on every key that differs or is left out.

    Raises:
        RecipeError: for an unknown tool, or a value that strop does not accept.
        InputError: if the file is not a config of this tool, or trains in a way strop does not support.
    """
    if peer not in IMPORTERS:
        raise RecipeError(
            f"{peer}: not a tool that strop imports from{nearest(peer, IMPORTERS)}", fix=f"give {', '.join(IMPORTERS)}"
        )
    return IMPORTERS[peer](path).finish()
