"""Bad images, and texts that do not match their images: each is refused or dropped with file, line and reason."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.config.schema import DataSection
from strop.data import images
from strop.data.converters import parse_request, read_images
from strop.data.formats import ConversationReader
from strop.data.images import FIRST_IMAGE_ID, MAX_BYTES, ImageTable, open_image, read_image
from strop.data.prepare import Prepared, prepare
from strop.data.row_errors import REASONS, InvalidRow, RowError
from strop.data.types import MARK, Image, Row
from strop.errors import DataError
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from tests.support.pictures import BLUE, GREEN, RED, WHITE, data_url, encode, noise, picture, write_picture

ANSWER = {"role": "assistant", "content": "a square"}
PNG = encode(picture())
TOO_LONG = "data:image/png;base64," + "A" * (MAX_BYTES * 4 // 3 + 8)
CODE = base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def tokenizer(seeing_folder: Path) -> Any:
    return load_tokenizer(locate(str(seeing_folder)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", *chunks: bytes) -> bytes:
    """Return a PNG file with a header that may not match its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def grey(value: float, dtype: Any) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((4, 4), value, dtype))


def animated(format: str) -> bytes:
    return encode(picture(), format, save_all=True, append_images=[picture(color=BLUE)])


def cut(format: str, share: float = 0.7) -> bytes:
    content = encode(noise(), format)
    return content[: int(len(content) * share)]


BAD_FILES: dict[str, tuple[str, str, bytes]] = {  # name -> reason, part of the message, content
    "empty.png": ("image-unreadable", "empty", b""),
    "truncated.png": ("image-unreadable", "truncated", cut("PNG")),
    "truncated.jpg": ("image-unreadable", "truncated", cut("JPEG")),
    "truncated.webp": ("image-unreadable", "", cut("WEBP")),
    "truncated.gif": ("image-unreadable", "truncated", cut("GIF")),
    "truncated.tiff": ("image-unreadable", "truncated", cut("TIFF")),
    "header-only.jpg": ("image-unreadable", "Truncated", cut("JPEG", 0.02)),
    "without-end.jpg": ("image-unreadable", "truncated", encode(noise(), "JPEG")[:-2]),
    "flipped-bit.png": ("image-unreadable", "broken", PNG[:50] + bytes([PNG[50] ^ 1]) + PNG[51:]),
    "zero-sized.png": ("image-unreadable", "not an image", png(0, 0)),
    "no-height.png": ("image-unreadable", "not an image", png(5, 0)),
    "zero-sized.gif": ("image-unreadable", "not an image", b"GIF89a\0\0\0\0\0\0\0;"),
    "without-pixels.png": ("image-unreadable", "truncated", png(4, 4)),
    "text.png": ("image-unreadable", "not an image of a known format", b"this is a text\n"),
    "page.jpg": ("image-unreadable", "not an image of a known format", b"<!DOCTYPE html><title>404 Not Found</title>"),
    "lfs.png": ("image-unreadable", "not an image of a known format", b"version https://git-lfs.github.com/spec/v1\n"),
    "drawing.svg": ("image-unreadable", "not an image of a known format", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "photo.heic": ("image-unreadable", "not an image of a known format", b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"),
    "drawing.eps": ("image-unreadable", "not an image of a known format",
                    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
    "document.pdf": ("image-unreadable", "not an image of a known format", b"%PDF-1.4\n"),
    "animated.gif": ("image-animated", "2 frames", animated("GIF")),
    "animated.webp": ("image-animated", "2 frames", animated("WEBP")),
    "animated.png": ("image-animated", "2 frames", animated("PNG")),
    "pages.tiff": ("image-animated", "2 frames", animated("TIFF")),
    "32-bit.tiff": ("image-unreadable", "32 bits", encode(grey(70_000, np.int32), "TIFF")),
    "float.tiff": ("image-unreadable", "32 bits", encode(grey(0.5, np.float32), "TIFF")),
    "bomb.png": ("image-too-large", "50 million pixels", png(100_000, 100_000)),
    "wide.png": ("image-too-large", "50000001 x 1, more than 50 million pixels", png(50_000_001, 1)),
    "bomb.gif": ("image-too-large", "50 million pixels",
                 b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\2\x4c\1\0;"),
    "text-bomb.png": ("image-unreadable", "too large",
                      png(1, 1, bytes(4), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27))))),
    "many-bytes.png": ("image-too-large", "more than 50 MiB", PNG + bytes(MAX_BYTES)),
}  # fmt: skip


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def chat(content: Any = "What is it?", **columns: Any) -> dict[str, Any]:
    return {"messages": [user(content), ANSWER], **columns}


def part(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "image", **fields}, {"type": "text", "text": "What is it?"}]


BAD_ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> reason, part of the message, row
    "missing": ("image-missing", "images: no file", chat(images=["gone.png"])),
    "second is missing": ("image-missing", "images[1]: no file", chat(images=["good.png", "gone.png"])),
    "other case": ("image-missing", "no file", chat(images=["GOOD.png"])),
    "in a folder that is missing": ("image-missing", "no file", chat(image="gone/good.png")),
    "below a file": ("image-missing", "no file", chat(image="good.png/x.png")),
    "a folder": ("image-missing", "is not a file", chat(images=["folder"])),
    "a name with NUL": ("image-missing", "no file", chat(images=["a\0b.png"])),
    "a very long name": ("image-missing", "characters)", chat(images=["x" * 5000])),
    "base64 without a data URL": ("image-missing", "characters)", chat(images=[CODE * 20])),
    "Windows path": ("image-missing", "no file", chat(images=["C:\\images\\a.png"])),
    "http": ("image-url", "http://", chat(images=["http://127.0.0.1:9/a.png"])),
    "https in a part": ("image-url", "HTTPS://", chat([{"type": "image_url", "image_url": {"url": "HTTPS://x.org/a"}}])),
    "bucket": ("image-url", "s3://", chat(images=["s3://bucket/a.png"])),
    "null in a list": ("bad-image", "images[1] is null", chat(images=["good.png", None])),
    "empty string in a list": ("bad-image", "images[1] is empty", chat(images=["good.png", ""])),
    "null in a list of a message": ("bad-image", "messages[0].images is null",
                                    {"messages": [user("a", images=[None]), ANSWER], "images": ["good.png"]}),
    "number": ("bad-image", "images is a number", chat(images=[3])),
    "true": ("bad-image", "image is true or false", chat(image=True)),
    "nested list": ("bad-image", "images is a list", chat(images=[["good.png"]])),
    "pixels": ("bad-image", "images[0] is a list", chat(images=[[[255, 0, 0]], [[255, 0, 0]]])),
    "broken JSON": ("bad-image", "not JSON", chat(images="['good.png']")),
    "object without an image": ("bad-image", "has no path, url or bytes", chat(image={"name": "good.png"})),
    "object with nulls": ("bad-image", "has no path, url or bytes", chat(image={"bytes": None, "path": None})),
    "objects in objects": ("bad-image", "", chat(image={"image": {"image": {"image": 1}}})),
    "part with another key": ("bad-image", "has no path, url or bytes", chat(part(file="good.png"))),
    "part of Anthropic": ("bad-image", "has no path", chat(part(source={"type": "base64", "data": CODE}))),
    "data URL without base64": ("bad-image", "not base64", chat(images=["data:image/png,%89PNG"])),
    "data URL without data": ("image-unreadable", "empty", chat(images=["data:image/png;base64,"])),
    "damaged base64": ("bad-image", "damaged", chat(images=["data:image/png;base64,iVBORw0KG*!"])),
    "cut base64": ("bad-image", "damaged", chat(part(base64=CODE[:-3]))),
    "base64 of a text": ("image-unreadable", "not an image", chat(images=[data_url(b"hello")])),
    "data URL of a video": ("image-unreadable", "not an image", chat(images=[data_url(b"\0\0\0 ftypisom", "mp4")])),
    "too much base64": ("image-too-large", "50 MiB", chat(images=[TOO_LONG])),
    "assistant": ("bad-image", "an assistant message has an image",
                  {"messages": [user("a"), {"role": "assistant", "content": part(path="good.png")}]}),
    "assistant's key": ("bad-image", "messages[1]: an assistant message has an image",
                        {"messages": [user("a"), {**ANSWER, "images": ["good.png"]}]}),
    "tool call": ("bad-image", "messages[1]: an assistant message has an image", {"messages": [
        user("a"), {"role": "function_call", "content": '{"name": "f"}', "images": ["good.png"]}, ANSWER]}),
    "empty prompt with a placeholder elsewhere": ("empty-prompt", "empty", {
        "messages": [user(""), ANSWER, user("<image>"), ANSWER], "images": ["good.png"]}),
    "assistant's placeholder": ("bad-image", "an assistant message has an image",
                                {"messages": [user("a"), {"role": "assistant", "content": "<image>"}],
                                 "images": ["good.png"]}),
    "placeholder without image": ("image-count", "1 place in the text for 0 images", chat("<image>\nWhat is it?")),
    "placeholder and empty column": ("image-count", "1 place in the text for 0 images", chat("<image>a", images=[])),
    "fewer images": ("image-count", "2 places in the text for 1 image", chat("<image><image>", images=["good.png"])),
    "more images": ("image-count", "1 place in the text for 2 images", chat("<image>a", images=["good.png"] * 2)),
    "places in two turns": ("image-count", "2 places in the text for 1 image",
                            {"messages": [user("<image>a"), ANSWER, user("<image>b"), ANSWER], "images": ["good.png"]}),
    "part without image": ("image-count", "1 place in the text for 0 images", chat(part())),
    "fewer parts": ("image-count", "1 place in the text for 2 images", chat(part(), images=["good.png"] * 2)),
    "fewer parts in a message": ("image-count", "messages[0]: 1 place in the text for 2 images",
                                 {"messages": [user(part(), images=["good.png"] * 2), ANSWER]}),
    "images twice": ("image-count", "in a column and in the messages",
                     chat(part(path="good.png"), images=["good.png"])),
    "two columns": ("image-count", "image and images both", chat(image="good.png", images=["good.png"])),
    "wrong order": ("bad-image", "order", chat([{"type": "image", "index": 1}, {"type": "image", "index": 0}],
                                               images=["good.png", "good.png"])),
    "U+FFFC": ("bad-image", "U+FFFC", chat(f"{MARK}What is it?", images=["good.png"])),
    "U+FFFC and placeholder": ("bad-image", "U+FFFC", chat(f"{MARK} <image>", images=["good.png"])),
    "U+FFFC next to a part": ("bad-image", "U+FFFC", chat([*part(path="good.png"), {"type": "text", "text": MARK}])),
    "raw text": ("image-count", "images need messages", {"text": "a text", "images": ["good.png"]}),
    "audio": ("media", "audio", chat(audio="a.wav")),
    "video": ("bad-part", "video", chat([{"type": "video", "video": "a.mp4"}])),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_picture(tmp_path / "good.png")
    (tmp_path / "folder").mkdir()
    return tmp_path


def run(file: Path, tokenizer: Any, *, strict: bool = True, **options: Any) -> Prepared:
    return prepare(DataSection(train=str(file), **options), tokenizer, strict=strict)


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def check_refused(folder: Path, tokenizer: Any, row: dict[str, Any], code: str, what: str) -> None:
    """Check that the second row is refused with its place, and dropped and counted if the recipe says so."""
    assert code in REASONS
    good = {"text": "a text"} if "text" in row else chat(images=["good.png"])
    file = write(folder / "d.jsonl", good, row)
    with pytest.raises(DataError) as caught:
        run(file, tokenizer)
    [place] = caught.value.where
    assert (place.file, place.line) == (str(file), 2)
    assert what in place.what and len(place.what) < 400 and "\n" not in place.what
    assert "Error" not in place.what and "0x" not in place.what  # no names of Python's
    prepared = run(file, tokenizer, bad_rows="drop")
    report = prepared.report.as_json()
    assert report["rows"] == {"read": 2, "used": 1, "truncated": 0, "split": 0, "dropped": 1}
    assert report["by_reason"] == {code: 1} and [example.line for example in prepared.train] == [1]


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_image_file_is_refused_or_dropped(folder: Path, tokenizer: Any, name: str) -> None:
    code, what, content = BAD_FILES[name]
    (folder / name).write_bytes(content)
    check_refused(folder, tokenizer, chat(images=[name]), code, what)
    with pytest.raises(DataError, match=name):
        run(folder / "d.jsonl", tokenizer)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_image_of_a_row_is_refused_or_dropped(folder: Path, tokenizer: Any, name: str) -> None:
    code, what, row = BAD_ROWS[name]
    check_refused(folder, tokenizer, row, code, what)


def test_unreadable_file_is_refused(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes, stat = Path.read_bytes, Path.stat

    def refuse(path: Path) -> bytes:
        if path.name == "secret.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    def refuse_folder(path: Path, **options: Any) -> Any:
        if path.parent.name == "closed":
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "stat", refuse_folder)
    write_picture(folder / "secret.png", 9, 9)
    check_refused(folder, tokenizer, chat(images=["secret.png"]), "image-missing", "secret.png: Permission denied")
    check_refused(folder, tokenizer, chat(images=["closed/a.png"]), "image-missing", "a.png: Permission denied")


def test_every_bad_row_of_a_file_is_listed(folder: Path, tokenizer: Any) -> None:
    for name, (_, _, content) in BAD_FILES.items():
        (folder / name).write_bytes(content)
    rows = [chat(images=[name]) for name in BAD_FILES] + [row for _, _, row in BAD_ROWS.values() if "messages" in row]
    file = write(folder / "d.jsonl", chat(images=["good.png"]), *rows)
    prepared = run(file, tokenizer, bad_rows="drop")
    report = prepared.report.as_json()
    assert len(rows) > 80 and report["rows"]["dropped"] == len(rows) and report["rows"]["used"] == 1
    assert [place["line"] for place in report["dropped"]] == list(range(2, len(rows) + 2))


SCALARS = st.sampled_from([
    None, "", "good.png", "gone.png", "text.png", "<image>", "[]", '["good.png"]', "[1]", "{}", "data:", "a\0", MARK,
    data_url(PNG), 0, 1.5, True, False,
])  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "url", "bytes", "base64", "image", "data", "index", "x"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)
TEXTS = st.lists(st.sampled_from(["<image>", "\n", "q", MARK, "<im_end>", " ", ""]), max_size=5).map("".join)
KINDS = st.sampled_from(["text", "image", "image_url", "input_image", "video", None])
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": KINDS},
        optional={"text": TEXTS, "image": VALUES, "image_url": VALUES, "path": VALUES, "index": SCALARS},
    ),
    max_size=4,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "user", "assistant", "system", "tool"]), "content": TEXTS | PARTS},
        optional={"images": VALUES, "image": VALUES},
    ),
    min_size=1,
    max_size=4,
)
SHAPES = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"images": VALUES, "image": VALUES}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}, optional={"images": VALUES, "image": VALUES}),
    st.fixed_dictionaries({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}, optional={"images": VALUES}),
)


@settings(max_examples=200)
@given(row=SHAPES)
def test_any_row_with_images_is_used_or_has_a_reason(folder: Path, row: dict[str, Any]) -> None:
    (folder / "text.png").write_text("not an image", encoding="utf-8")
    errors: list[RowError] = []
    reader = ConversationReader([Row(str(folder / "d.jsonl"), 7, row)], format=list_format(row), errors=errors)
    conversations = list(reader)
    assert len(errors) + reader.num_used == 1
    for error in errors:
        assert error.code in REASONS and error.where.line == 7 and len(error.where.what) < 400
    given_images = json.dumps(row).count("good.png") + json.dumps(row).count("data:image/png")
    for conversation in conversations:
        for side in conversation.sides:
            for turn in side.messages:
                assert not turn.images or turn.content.count(MARK) == len(turn.images)
                assert not turn.images or ("<image>" not in turn.content and turn.role != "assistant")
            assert sum(len(turn.images) for turn in side.messages) <= given_images


def list_format(row: dict[str, Any]) -> str:
    return "messages" if "messages" in row else "preference" if "chosen" in row else "prompt-completion"


# --- images that are used ----------------------------------------------------------------------------------------


def use(folder: Path, content: bytes) -> tuple[Image, np.ndarray[Any, Any]]:
    """Return an image of a file and its pixels, (height, width, 3)."""
    (folder / "image").write_bytes(content)
    image = read_image("image", folder, "images")
    return image, np.asarray(open_image(image)).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_upright(folder: Path, orientation: int, format: str) -> None:
    upright = PIL.Image.new("RGB", (64, 32), WHITE)
    upright.paste(RED, (0, 0, 32, 16))
    upright.paste(BLUE, (32, 16, 64, 32))
    to_stored = {  # the inverse of what a viewer does for this orientation
        2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
        8: "ROTATE_270",
    }  # fmt: skip
    stored = upright
    if orientation > 1:
        stored = upright.transpose(PIL.Image.Transpose[to_stored[orientation]])
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    image, pixels = use(folder, encode(stored, format, exif=exif, **options))
    assert (image.width, image.height) == (64, 32) and pixels.shape == (32, 64, 3)
    assert image.notes == (("rotated",) if orientation > 1 else ())
    assert np.abs(pixels[4, 4] - RED).max() < 9 and np.abs(pixels[28, 60] - BLUE).max() < 9
    assert np.abs(pixels[4, 60] - WHITE).max() < 9 and np.abs(pixels[28, 4] - WHITE).max() < 9


@pytest.mark.parametrize("value", [0, 9, 300])
def test_unknown_orientations_are_ignored(folder: Path, value: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = value
    assert use(folder, encode(picture(), "JPEG", exif=exif))[0].notes == ()


@pytest.mark.parametrize("exif", [b"Exif\0\0XX", b"Exif\0\0II*\0garbage", b"Exif\0\0"])
def test_damaged_exif_is_ignored(folder: Path, exif: bytes) -> None:
    image, _ = use(folder, encode(picture(), "JPEG", exif=exif))
    assert (image.width, image.notes) == (64, ())


@pytest.mark.parametrize(
    ("content", "color", "notes"),
    [
        (encode(picture(), "JPEG"), RED, ()),
        (encode(picture(color=GREEN).convert("CMYK"), "JPEG"), GREEN, ()),
        (encode(picture(color=BLUE).convert("CMYK"), "TIFF"), BLUE, ()),
        (encode(picture(), "MPO", save_all=True, append_images=[picture(color=BLUE)]), RED, ()),
        (encode(picture(), "BMP"), RED, ()),
        (encode(picture(), "GIF"), RED, ()),
        (encode(picture(), "WEBP", lossless=True), RED, ()),
        (encode(picture().convert("P")), RED, ()),
        (encode(PIL.Image.new("1", (4, 4), 1)), WHITE, ()),
        (encode(PIL.Image.new("L", (4, 4), 7)), (7, 7, 7), ()),
        (encode(PIL.Image.new("LA", (4, 4), (7, 255))), (7, 7, 7), ()),
        (encode(PIL.Image.new("LA", (4, 4), (7, 0))), WHITE, ("transparent",)),
        (encode(PIL.Image.new("RGBA", (4, 4), (*RED, 255))), RED, ()),
        (encode(PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))), WHITE, ("transparent",)),
        (encode(PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 128))), (127, 127, 127), ("transparent",)),
        (encode(PIL.Image.new("P", (4, 4), 0), transparency=0), WHITE, ("transparent",)),
        (encode(PIL.Image.new("L", (4, 4), 7), transparency=7), WHITE, ("transparent",)),
        (encode(picture(), transparency=RED), WHITE, ("transparent",)),
        (encode(grey(0, np.uint16)), (0, 0, 0), ("16-bit",)),
        (encode(grey(300, np.uint16)), (1, 1, 1), ("16-bit",)),
        (encode(grey(32_896, np.uint16)), (128, 128, 128), ("16-bit",)),
        (encode(grey(65_535, np.uint16)), WHITE, ("16-bit",)),
        (encode(grey(32_896, np.uint16), "TIFF"), (128, 128, 128), ("16-bit",)),
    ],
)  # fmt: skip
def test_every_kind_of_pixels_becomes_rgb(folder: Path, content: bytes, color: Any, notes: tuple[str, ...]) -> None:
    image, pixels = use(folder, content)
    assert image.notes == notes
    assert np.abs(pixels - color).max() <= 3


def test_what_is_done_to_pixels_is_counted(folder: Path, tokenizer: Any) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encode(picture(), "JPEG", exif=exif))
    (folder / "clear.png").write_bytes(encode(PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0))))
    names = ("turned.jpg", "good.png", "clear.png", "turned.jpg")
    file = write(folder / "d.jsonl", *(chat(f"What is it, {i}?", images=[name]) for i, name in enumerate(names)))
    warnings = run(file, tokenizer).report.warnings
    assert f"2 rows have images that were turned as their EXIF orientation says (first {file}:1)" in warnings
    assert f"1 rows have images with transparency, which is put on white (first {file}:3)" in warnings


def test_images_of_system_and_tool_messages_are_used_if_the_template_shows_them(folder: Path, tokenizer: Any) -> None:
    messages = [{"role": "system", "content": part(path="good.png")}, user("a"), ANSWER]
    tool = [user("a"), {"role": "tool", "content": part(path="good.png")}, ANSWER]
    prepared = run(write(folder / "d.jsonl", {"messages": messages}, {"messages": tool}), tokenizer)
    assert [int((example.ids >= FIRST_IMAGE_ID).sum() > 0) for example in prepared.train] == [1, 1]


def test_template_that_loses_images_refuses_them(folder: Path, tokenizer: Any) -> None:
    template = tokenizer.chat_template.replace("<image>", "")
    (folder / "t.jinja").write_text(template, encoding="utf-8")
    file = write(folder / "d.jsonl", chat(images=["good.png"]))
    with pytest.raises(DataError, match="cannot be used") as caught:
        run(file, tokenizer, template=str(folder / "t.jinja"))
    assert "does not show an image" in caught.value.where[0].what


@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ '' + m.content }}"])  # that shows parts, or refuses them
def test_model_of_texts_refuses_images(folder: Path, content: str) -> None:
    from tests.support import families

    text = families.tokenizer("chatml")
    turn = "<|im_start|>{{ m.role }}\n" + content + "<|im_end|>\n"
    text.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    text.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    file = write(folder / "d.jsonl", chat(images=["good.png"]), chat("b"))
    with pytest.raises(DataError, match="cannot be used") as caught:
        run(file, text)
    assert caught.value.where[0].line == 1 and "the model reads only text" in caught.value.where[0].what


def test_more_features_than_token_ids_are_refused() -> None:
    table = ImageTable()
    assert table.add(Image("a", "a", 1, 1), (1 << 30) - 4) == FIRST_IMAGE_ID
    assert table.add(Image("b", "b", 1, 1), 4) == (1 << 31) - 4
    with pytest.raises(DataError, match="more than 1,073,741,824 features"):
        table.add(Image("c", "c", 1, 1), 1)


# --- requests to a server ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "good.png", "/etc/hostname", "file:///etc/hostname", "~/good.png", "http://127.0.0.1:9/", "ftp://x/a.png",
        "//x/a.png", "gopher://x", {"url": "good.png"}, {"path": "good.png"}, {"bytes": "good.png"}, {"url": ["a"]},
        {"url": {"url": {"url": "good.png"}}}, "", " data:image/png;base64,", "data:image/png,a", 3, True, ["good.png"],
        {"base64": "good.png"}, {"data": 1}, {}, TOO_LONG,
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_requests_read_only_data_urls(folder: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.chdir(folder)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file was read")

    monkeypatch.setattr(images, "_read_file", fail)
    for field in ("image_url", "image", "url", "path", "base64"):
        message = user([{"type": "image_url" if field == "image_url" else "image", field: value}])
        with pytest.raises(InvalidRow):
            read_images(parse_request({"messages": [message]}), None)
    for content in (user("a", images=[value]), user("<image>a", image=value)):
        with pytest.raises(InvalidRow):
            read_images(parse_request({"messages": [content]}), None)


def test_requests_have_images_as_data_urls() -> None:
    url = data_url(PNG)
    for message in (
        user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": url, "detail": "high"}}]),
        user([{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": url}]),
        user("a<image>", images=[url]),
    ):
        [turn] = read_images(parse_request({"messages": [message]}), None).messages
        assert turn.content == f"a{MARK}" and (turn.images[0].width, turn.images[0].height) == (64, 48)


def test_image_tag_in_a_request_is_text() -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
    message = user([part, {"type": "text", "text": "the <image> tag"}])
    [turn] = read_images(parse_request({"messages": [message]}), None, conversation=True).messages
    assert turn.content == f"{MARK}the <image> tag" and len(turn.images) == 1


def test_image_on_a_network_is_refused_with_the_reason() -> None:
    message = user([{"type": "image_url", "image_url": {"url": "https://host/a.png"}}])
    with pytest.raises(InvalidRow) as caught:
        read_images(parse_request({"messages": [message]}), None, conversation=True)
    assert "https://host/a.png is on a network: give the image as a data URL" in caught.value.what


def test_images_of_a_request_are_limited_together() -> None:
    url = data_url(encode(PIL.Image.new("1", (5000, 4000))))
    for number in (2, 3):
        messages = [user([{"type": "image_url", "image_url": {"url": url}}] * number)]
        if number == 2:
            assert len(read_images(parse_request({"messages": messages}), None).messages[0].images) == 2
        else:
            with pytest.raises(InvalidRow, match="more than 50 million pixels together"):
                read_images(parse_request({"messages": messages}), None)
