"""Compute the features of images with a model's image encoder, once for each image, and use them as embeddings.

A token id from FIRST_IMAGE_ID on stands for one feature of an image (data.images.ImageTable). `install_images` makes
the input embeddings of a model return that feature, so that all of strop and transformers' generate work on images
without knowing of them.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from strop.data.images import FIRST_IMAGE_ID, IN_MEMORY, MAX_TOWER_OUTPUTS, open_image
from strop.data.rendering.image_encoder import ImageEncoder, image_encoder
from strop.data.types import Example, Ids, Image, Indices
from strop.errors import ModelError
from strop.machine.memory import trim_heap
from strop.models.families.layers import text_decoder
from strop.models.introspect import find_image_tower, text_filter
from strop.runs.folder import cache_folder, write_atomic

MAX_CACHE_BYTES = 20 << 30  # on disk, of all models; the features that were not used for longest are removed
MAX_MEMORY_BYTES = 1 << 30
GRID = "image_grid_thw"  # argument of models with positions in space: frames, rows and columns of patches
_WRAPPERS = (LoraLayer, AuxiliaryTrainingWrapper)
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # arguments that say which tokens are features of images
_OF_TEXT = (  # arguments of a text model that strop makes from token ids and features
    "inputs_embeds", "attention_mask", "position_ids", "per_layer_inputs", "visual_pos_masks",
    "deepstack_visual_embeds",
)  # fmt: skip
_TENSORS = (Tensor, list, tuple, dict)
_IN_SPACE = "positions of images in space"
_BIDIRECTIONAL = "attention in both directions between the features of an image"
FEATURES, LATER = "features", "deepstack."  # names of the tensors of an image; LATER with the number of a layer
SAMPLED = 4096  # elements of each weight that identify an image encoder
MAX_CHECKED = 16  # tokens of a row on which strop's step is compared with the model's own forward


class _Captured(Exception):
    """Carries the arguments with which a model called its text model."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class ImageFeatures:
    """The features of images, which a frozen model computes.

    model: the base. encoder: of its tokenizer. Features are kept on disk, by the weights of the encoder.
    """

    def __init__(self, model: Any, encoder: ImageEncoder) -> None:
        self._model, self._encoder = model, encoder
        self._dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        self._recent: OrderedDict[str, dict[str, Tensor]] = OrderedDict()  # by digest
        self._token_types = token_types(model)
        self._recent_bytes = 0
        self._tower = find_image_tower(model)
        self.refresh()
        self._tower_outputs: OrderedDict[str, Any] = OrderedDict()  # by digest
        self._grids: dict[int, Tensor | None] = {}
        self.computed = 0  # images that were not in the cache

    def refresh(self) -> None:
        """Find the trained modules outside of the text model, such as a projector, again: an adapter was added."""
        is_text = text_filter(self._model)
        modules = self._model.named_modules()
        self._adapted = [module for name, module in modules if isinstance(module, _WRAPPERS) and not is_text(name)]
        tower = () if self._tower is None else self._tower.modules()
        self._tower_is_trained = any(isinstance(module, _WRAPPERS) for module in tower)

    @cached_property
    def _folder(self) -> Path:
        key = hashlib.sha256(f"{self._encoder.fingerprint} {self._dtype} {self._model.device.type}".encode())
        is_text = text_filter(self._model)
        for name, weight in self._model.named_parameters():
            if not is_text(name):  # also if it was quantized, and dequantized again
                sample = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLED)]
                key.update(f"{name} {weight.shape} {weight.dtype}".encode() + sample.float().cpu().numpy().tobytes())
        folder = cache_folder() / "features"
        remove_oldest(folder, MAX_CACHE_BYTES)
        return folder / key.hexdigest()[:24]

    @cached_property
    def uses_mrope(self) -> bool:
        """Return whether rotary positions have three dimensions (M-RoPE, arXiv:2409.12191): see `positions`."""
        return GRID in inspect.signature(type(self._model).forward).parameters

    @cached_property
    def why_not_decoded(self) -> str | None:
        """Return why strop's decoders cannot compute rows with images, or None."""
        return _IN_SPACE if self.uses_mrope and self._positioned is None else None

    @cached_property
    def _positioned(self) -> Any | None:
        """The module that computes positions in space, or None."""
        return next((module for module in self._model.modules() if hasattr(module, "get_rope_index")), None)

    def positions(self, ids: Ids) -> Indices:
        """Return the positions (3, n) of token ids (n,), in time, rows and columns, as the model computes them.

        Those of a token depend only on the tokens before it and, for a feature, on its image. So a part of them is
        valid for each sequence with the same first tokens, also if it ends inside an image.
        """
        spans = list(self._encoder.table.spans(ids[ids >= FIRST_IMAGE_ID]))
        if not spans or not self.uses_mrope:
            return np.broadcast_to(np.arange(len(ids)), (3, len(ids)))
        assert self._positioned is not None
        table, (number, _, last) = self._encoder.table, spans[-1]
        missing = table.starts[number] + table.tokens(number) - 1 - last
        text = torch.from_numpy(np.append(ids, np.full(missing, FIRST_IMAGE_ID)).astype(np.int64))[None]
        is_image = text >= FIRST_IMAGE_ID
        positions, _ = self._positioned.get_rope_index(
            input_ids=text.masked_fill(is_image, self._encoder.image_token_id), mm_token_type_ids=is_image.long(),
            image_grid_thw=torch.cat([cast(Tensor, self._grid(number)) for number, *_ in spans]).cpu(),
        )  # fmt: skip
        found: Indices = positions[:, 0, : len(ids)].numpy()
        return found

    @cached_property
    @torch.no_grad()
    def bidirectional_layers(self) -> frozenset[str]:
        """The types of layers in which the features of an image attend to all of its features; "" means all layers.

        They are those whose attention mask depends on which tokens are features (none in small Gemma 4).
        """
        if self.uses_mrope or not self._token_types:
            return frozenset()
        ids = torch.zeros(1, 4, dtype=torch.long, device=self._model.device)
        types = ids, torch.tensor([[0, 1, 1, 0]], device=ids.device)
        one, other = (
            capture_arguments(self._model, {"input_ids": ids, **dict.fromkeys(self._token_types, value)})[
                "attention_mask"
            ]
            for value in types
        )
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return frozenset(name for name in one if not _equal_masks(one[name], other[name]))
        return frozenset() if _equal_masks(one, other) else frozenset([""])

    @property
    def has_images(self) -> bool:
        return len(self._encoder.table) > 0

    @property
    def why_model_computes(self) -> str | None:
        """Return why the model's own forward must train on the rows, or None. Without images it is never needed."""
        why = self.why_not_decoded or (_BIDIRECTIONAL if self.bidirectional_layers else None)
        return why if self.has_images else None

    @property
    def positions_differ(self) -> bool:
        """Return whether a sequence may have other positions than 0, 1, 2, ...: see `positions`."""
        return self.uses_mrope and self.has_images

    def rows(self, ids: Tensor) -> list[Tensor]:
        """Return the features (n, h) of token ids (n,) from FIRST_IMAGE_ID on.

        Followed by those that the first layers add (DeepStack), a tensor for each layer.
        """
        spans = list(self._encoder.table.spans(ids))
        images = {number: self.of_image(number) for number, *_ in spans}
        starts = self._encoder.table.starts
        return [
            torch.cat([images[i][name][first - starts[i] : last - starts[i] + 1] for i, first, last in spans])
            for name in (FEATURES, *sorted(name for name in images[spans[0][0]] if name.startswith(LATER)))
        ]

    def arguments(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the model's forward, next to the token ids (b, s), that describe their images."""
        is_image = ids >= FIRST_IMAGE_ID
        if not self._token_types or not bool(is_image.any()):
            return {}
        arguments = {name: is_image.long() for name in self._token_types}
        images = [number for row in ids for number, *_ in self._encoder.table.spans(row[row >= FIRST_IMAGE_ID])]
        grids = [self._grid(number) for number in images]
        if all(grid is not None for grid in grids):
            arguments[GRID] = torch.cat(cast(list[Tensor], grids))
        return arguments

    def _grid(self, number: int) -> Tensor | None:
        """Return the grid of an image. It is kept: a trained projector would compute its features for it again."""
        if number not in self._grids:
            with torch.inference_mode(False), torch.no_grad():  # sampling computes under inference_mode
                self._grids[number] = self.of_image(number).get(GRID)
        return self._grids[number]

    def images_of(self, ids: Ids) -> list[tuple[int, Image]]:
        """Return the images of token ids (n,) with their indices, so that they are kept for `load`."""
        numbers = dict.fromkeys(self._encoder.table.find(int(id)) for id in ids[ids >= FIRST_IMAGE_ID])
        return [(number, self._encoder.table.images[number]) for number in numbers]

    def load(self, images: Sequence[tuple[int, Image]]) -> None:
        """Compute features before they are used. Raises DataError if a file is gone."""
        for number, image in images:
            self._encoder.table.keep(number, image)
            self.of_image(number)

    @property
    def depends_on_adapter(self) -> bool:
        """Return whether a part that makes the features, such as a projector, is trained."""
        return bool(self._adapted)

    def of_image(self, number: int) -> dict[str, Tensor]:
        """Return `features` (tokens, h) of an image of the table, and its grid if the model has one, on its device.

        Those of a frozen encoder are kept. If a part of it is trained, they are computed each time, with gradients.
        """
        if self._adapted:
            return self._compute(number)
        image = self._encoder.table.images[number]
        if (tensors := self._recent.get(image.digest)) is not None:
            self._recent.move_to_end(image.digest)
            return tensors
        file = self._folder / image.digest[:2] / image.digest
        tensors = self._read(file)
        if tensors is None:
            tensors = {name: value.cpu().contiguous() for name, value in self._compute(number).items()}
            if not image.path.startswith(IN_MEMORY):  # images of requests are not written to disk
                with suppress(OSError):  # a full disk: the features are computed again
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(file, save(tensors))
        tensors = {name: value.to(self._model.device) for name, value in tensors.items()}
        self._recent[image.digest] = tensors
        self._recent_bytes += count_bytes(tensors)
        while self._recent_bytes > MAX_MEMORY_BYTES and len(self._recent) > 1:
            self._recent_bytes -= count_bytes(self._recent.popitem(last=False)[1])
        return tensors

    def _read(self, file: Path) -> dict[str, Tensor] | None:
        try:
            tensors: dict[str, Tensor] = load_file(file)
            os.utime(file)  # the cache removes the files that were not used for longest
        except (OSError, SafetensorError):
            return None
        return tensors

    def is_comparable(self, example: Example) -> bool:
        """Return whether there is text after the first image of an example, as `original_logprobs` needs it."""
        places = (example.ids >= FIRST_IMAGE_ID).nonzero()[0]
        if not len(places):
            return False
        end = self._end_of_first(example.ids, places)
        return end < len(example) and bool(example.ids[end] < FIRST_IMAGE_ID)

    def _end_of_first(self, ids: Ids, places: Indices) -> int:
        """Return the position after the first image of token ids. places: positions of features."""
        table = self._encoder.table
        return int(places[table.tokens(table.find(int(ids[places[0]]))) - 1]) + 1

    @torch.no_grad()
    def original_logprobs(self, model: Any, example: Example) -> tuple[Tensor, Example]:
        """Return the log-probabilities (M,) that the model's own forward computes from the pixels of an image.

        model: with its adapters. Also returns the compared tokens as an example: those up to the second image, of which
        the last ones, after the first image, are supervised.
        """
        table, ids = self._encoder.table, example.ids
        places = (ids >= FIRST_IMAGE_ID).nonzero()[0]
        number = table.find(int(ids[places[0]]))
        count = table.tokens(number)
        self.of_image(number)  # its errors are more precise than those of the forward
        end = int(places[count]) if len(places) > count else len(ids)
        weights = np.zeros(end, np.float32)
        weights[max(self._end_of_first(ids, places), end - MAX_CHECKED) :] = 1.0
        part = replace(example, ids=ids[:end], weights=weights, soft=None)
        inputs = self._encoder.inputs(open_image(table.images[number]))
        own, text = inputs["input_ids"], torch.from_numpy(ids[:end].astype(np.int64))[None]
        is_image = text >= FIRST_IMAGE_ID
        text = text.masked_fill(is_image, self._encoder.image_token_id)
        by_token = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        for name, value in inputs.items():
            # such as token_type_ids; a grid (1, 3) has the shape of three tokens
            if value.shape == own.shape and name.endswith(("_ids", "_mask")) and name not in by_token:
                by_token[name] = is_image.to(value.dtype)
        was_training = model.training
        model.eval()
        output = model(**{name: self._move(value) for name, value in {**inputs, **by_token}.items()}, use_cache=False)
        model.train(was_training)
        labels = torch.from_numpy(weights.nonzero()[0])
        logits = output.logits[0, (labels - 1).to(self._model.device)].float()
        return logits.log_softmax(-1).cpu().gather(1, text[0, labels, None])[:, 0], part

    def _compute(self, number: int) -> dict[str, Tensor]:
        """Run the image encoder on one image alone, so that the result does not depend on other images."""
        table = self._encoder.table
        self.computed += 1
        inputs = self._encoder.inputs(open_image(table.images[number]))
        inputs = {name: self._move(value) for name, value in inputs.items() if isinstance(value, Tensor)}
        has_gradient = self.depends_on_adapter and torch.is_grad_enabled()
        encode = partial(self._encode, inputs, table.images[number].digest)
        if has_gradient and self._tower_is_trained:  # the backward pass keeps one image's activations
            embeddings, later = checkpoint(encode, use_reentrant=False, preserve_rng_state=False)
        else:
            with torch.set_grad_enabled(has_gradient):
                embeddings, later = encode()
        features = embeddings[0, inputs["input_ids"][0] == self._encoder.image_token_id]
        if len(features) != table.tokens(number):
            what = f"the model makes {len(features)} features of an image with {table.tokens(number)} image tokens"
            raise ModelError(what, fix="save the processor and the model with the same version of transformers")
        others = {f"{LATER}{layer}": values for layer, values in enumerate(later)}
        others |= {GRID: inputs[GRID]} if GRID in inputs else {}
        tensors = {FEATURES: features, **others}
        return tensors if has_gradient else {name: value.detach().clone() for name, value in tensors.items()}

    def _encode(self, inputs: Mapping[str, Tensor], digest: str) -> tuple[Tensor, list[Tensor]]:
        """Return `capture_embeddings` of an image, without dropout."""
        if self._tower_is_trained:
            trim_heap()  # blocks freed by the last image lie between others, and do not fit those of this one
        was_training = self._model.training
        self._model.eval()
        try:
            with self._tower_computed_once(digest):
                return capture_embeddings(self._model, inputs)
        finally:
            self._model.train(was_training)

    @contextmanager
    def _tower_computed_once(self, digest: str) -> Iterator[None]:
        """Keep the output of a frozen tower under a trained projector in memory, and return it the next time."""
        tower = self._tower if self.depends_on_adapter else None
        if tower is None or self._tower_is_trained:
            yield
            return
        compute = tower.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if digest not in self._tower_outputs:
                with torch.inference_mode(False), torch.no_grad():  # sampling computes under inference_mode
                    self._tower_outputs[digest] = compute(*args, **kwargs)
                if len(self._tower_outputs) > MAX_TOWER_OUTPUTS:
                    self._tower_outputs.popitem(last=False)
            return self._tower_outputs[digest]

        tower.forward = forward
        try:
            yield
        finally:
            tower.forward = compute

    def _move(self, value: Tensor) -> Tensor:
        return value.to(self._model.device, self._dtype if value.is_floating_point() else None)


def token_types(model: Any) -> list[str]:
    """Return the arguments of a multimodal model's forward that say which tokens are features of images."""
    return [name for name in _TOKEN_TYPES if name in inspect.signature(type(model).forward).parameters]


def image_ends(ids: Ids) -> Indices:
    """Return the position (n,) after the last feature of each token's image, or after the token if it is text."""
    is_image = ids >= FIRST_IMAGE_ID
    ends = np.flatnonzero(~(is_image & np.append(is_image[1:], False))) + 1
    found: Indices = ends[np.searchsorted(ends, np.arange(1, len(ids) + 1))]
    return found


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def remove_oldest(folder: Path, max_bytes: int) -> None:
    """Remove the files of a cache that were not used for longest, until the others have at most `max_bytes`."""
    files = list[tuple[float, int, Path]]()
    for file in folder.rglob("*"):
        with suppress(OSError):  # another process removed it
            if file.is_file():
                files.append((file.stat().st_mtime, file.stat().st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= max_bytes:
            break
        file.unlink(missing_ok=True)
        total -= size


def capture_embeddings(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the embeddings (1, n, h) that a multimodal model gives to its text model, which is not computed.

    Also returns the features (tokens, h) that the first layers of the text model add (DeepStack, arXiv:2406.04334).
    Raises ModelError if the text model gets more of an image, as for cross-attention.
    """
    arguments = capture_arguments(model, inputs)
    if unknown := [name for name, value in arguments.items() if name not in _OF_TEXT and isinstance(value, _TENSORS)]:
        what = f"{model.config.model_type}: its layers read images apart from the tokens ({', '.join(unknown)})"
        raise ModelError(what, fix="train on text, or choose another model that reads images")
    return cast(Tensor, arguments["inputs_embeds"]), list(arguments.get("deepstack_visual_embeds") or ())


def capture_arguments(model: Any, inputs: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return the arguments with which a multimodal model calls its text model, which is not computed.

    Raises ModelError if it is not called.
    """
    decoder = text_decoder(model)[0]

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Captured(kwargs)

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Captured as captured:
        return captured.arguments
    finally:
        handle.remove()
    raise ModelError(f"{model.config.model_type}: its text model is not called by its forward")


def _equal_masks(one: Any, other: Any) -> bool:
    """Return whether two attention masks are equal: tensors or None."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return one is None and other is None


def image_features(model: Any) -> ImageFeatures | None:
    """Return what `install_images` installed on a model, with or without adapters, or None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    features: ImageFeatures | None = getattr(base, "image_features", None)
    return features


def install_images(model: Any, tokenizer: Any) -> ImageFeatures | None:
    """Make the input embeddings of a model return the features of images. Return None if it reads only text.

    model: with or without adapters. tokenizer: with which rows and prompts are encoded.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    encoder = image_encoder(tokenizer)
    if encoder is None:
        return None
    decoder = text_decoder(base)[0]
    if (features := image_features(base)) is not None:
        return features
    features, embedding = ImageFeatures(base, encoder), base.get_input_embeddings()
    given: list[Tensor] = []  # the ids of the calls of the embedding; the features of an image are a call inside one
    later: list[Tensor] = []  # of the last complete call, as `insert_features` returns them

    def hide(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, *rest = args
        given.append(ids)
        return (ids.masked_fill(ids >= FIRST_IMAGE_ID, 0), *rest)

    def insert(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output, later[:] = insert_features(features, given[-1], output)
        given.pop()
        return output

    def add_later(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not later:
            return None
        is_image, *added = later
        later.clear()
        return args, {**kwargs, "visual_pos_masks": is_image, "deepstack_visual_embeds": added}

    base.image_features = features
    embedding.register_forward_pre_hook(hide)
    if (per_layer := getattr(decoder, "embed_tokens_per_layer", None)) is not None:  # Gemma 4: features are padding
        padding = base.config.get_text_config().pad_token_id
        per_layer.register_forward_pre_hook(lambda _, args: (args[0].masked_fill(args[0] >= FIRST_IMAGE_ID, padding),))
    embedding.register_forward_hook(insert)
    if "deepstack_visual_embeds" in inspect.signature(type(decoder).forward).parameters:
        decoder.register_forward_pre_hook(add_later, with_kwargs=True)
    return features


def insert_features(features: ImageFeatures, ids: Tensor, embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return embeddings (..., h) with the features of images in place of those of their ids (...,).

    Also returns what the first layers add (DeepStack): the mask (...,) of the features, and their rows for each layer.
    It is empty for other models, and without images.
    """
    if not features.has_images:  # rows of text need no search, which on a GPU would wait
        return embeddings, []
    is_image = ids >= FIRST_IMAGE_ID
    places = is_image.nonzero(as_tuple=True)
    if not len(places[0]):
        return embeddings, []
    rows, *later = features.rows(ids[places])
    return embeddings.index_put(places, rows.to(embeddings.dtype)), [is_image, *later] if later else []
