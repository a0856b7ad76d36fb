"""Compute the features of images with a model's image encoder, once for each image, and use them as embeddings.

A token id from FIRST_IMAGE_ID on stands for one feature of an image (data.images.ImageTable). `install_images` makes
the input embeddings of a model return that feature, so that all of strop and transformers' generate work on images
without knowing of them.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from strop.data.images import FIRST_IMAGE_ID, open_image
from strop.data.rendering.image_encoder import ImageEncoder, image_encoder
from strop.data.types import Example
from strop.errors import ModelError
from strop.models.families.layers import text_decoder
from strop.models.source import Source, fingerprint
from strop.runs.folder import cache_folder, write_atomic

MAX_CACHE_BYTES = 20 << 30  # on disk, of all models; the features that were not used for longest are removed
MAX_MEMORY_BYTES = 1 << 30
MAX_CHECKED = 16  # tokens of a row on which strop's step is compared with the model's own forward


class _Captured(Exception):
    """Carries the arguments with which a model called its text model."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class ImageFeatures:
    """The features of images, which a frozen model computes.

    model: the base. encoder: of its tokenizer. source: of the base; features are kept on disk by its fingerprint.
    """

    def __init__(self, model: Any, encoder: ImageEncoder, source: Source) -> None:
        self._model, self._encoder, self._source = model, encoder, source
        self._dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        self._recent: OrderedDict[str, Tensor] = OrderedDict()  # by digest
        self._recent_bytes = 0
        self.computed = 0  # images that were not in the cache

    @cached_property
    def _folder(self) -> Path:
        key = f"{fingerprint(self._source)} {self._encoder.fingerprint} {self._dtype}"
        return cache_folder() / "features" / hashlib.sha256(key.encode()).hexdigest()[:24]

    def rows(self, ids: Tensor) -> Tensor:
        """Return the features (n, h) of token ids (n,) from FIRST_IMAGE_ID on."""
        table, parts = self._encoder.table, list[Tensor]()
        values, begin = ids.tolist(), 0
        while begin < len(values):
            number = table.find(values[begin])
            start, count = table.starts[number], table.tokens(number)
            end = begin + 1
            while end < len(values) and values[end] == values[end - 1] + 1 < start + count:
                end += 1
            features = self.of_image(number)
            parts.append(features[values[begin] - start : values[end - 1] - start + 1])
            begin = end
        return torch.cat(parts)

    def of_image(self, number: int) -> Tensor:
        """Return the features (tokens, h) of an image of the table, on the model's device."""
        digest = self._encoder.table.images[number].digest
        if (features := self._recent.get(digest)) is not None:
            self._recent.move_to_end(digest)
            return features
        file = self._folder / digest[:2] / digest
        features = self._read(file)
        if features is None:
            features = self._compute(number).cpu()
            self._write(file, features)
        features = features.to(self._model.device)
        self._recent[digest] = features
        self._recent_bytes += features.nbytes
        while self._recent_bytes > MAX_MEMORY_BYTES and len(self._recent) > 1:
            self._recent_bytes -= self._recent.popitem(last=False)[1].nbytes
        return features

    def _read(self, file: Path) -> Tensor | None:
        try:
            features = load_file(file)["features"]
            os.utime(file)  # the cache removes the files that were not used for longest
        except (OSError, ValueError, KeyError):
            return None
        except Exception:
            return None
        return features

    def _write(self, file: Path, features: Tensor) -> None:
        with suppress(OSError):  # a full disk: the features are computed again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, save({"features": features.contiguous()}))

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
        end = int(places[count]) if len(places) > count else len(ids)
        weights = np.zeros(end, np.float32)
        weights[max(int(places[count - 1]) + 1, end - MAX_CHECKED) :] = 1.0
        part = replace(example, ids=ids[:end], weights=weights, soft=None)
        inputs = self._encoder.inputs(open_image(table.images[number]))
        own, text = inputs["input_ids"], torch.from_numpy(ids[:end].astype(np.int64))[None]
        is_image = text >= FIRST_IMAGE_ID
        text = text.masked_fill(is_image, self._encoder.image_token_id)
        by_token = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        for name, value in inputs.items():
            if value.shape == own.shape and name not in by_token:  # such as token_type_ids
                by_token[name] = is_image.to(value.dtype)
        was_training = model.training
        model.eval()
        output = model(**{name: self._move(value) for name, value in {**inputs, **by_token}.items()}, use_cache=False)
        model.train(was_training)
        labels = torch.from_numpy(weights.nonzero()[0])
        logits = output.logits[0, (labels - 1).to(self._model.device)].float()
        return logits.log_softmax(-1).cpu().gather(1, text[0, labels, None])[:, 0], part

    @torch.no_grad()
    def _compute(self, number: int) -> Tensor:
        """Run the image encoder on one image alone, so that the result does not depend on other images."""
        table = self._encoder.table
        self.computed += 1
        inputs = self._encoder.inputs(open_image(table.images[number]))
        inputs = {name: self._move(value) for name, value in inputs.items() if isinstance(value, Tensor)}
        was_training = self._model.training
        self._model.eval()  # dropout of the image encoder
        try:
            embeddings = capture_embeddings(self._model, inputs)
        finally:
            self._model.train(was_training)
        features = embeddings[0, inputs["input_ids"][0] == self._encoder.image_token_id]
        if len(features) != table.tokens(number):
            what = f"the model makes {len(features)} features of an image with {table.tokens(number)} image tokens"
            raise ModelError(what, fix="save the processor and the model with the same version of transformers")
        return features.detach().clone()

    def _move(self, value: Tensor) -> Tensor:
        return value.to(self._model.device, self._dtype if value.is_floating_point() else None)


def capture_embeddings(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the embeddings (1, n, h) that a multimodal model gives to its text model, which is not computed.

    Raises ModelError for a model whose text model reads more than these embeddings of an image.
    """
    decoder = text_decoder(model)[0]

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Captured(kwargs)

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Captured as captured:
        arguments = captured.arguments
    else:
        raise ModelError(f"{model.config.model_type}: its text model is not called by its forward")
    finally:
        handle.remove()
    check_positions(model, arguments)
    return cast(Tensor, arguments["inputs_embeds"])


def check_positions(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ModelError if the text model reads images in a way that strop has not: positions in space, later layers."""
    positions = arguments.get("position_ids")
    has_other_positions = isinstance(positions, Tensor) and positions.dim() == 3
    in_later_layers = any("deepstack" in name and value is not None for name, value in arguments.items())
    if has_other_positions or in_later_layers or isinstance(arguments.get("attention_mask"), Mapping):
        why = "positions in space" if has_other_positions else "features in later layers" if in_later_layers else (
            "attention in both directions between image tokens"
        )  # fmt: skip
        what = f"{model.config.model_type}: images with {why} are not supported"
        raise ModelError(what, fix="choose another model that reads images, such as SmolVLM, or train on texts")


def image_features(module: Any) -> ImageFeatures | None:
    """Return what `install_images` installed on a model or its embeddings, or None."""
    features: ImageFeatures | None = getattr(module, "image_features", None)
    return features


def install_images(model: Any, tokenizer: Any, source: Source) -> ImageFeatures | None:
    """Make the input embeddings of a model return the features of images. Return None if it reads only text.

    model: with or without adapters. tokenizer: with which rows and prompts are encoded. source: of the base.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    encoder = image_encoder(tokenizer)
    if encoder is None:
        return None
    features, embedding = ImageFeatures(base, encoder, source), base.get_input_embeddings()

    given: list[Tensor] = []  # the ids of the call that is computed

    def hide(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids, *rest = args
        given.append(ids)
        return (ids.masked_fill(ids >= FIRST_IMAGE_ID, 0), *rest)

    def insert(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return insert_features(features, given.pop(), output)

    embedding.register_forward_pre_hook(hide)
    embedding.register_forward_hook(insert)
    text_decoder(base)[0].image_features = features
    return features


def insert_features(features: ImageFeatures, ids: Tensor, embeddings: Tensor) -> Tensor:
    """Return embeddings (..., h) with the features of images in place of those of their ids (...,)."""
    places = (ids >= FIRST_IMAGE_ID).nonzero(as_tuple=True)
    if not len(places[0]):
        return embeddings
    return embeddings.index_put(places, features.rows(ids[places]).to(embeddings.dtype))
