"""Read the images of rows: find each file, check that it can be decoded, and describe it without its pixels."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

import numpy as np

from strop.data.row_errors import InvalidRow, type_name
from strop.data.types import Ids, Image
from strop.errors import DataError, FolderError, first_line
from strop.runs.folder import cache_folder, write_atomic

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

IN_MEMORY = "data:;base64,"  # start of the path of an image that is not in a file
MAX_IN_MEMORY_BYTES = 256 << 20  # of such images in a table
FIRST_IMAGE_ID, END_IMAGE_ID = 1 << 30, 1 << 31  # token ids in between are features of images; they are int32
MAX_PIXELS, MAX_BYTES = 50_000_000, 50 << 20  # of one image
MAX_TOWER_OUTPUTS = 4096  # images whose output of the image encoder is kept for a trained projector
IMAGE_NOTES = {  # what is done to the pixels of an image
    "rotated": "that were turned as their EXIF orientation says",
    "transparent": "with transparency, which is put on white",
    "16-bit": "with 16 bits a pixel, which are scaled to 8",
}
# Pillow's other formats start programs (EPS), draw vectors or are rare. A photo of a phone (MPO) is opened as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
_TOO_LARGE = f"more than {MAX_PIXELS // 1_000_000} million pixels"
_MODES_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
_MODES_32_BIT = ("I", "F")
_MODES_OF_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_AS_PNG = {"I": "I;16", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}  # modes with 16 bits a pixel or transparency
_ORIENTATION, _TURNED = 0x0112, range(2, 9)  # EXIF tag, and its values for images that are not upright
_CONTENT_KEYS = ("bytes", "path", "url", "image", "base64", "data")  # of an object with an image


def read_image(value: Any, folder: Path | None, location: str) -> Image:
    """Check an image of a row, and return its description.

    Args:
        value: a path, a data URL, bytes, an object with one of them (`path`, `url`, `bytes` or `base64`), or a PIL
            image.
        folder: where relative paths start; None: paths are refused, as in requests to a server.
        location: of the value in the row, for errors.

    Raises:
        InvalidRow: if there is no such image, or it cannot be used.
    """
    if isinstance(value, Mapping):
        value = _find_content(value, location)
    if isinstance(value, bytes | bytearray | memoryview):
        return _describe_bytes(bytes(value), location, in_memory=folder is None)
    if isinstance(value, str):
        if value.startswith("data:"):
            return _describe_bytes(_decode_data_url(value, location), location, in_memory=folder is None)
        return _read_path(value, folder, location)
    if is_pil_image(value):
        return _describe_bytes(encode_png(value, location), location, in_memory=folder is None)
    raise InvalidRow("bad-image", f"{location} is {type_name(value)}, not a path, a data URL or bytes")


def is_pil_image(value: Any) -> bool:
    """Return whether a value is a PIL image, without importing the library."""
    return hasattr(value, "save") and hasattr(value, "getexif")


def encode_png(image: PIL.Image.Image, location: str = "a PIL image") -> bytes:
    """Return a PIL image as the bytes of a PNG file, upright. Raises InvalidRow if it cannot be used."""
    from PIL import ImageOps

    if image.mode in _MODES_32_BIT:  # a PNG file would have 16 of them
        raise InvalidRow("image-unreadable", f"{location}: pixels of 32 bits")
    if (frames := _count_frames(image)) > 1:
        raise InvalidRow("image-animated", f"{location}: {frames} frames")
    buffer = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _MODES_OF_PNG:
            upright = upright.convert("I") if upright.mode in _MODES_16_BIT else upright
            upright = upright.convert(_AS_PNG.get(upright.mode, "RGB"))
        upright.save(buffer, "PNG")
    except Exception as error:  # of many types: the file is truncated or closed
        raise InvalidRow("image-unreadable", f"{location}: cannot be decoded: {first_line(error)}") from None
    return buffer.getvalue()


def _count_frames(image: PIL.Image.Image) -> int:
    """Return the number of frames. The other pictures in a photo of a phone (MPO) are previews or depth."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _find_content(value: Mapping[str, Any], location: str) -> Any:
    for key in _CONTENT_KEYS:
        if (content := value.get(key)) is not None:
            if key in ("base64", "data") and isinstance(content, str) and not content.startswith("data:"):
                return _decode_base64(content, location)
            return _find_content(content, location) if isinstance(content, Mapping) else content
    raise InvalidRow("bad-image", f"{location} has no path, url or bytes")


def _decode_data_url(value: str, location: str) -> bytes:
    header, comma, content = value.partition(",")
    if not comma or not header.endswith(";base64"):
        raise InvalidRow("bad-image", f"{location}: the data URL is not base64")
    return _decode_base64(content, location)


def _decode_base64(content: str, location: str) -> bytes:
    if len(content) > MAX_BYTES * 4 // 3 + 4:
        raise InvalidRow("image-too-large", f"{location}: more than {MAX_BYTES >> 20} MiB")
    try:
        return base64.b64decode(re.sub(r"\s", "", content), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRow("bad-image", f"{location}: the base64 is damaged: {error}") from None


def _describe_bytes(content: bytes, location: str, *, in_memory: bool) -> Image:
    """Describe an image. Its bytes are kept in the cache on disk, or (in_memory) in its path, as a data URL."""
    digest = hashlib.sha256(content).hexdigest()
    width, height, notes = _inspect(content, location)
    path = IN_MEMORY + base64.b64encode(content).decode() if in_memory else str(keep_bytes(content))
    return Image(digest, path, width, height, notes)


def keep_bytes(content: bytes) -> Path:
    """Write the bytes of an image to the cache, in a file named after their hash, and return its path.

    Raises FolderError if the cache cannot be written.
    """
    digest = hashlib.sha256(content).hexdigest()
    path = cache_folder() / "images" / digest[:2] / digest
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
    except OSError as error:
        fix = "free space, or set STROP_CACHE to a writable folder"
        raise FolderError(f"{path.parent}: an image cannot be stored: {error.strerror}", fix=fix) from None
    return path


def _read_path(value: str, folder: Path | None, location: str) -> Image:
    if value.startswith("file://"):
        value = unquote(urlparse(value).path)
    elif re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        advice = " is on a network: give the image as a data URL" if folder is None else ""
        raise InvalidRow("image-url", f"{location}: {_shorten(value)}{advice}")
    if folder is None:
        raise InvalidRow("bad-image", f"{location}: only data URLs are read here, not files")
    path = folder / os.path.expanduser(value)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise InvalidRow("image-missing", f"{location}: {path}: {error.strerror}") from None
        raise InvalidRow("image-missing", f"{location}: no file {_shorten(str(path))}") from None
    if not path.is_file():
        raise InvalidRow("image-missing", f"{location}: {path} is not a file")
    if status.st_size > MAX_BYTES:
        raise InvalidRow("image-too-large", f"{location}: {path.name} has more than {MAX_BYTES >> 20} MiB")
    result = _read_file(str(path.absolute()), status.st_mtime_ns, status.st_size)
    if isinstance(result, InvalidRow):
        raise InvalidRow(result.code, f"{location}: {path.name}: {result.what}")
    return result


def _shorten(text: str) -> str:
    """Return a text for an error. It may be the base64 of a whole image."""
    return text if len(text) <= 200 else f"{text[:100]} ... ({len(text):,} characters)"


@lru_cache(maxsize=1 << 17)
def _read_file(path: str, mtime_ns: int, size: int) -> Image | InvalidRow:
    """Return the image of a file, or why it cannot be used. mtime_ns, size: so that a changed file is read again."""
    try:
        content = Path(path).read_bytes()
        width, height, notes = _inspect(content, "")
    except OSError as error:
        return InvalidRow("image-missing", error.strerror or str(error))
    except InvalidRow as error:
        return InvalidRow(error.code, error.what.removeprefix(": "))
    return Image(hashlib.sha256(content).hexdigest(), path, width, height, notes)


def _inspect(content: bytes, location: str) -> tuple[int, int, tuple[str, ...]]:
    """Return width, height and what is done to the pixels of an image. Raises InvalidRow."""
    if len(content) > MAX_BYTES:
        raise InvalidRow("image-too-large", f"{location}: more than {MAX_BYTES >> 20} MiB")
    if not content:
        raise InvalidRow("image-unreadable", f"{location}: empty")
    image, notes = _decode(content, location)
    return (*image.size, notes)


def _decode(content: bytes, location: str) -> tuple[PIL.Image.Image, tuple[str, ...]]:
    """Return the pixels as RGB, upright, and what was done to them. Raises InvalidRow."""
    import PIL.Image
    from PIL import ImageOps

    PIL.Image.init()
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and damaged metadata, which are checked here
            image: PIL.Image.Image = PIL.Image.open(
                io.BytesIO(content), formats=[name for name in FORMATS if name in PIL.Image.OPEN]
            )
            if image.width * image.height > MAX_PIXELS:
                raise InvalidRow("image-too-large", f"{location}: {image.width} x {image.height}, {_TOO_LARGE}")
            if not image.width * image.height:
                raise InvalidRow("image-unreadable", f"{location}: {image.width} x {image.height} pixels")
            if (frames := _count_frames(image)) > 1:
                raise InvalidRow("image-animated", f"{location}: {frames} frames")
            orientation = image.getexif().get(_ORIENTATION)  # before TIFF images turn when they are loaded
            image.load()
            if orientation in _TURNED:
                notes.append("rotated")
                image = ImageOps.exif_transpose(image)
            image = _to_rgb(image, notes, location)
    except InvalidRow:
        raise
    except PIL.UnidentifiedImageError:
        raise InvalidRow("image-unreadable", f"{location}: not an image of a known format") from None
    except PIL.Image.DecompressionBombError:
        raise InvalidRow("image-too-large", f"{location}: {_TOO_LARGE}") from None
    except Exception as error:  # decoders raise many types for damaged files
        raise InvalidRow("image-unreadable", f"{location}: cannot be decoded: {first_line(error)}") from None
    return image, tuple(notes)


def _to_rgb(image: PIL.Image.Image, notes: list[str], location: str) -> PIL.Image.Image:
    """Convert to RGB: 16-bit grey is scaled (PIL would clip it to white), transparency is put on white."""
    import PIL.Image

    if image.mode in _MODES_16_BIT:
        notes.append("16-bit")
        return PIL.Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in _MODES_32_BIT:
        raise InvalidRow("image-unreadable", f"{location}: pixels of 32 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            notes.append("transparent")
            white = PIL.Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            rgba = PIL.Image.alpha_composite(white, rgba)
        return rgba.convert("RGB")
    return image.convert("RGB")


def open_image(image: Image) -> PIL.Image.Image:
    """Return the pixels as RGB, upright. Raises DataError if the file has changed since the rows were prepared."""
    if image.path.startswith(IN_MEMORY):
        return _decode(base64.b64decode(image.path.removeprefix(IN_MEMORY)), "an image of a request")[0]
    try:
        content = Path(image.path).read_bytes()
    except OSError as error:
        raise DataError(f"{image.path}: {error.strerror}", fix="restore the image") from None
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise DataError(f"{image.path}: the image has changed since the rows were prepared", fix="start again")
    return _decode(content, image.path)[0]


def to_data_url(image: Image) -> str:
    """Return the pixels as a data URL. Raises DataError if the file has changed since the rows were prepared."""
    return _png_data_url(open_image(image))


def thumbnail(image: Image, side: int) -> str:
    """Return a small copy of an image, at most `side` pixels wide and high, as a data URL; "" if its file is gone."""
    try:
        pixels = open_image(image)
    except DataError:
        return ""
    pixels.thumbnail((side, side))
    return _png_data_url(pixels)


def _png_data_url(pixels: PIL.Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


class ImageTable:
    """The images of a run. Each feature of an image has a token id of its own, from FIRST_IMAGE_ID on.

    An image has as many features as there are image tokens in its text, and the same ids wherever it occurs. So equal
    token ids mean equal inputs of the model, also with images.
    """

    def __init__(self) -> None:
        self.images: list[Image] = []
        self.starts: list[int] = []  # the first id of each image
        self._end = FIRST_IMAGE_ID
        self._by_digest: dict[str, int] = {}
        self._lock = Lock()
        self._in_memory: OrderedDict[int, int] = OrderedDict()  # bytes of images that are not in files, by index

    def __len__(self) -> int:
        return len(self.images)

    def add(self, image: Image, tokens: int) -> int:
        """Return the first id of an image, which has `tokens` features. Raises DataError if there are no ids left."""
        if image.digest not in self._by_digest:
            if self._end + tokens > END_IMAGE_ID:
                limit = f"more than {END_IMAGE_ID - FIRST_IMAGE_ID:,} features"
                raise DataError(f"the images have {limit}", fix="train on fewer or smaller images")
            self._by_digest[image.digest] = len(self.images)
            self.images.append(image)
            self.starts.append(self._end)
            self._end += tokens
        number = self._by_digest[image.digest]
        self.keep(number, image)
        return self.starts[number]

    def keep(self, number: int, image: Image) -> None:
        """Keep where an image is read from: its file may have moved, and of old requests only the ids are kept."""
        self.images[number] = image
        if not image.path.startswith(IN_MEMORY):
            return
        with self._lock:  # a server renders prompts and computes images in two threads
            self._in_memory[number] = len(image.path)
            self._in_memory.move_to_end(number)
            while sum(self._in_memory.values()) > MAX_IN_MEMORY_BYTES and len(self._in_memory) > 1:
                old = self._in_memory.popitem(last=False)[0]
                self.images[old] = replace(self.images[old], path="")

    def tokens(self, number: int) -> int:
        """Return the number of features of an image, by its index."""
        return (*self.starts[number + 1 : number + 2], self._end)[0] - self.starts[number]

    def find(self, id: int) -> int:
        """Return the index of the image to which an id belongs."""
        return bisect_right(self.starts, id) - 1

    def spans(self, ids: Ids | Tensor) -> Iterator[tuple[int, int, int]]:
        """Yield index of the image, first and last id of each run of ids of an image. ids (n,): of features only."""
        values, begin = ids.tolist(), 0
        while begin < len(values):
            number = self.find(values[begin])
            limit, end = self.starts[number] + self.tokens(number), begin + 1
            while end < len(values) and values[end] == values[end - 1] + 1 < limit:
                end += 1
            yield number, values[begin], values[end - 1]
            begin = end

    def records(self) -> list[tuple[str, str, int, int, list[str], int]]:
        """Return the images and their numbers of features as JSON values, for `adopt`."""
        return [
            (x.digest, x.path, x.width, x.height, list(x.notes), self.tokens(number))
            for number, x in enumerate(self.images)
        ]

    def adopt(self, records: Sequence[Sequence[Any]]) -> tuple[Any, Any]:
        """Add the images of another table, and return the first ids that they have there and here, (n,) int64."""
        there, here, end = [], [], FIRST_IMAGE_ID
        for digest, path, width, height, notes, tokens in records:
            there.append(end)
            here.append(self.add(Image(digest, path, width, height, tuple(notes)), tokens))
            end += tokens
        return np.array(there, np.int64), np.array(here, np.int64)


def hide_images(ids: Ids | Sequence[int]) -> Ids:
    """Return token ids with 0 in place of the features of images."""
    array = np.asarray(ids, dtype=np.int32)
    return np.where(array >= FIRST_IMAGE_ID, 0, array).astype(np.int32)
