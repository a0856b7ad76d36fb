"""Predict the work of a model's image encoder, from the shapes in its weight files and a sample of the images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from strop.config.schema import Recipe
from strop.data.images import MAX_TOWER_OUTPUTS
from strop.data.rendering.image_encoder import ImageEncoder
from strop.data.types import Image
from strop.models.adapter_config import IN_TOWER
from strop.models.source import Source, read_headers

SAMPLED_IMAGES = 32
TRAINED_PASSES = 3  # of an encoder with adapters: forward, again in the backward pass, and the gradient of its inputs
_TABLE = re.compile(r"pos(ition)?_embed")  # of positions, which are added without a matmul
_PATCH_WEIGHT = re.compile(r"patch_(emb|conv).*weight$")  # (hidden, values of a patch), the latter in 1 to 4 dimensions
_LAYER = re.compile(r"\.(?:layers?|blocks?)\.(\d+)\.")
_MERGER = "merger"  # in the names of projectors that are in the encoder, of Qwen's and GLM's models; they join patches


@dataclass(frozen=True)
class ImageLoad:
    """The images of the rows.

    images: number of distinct ones. flops: of one pass of the encoder over them, or None if its layers have
    unknown names. patches: of the largest one, or 0 likewise. in_tower: whether the projector is a part of the encoder.
    """

    images: int
    flops: float | None = None
    patches: int = 0
    in_tower: bool = False

    @staticmethod
    def measure(encoder: ImageEncoder | None, source: Source) -> ImageLoad | None:
        """Return the images that the rows of a tokenizer have, or None without images."""
        if encoder is None or not encoder.table.images:
            return None
        images, entries = encoder.table.images, (x for _, header in read_headers(source.path) for x in header.items())
        shapes = {name: entry["shape"] for name, entry in entries if IN_TOWER.search(name) and not _TABLE.search(name)}
        patch = next((shape for name, shape in shapes.items() if _PATCH_WEIGHT.search(name) and len(shape) > 1), None)
        if patch is None:
            return ImageLoad(len(images))
        vision = source.config().get("vision_config") or {}
        joined = int(vision.get("spatial_merge_size") or 1) ** 2
        weights = sum(math.prod(shape) / (joined if _MERGER in name else 1) for name, shape in shapes.items())
        attention = 4.0 * patch[0] * _count_full_attention(shapes, vision)  # for each pair of patches of a part

        def count_patches(image: Image) -> tuple[int, int]:
            """Return the patches, and into how many parts, which do not attend to each other, they are divided."""
            pixels = encoder.pixel_shape(image.width, image.height)
            parts = pixels[:-3] if len(pixels) > 3 else pixels[:-2]  # before channel, height, width or patch, values
            return math.prod(pixels) // math.prod(patch[1:]), math.prod(parts)

        sample = images[:: -(-len(images) // SAMPLED_IMAGES)]
        counts = [count_patches(image) for image in sample]
        flops = sum(2.0 * weights * patches + attention * patches**2 / parts for patches, parts in counts)
        patches, _ = count_patches(max(images, key=lambda image: image.width * image.height))
        in_tower = any(_MERGER in name for name in shapes)
        return ImageLoad(len(images), flops * len(images) / len(sample), patches, in_tower)

    def passes(self, recipe: Recipe, rows: float) -> float:
        """Return the passes of the encoder over each image in a run: one, or some in each epoch if it is not kept."""
        vision, train = recipe.lora.vision, cast(Any, recipe.train)
        if vision == "none" or (vision == "projector" and not self.in_tower and self.images <= MAX_TOWER_OUTPUTS):
            return 1.0
        epochs = float(train.epochs) if train.max_steps is None else max(1.0, train.max_steps * train.batch_size / rows)
        return epochs * (TRAINED_PASSES if vision == "all" else 1)


def _count_full_attention(shapes: Mapping[str, list[int]], vision: Mapping[str, Any]) -> int:
    """Return the number of encoder layers whose patches attend to all patches of an image or of a part of it."""
    if "fullatt_block_indexes" in vision:  # Qwen 2.5 VL: the other layers attend within windows
        return len(vision["fullatt_block_indexes"])
    return len({layer[1] for name in shapes if (layer := _LAYER.search(name))})
