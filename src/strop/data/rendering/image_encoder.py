"""Convert images to the text that stands for them in a prompt, and to the inputs of a model's image encoder.

Both are made by the model's own processor (transformers' AutoProcessor), which is loaded when the first image is seen.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strop.data.images import ImageTable
from strop.data.row_errors import RenderError
from strop.errors import ModelError, first_line

if TYPE_CHECKING:
    import PIL.Image

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_PROBE_SIZE = (64, 48)  # width and height of the image with which placeholders are found


@dataclass(frozen=True)
class Expansion:
    """The text that replaces the placeholder of an image, and how many image tokens are in it."""

    text: str
    tokens: int


class ImageEncoder:
    """The processor of a model that reads images.

    folder: with the processor's files. tokenizer: of the model. image_token_id: the token whose embeddings the features
    of images replace, from the model's config. table: the images of rendered rows.
    """

    def __init__(self, folder: Path, tokenizer: Any, image_token_id: int) -> None:
        self.folder, self._tokenizer, self.image_token_id = folder, tokenizer, image_token_id
        self.table = ImageTable()
        self.candidates: Sequence[str] = ()  # the tokens that the chat template writes for an image, set by a Renderer
        self.expand = lru_cache(maxsize=4096)(self._expand)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of many types: files are missing, a library is missing, damaged JSON
            what = f"{self.folder}: its image processor cannot be loaded: {first_line(error)}"
            raise ModelError(what, fix="check the processor's files, or leave the images out") from None
        if not hasattr(processor, "image_processor"):
            raise ModelError(f"{self.folder}: a processor without images", fix="choose a model that reads images")
        processor.tokenizer = self._tokenizer
        return processor

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the processor's files."""
        files = (self.folder / name for name in PROCESSOR_FILES)
        return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()

    @cached_property
    def placeholder(self) -> str:
        """The token that the chat template writes for an image, and the processor replaces with the image's text.

        Raises RenderError if there is none, and ModelError if the processor also changes the text around it.
        """
        self._processor  # noqa: B018 - its errors are not those of a token
        for token in self.candidates:
            try:
                expansion = self._expand_placeholder(token, *_PROBE_SIZE)
            except Exception:  # a processor may raise anything for a text without its placeholder
                continue
            if expansion.tokens:
                self._check_replacement(token, expansion)
                return token
        raise RenderError("image-lost", "of any row")

    def _check_replacement(self, token: str, expansion: Expansion) -> None:
        import PIL.Image

        start = f"{self._tokenizer.bos_token or ''}a"  # some processors add the token if it is absent
        processed = self._process(f"{start}{token}a", [PIL.Image.new("RGB", _PROBE_SIZE)])["input_ids"][0].tolist()
        if processed != self._tokenizer(f"{start}{expansion.text}a", add_special_tokens=False)["input_ids"]:
            what = f"{self.folder}: its processor changes the text around an image, which strop does not support"
            raise ModelError(what, fix="train on text, or choose another model that reads images")

    @cached_property
    def reads_several(self) -> bool:
        """Return whether an image has the same text next to others. LLaVA-OneVision cuts only an image alone."""
        import PIL.Image

        images = [PIL.Image.new("RGB", size) for size in (_PROBE_SIZE, _PROBE_SIZE[::-1])]
        # tokenized together, because the end of a text and the start of the next one may be one token (Gemma 3)
        texts = "".join(self._expand_placeholder(self.placeholder, *image.size).text for image in images)
        together = self._process(2 * self.placeholder, images)["input_ids"][0].tolist()
        return bool(together == self._tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _expand(self, width: int, height: int) -> Expansion:
        """Return the text that the processor writes for an image of this size. Raises RenderError."""
        try:
            return self._expand_placeholder(self.placeholder, width, height)
        except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            raise RenderError("image-refused", f"{width} x {height}: {first_line(error)}") from None

    def _expand_placeholder(self, placeholder: str, width: int, height: int) -> Expansion:
        import PIL.Image

        ids = self._process(placeholder, [PIL.Image.new("RGB", (width, height))])["input_ids"][0].tolist()
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Expansion(text, ids.count(self.image_token_id))

    def pixel_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of the values that the processor makes of an image of this size, with its padding."""
        import PIL.Image

        return tuple(self.inputs(PIL.Image.new("RGB", (width, height)))["pixel_values"].shape)

    def inputs(self, image: PIL.Image.Image) -> dict[str, Any]:
        """Return the inputs of the model for an image alone: tensors with a batch of one."""
        return dict(self._process(self.placeholder, [image]))

    def _process(self, text: str, images: list[PIL.Image.Image]) -> Any:
        options = {"add_special_tokens": False, "padding": False, "return_tensors": "pt"}
        return self._processor(text=[text], images=[images], **options)


def has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def attach_image_encoder(tokenizer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Attach the image encoder of a model folder to its tokenizer, if the model reads images. config: config.json."""
    token = config.get("image_token_id", config.get("image_token_index"))
    if has_processor(folder) and isinstance(token, int):
        tokenizer.image_encoder = ImageEncoder(folder, tokenizer, token)


def save_processor(tokenizer: Any, folder: Path) -> None:
    """Copy the processor of a tokenizer's model to a folder, if there is one, so that transformers finds it there."""
    if (encoder := image_encoder(tokenizer)) is not None:
        for name in PROCESSOR_FILES:
            if (encoder.folder / name).is_file():
                shutil.copyfile(encoder.folder / name, folder / name)


def share_image_encoder(tokenizer: Any, other: Any) -> None:
    """Give a tokenizer the image encoder of another one of the same base, so that ids of images mean the same."""
    tokenizer.image_encoder = image_encoder(other)


def image_encoder(tokenizer: Any) -> ImageEncoder | None:
    """Return the image encoder of a tokenizer's model, or None for a model of texts."""
    encoder: ImageEncoder | None = getattr(tokenizer, "image_encoder", None)
    return encoder
