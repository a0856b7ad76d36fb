"""Images in every form of row and file, and what is done with them from the first run to the next."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import PIL.Image
import pyarrow
import pytest
from pyarrow import ipc, parquet
from rich.console import Console

from strop.config.schema import DataSection
from strop.data import check
from strop.data.converters import parse_request, read_images
from strop.data.formats import ConversationReader
from strop.data.images import FIRST_IMAGE_ID, hide_images, open_image, read_image
from strop.data.prepare import Prepared, prepare
from strop.data.reading.in_memory import find_rows, write_rows
from strop.data.reading.sources import read_rows
from strop.data.row_errors import RowError
from strop.data.store import dump_conversation, request_message
from strop.data.types import MARK, Conversation, DataKind
from strop.errors import DataError, FolderError
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer
from tests.support.pictures import BLUE, GREEN, RED, data_url, encode, picture, write_picture

ANSWER = {"role": "assistant", "content": "a square"}
QUESTION = "What is it?"
PNG = encode(picture(64, 48, RED))
URL = data_url(PNG)
THREE = ["a.png", "b.png", "c.png"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with a.png (red), b.png (green) and c.png (blue), and another one the current folder."""
    data = tmp_path / "data"
    for name, size, color in (("a", (64, 48), RED), ("b", (40, 40), GREEN), ("c", (20, 60), BLUE)):
        write_picture(data / f"{name}.png", *size, color)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return data


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(spec: str, data_kind: DataKind = "turns", **options: Any) -> list[Conversation]:
    """Return the conversations of a file without errors."""
    data, errors = DataSection(train=spec, **options), list[RowError]()
    rows = read_rows(spec, columns=data.columns, errors=errors)
    reader = ConversationReader(
        rows, format=data.format, columns=data.columns, errors=errors, data_kind=data_kind,
        image_folder=data.image_folder,
    )  # fmt: skip
    conversations = list(reader)
    assert errors == []
    return conversations


def read_memory(value: Any) -> list[Conversation]:
    rows = find_rows(value)
    assert rows is not None
    return read(write_rows("rows", rows))


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def parts(*items: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]


def colors(conversation: Conversation) -> list[tuple[int, ...]]:
    """Return the color of each image of the messages, in order."""
    images = [open_image(image) for turn in conversation.messages for image in turn.images]
    return [tuple(np.asarray(image)[0, 0].tolist()) for image in images]


# --- rows --------------------------------------------------------------------------------------------------------


def one_image_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows with the red image and the question, in every form, each with a name."""
    plain, placed = [user(QUESTION), ANSWER], [user(f"<image>{QUESTION}"), ANSWER]
    path, code = str(folder / "a.png"), base64.b64encode(PNG).decode()
    for name, value in (
        ("relative path", "a.png"), ("dot path", "./a.png"), ("path up", "../data/a.png"), ("absolute path", path),
        ("file url", f"file://{path}"), ("data url", URL), ("data url of jpeg", URL.replace("/png", "/jpeg")),
        ("object with path", {"path": "a.png"}), ("object with null bytes", {"bytes": None, "path": "a.png"}),
        ("object with url", {"url": URL}), ("object with base64", {"base64": code}),
    ):  # fmt: skip
        yield f"image: {name}", {"messages": plain, "image": value}
        yield f"images: {name}", {"messages": plain, "images": [value]}
        yield f"part image: {name}", {"messages": [user(parts({"type": "image", "image": value}, QUESTION)), ANSWER]}
        content = parts({"type": "image_url", "image_url": value}, QUESTION)
        yield f"part image_url: {name}", {"messages": [user(content), ANSWER]}
    yield "images: a string", {"messages": plain, "images": "a.png"}
    yield "images: JSON", {"messages": plain, "images": '["a.png"]'}
    yield "both columns, one empty", {"messages": plain, "image": "a.png", "images": []}
    for name, text in (("", "<image>"), (" and newline", "<image>\n"), (" after a newline", "\n<image>")):
        row = {"messages": [user(f"{text}{QUESTION}"), ANSWER], "images": ["a.png"]}
        yield f"placeholder{name}", row
        turns = [{"from": "human", "value": f"{text}{QUESTION}"}, {"from": "gpt", "value": "a square"}]
        yield f"LLaVA{name}", {"id": "1", "conversations": turns, "image": "a.png"}
    for name, part in (
        ("OpenAI chat", {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}),
        ("OpenAI responses", {"type": "input_image", "image_url": URL, "detail": "low"}),
        ("transformers path", {"type": "image", "path": "a.png"}),
        ("transformers url", {"type": "image", "url": URL}),
        ("transformers base64", {"type": "image", "base64": code}),
    ):
        yield name, {"messages": [user(parts(part, QUESTION)), ANSWER]}
    content = [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": QUESTION}]
    yield "input_text", {"messages": [user(content), ANSWER]}
    for name, part in (
        ("part without image", {"type": "image"}),
        ("part with nulls", {"type": "image", "text": None, "image": None}),
        ("part with an index", {"type": "image", "index": 0, "text": None}),
    ):
        yield name, {"messages": [user(parts(part, QUESTION)), ANSWER], "images": ["a.png"]}
        yield f"{name} in a message", {"messages": [user(parts(part, QUESTION), images=["a.png"]), ANSWER]}
    yield "images of a message", {"messages": [user(QUESTION, images=["a.png"]), ANSWER]}
    yield "image of a message", {"messages": [user(f"<image>{QUESTION}", image="a.png"), ANSWER]}
    yield "images of a message with parts", {"messages": [user(parts(QUESTION), images=["a.png"]), ANSWER]}
    yield "question-answer", {"question": QUESTION, "answer": "a square", "image": "a.png"}
    yield "prompt-completion", {"prompt": QUESTION, "completion": "a square", "images": ["a.png"]}
    yield "prompt-completion with messages", {"prompt": placed[:1], "completion": placed[1:], "images": ["a.png"]}
    yield "alpaca", {"instruction": QUESTION, "input": "", "output": "a square", "images": ["a.png"]}
    yield "messages as JSON", {"messages": json.dumps(placed), "images": '["a.png"]'}


def test_every_form_of_an_image_gives_the_same_conversation(folder: Path) -> None:
    rows = dict(one_image_rows(folder))
    conversations = dict(zip(rows, [read(write(folder / "d.jsonl", row))[0] for row in rows.values()], strict=True))
    different = {
        name: turns.messages
        for name, turns in conversations.items()
        if turns.messages[0].content != f"{MARK}{QUESTION}" or colors(turns) != [RED]
    }
    assert different == {} and len(rows) > 60
    assert len({dump_conversation(turns) for turns in conversations.values()}) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("<image> then <image>?"), ANSWER, user("And <image>\n?"), ANSWER], "images": THREE},
        {
            "messages": [
                user(parts({"type": "image", "path": "a.png"}, " then ", {"type": "image", "image": "b.png"}, "?")),
                ANSWER,
                user(parts("And ", {"type": "image", "path": "c.png"}, "?")), ANSWER,
            ]
        },
        {
            "messages": [
                user(parts({"type": "image"}, " then ", {"type": "image", "path": "b.png"}, "?")), ANSWER,
                user("And <image>?"), ANSWER,
            ],
            "images": ["a.png", "c.png"],
        },
        {
            "messages": [
                user("<image> then <image>?", images=["a.png", "b.png"]), ANSWER,
                user(parts("And ", {"type": "image"}, "?"), image="c.png"), ANSWER,
            ]
        },
        {
            "messages": [
                user(parts({"type": "image", "index": 0}, " then ", {"type": "image", "index": 1}, "?")), ANSWER,
                user(parts("And ", {"type": "image", "index": 2}, "?")), ANSWER,
            ],
            "images": THREE,
        },
        {
            "prompt": "And <image>?", "completion": "a square", "history": [["<image> then <image>?", "a square"]],
            "images": THREE,
        },
    ],
)  # fmt: skip
def test_several_images_keep_their_places_in_several_turns(folder: Path, row: dict[str, Any]) -> None:
    [conversation] = read(write(folder / "d.jsonl", row))
    contents = [turn.content for turn in conversation.messages]
    assert contents == [f"{MARK} then {MARK}?", "a square", f"And {MARK}?", "a square"]
    assert colors(conversation) == [RED, GREEN, BLUE]
    assert [len(turn.images) for turn in conversation.messages] == [2, 0, 1, 0]


def test_images_without_places_are_at_the_start_of_the_first_user_message(folder: Path) -> None:
    messages = [{"role": "system", "content": "s"}, user("q"), ANSWER, user("r"), ANSWER]
    [conversation] = read(write(folder / "d.jsonl", {"messages": messages, "images": ["b.png", "a.png"]}))
    assert conversation.messages[1].content == f"{MARK}{MARK}q" and colors(conversation) == [GREEN, RED]


def test_an_image_is_enough_for_a_user_message(folder: Path) -> None:
    rows = [
        {"messages": [user(""), ANSWER], "images": ["a.png"]},
        {"messages": [user(None, images=["a.png"]), ANSWER]},
        {"messages": [user(parts({"type": "image", "path": "a.png"})), ANSWER]},
        {"messages": [user("<image>"), ANSWER], "image": "a.png"},
        {"prompt": "", "completion": "a square", "image": "a.png"},
        {"instruction": "", "input": "", "output": "a square", "image": "a.png"},
    ]
    for row in rows:
        [conversation] = read(write(folder / "d.jsonl", row))
        assert conversation.messages[0].content == MARK and colors(conversation) == [RED]
    [prompt] = read(write(folder / "d.jsonl", {"prompt": "", "images": ["a.png"]}), "prompts")
    assert prompt.messages[0].content == MARK


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<image>q", "chosen": "yes", "rejected": "no", "images": ["a.png"]},
        {"prompt": "q", "chosen": "yes", "rejected": "no", "image": "a.png"},
        {"prompt": [user("q", images=["a.png"])], "chosen": "yes", "rejected": "no"},
        {"prompt": [user(parts({"type": "image", "image": URL}, "q"))], "chosen": "yes", "rejected": "no"},
        {"prompt": [user(parts({"type": "image"}, "q"))], "chosen": [{**ANSWER, "content": "yes"}],
         "rejected": [{**ANSWER, "content": "no"}], "images": ["a.png"]},
        {"chosen": [user(parts({"type": "image"}, "q")), {**ANSWER, "content": "yes"}],
         "rejected": [user(parts({"type": "image"}, "q")), {**ANSWER, "content": "no"}], "images": ["a.png"]},
        {"prompt": "q", "answers": ["no", "yes"], "scores": [0, 1], "images": ["a.png"]},
    ],
)  # fmt: skip
def test_both_sides_of_a_pair_have_the_image(folder: Path, row: dict[str, Any]) -> None:
    [pair] = read(write(folder / "d.jsonl", row), "pairs")
    prompts = [side.messages[0] for side in pair.sides]
    assert prompts[0] == prompts[1] and prompts[0].content == f"{MARK}q" and len(prompts[0].images) == 1
    assert [side.messages[1].content for side in pair.sides] == ["yes", "no"]


def test_prompts_and_labelled_answers_have_images(folder: Path) -> None:
    [prompt] = read(write(folder / "p.jsonl", {"prompt": "q", "images": ["a.png"]}), "prompts")
    label = {"prompt": "q", "completion": "a", "label": True, "images": ["a.png"]}
    [labelled] = read(write(folder / "l.jsonl", label), "labels")
    texts = {"messages": [user("<image>\nq")], "label": "red", "images": ["a.png"]}
    [classified] = read(write(folder / "c.jsonl", texts), "classes")
    assert [turns.messages[0].content for turns in (prompt, labelled, classified)] == [f"{MARK}q"] * 3
    assert [colors(turns) for turns in (prompt, labelled, classified)] == [[RED]] * 3


# --- files -------------------------------------------------------------------------------------------------------


def test_columns_and_the_folder_of_images_are_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        folder.parent / "d.jsonl", {"q": QUESTION, "a": "a square", "pictures": ["a.png"], "images": "nothing"}
    )
    columns = {"prompt": "q", "completion": "a", "images": "pictures"}
    for chosen in (str(folder), os.path.join("..", "data")):
        [conversation] = read(file, columns=columns, image_folder=chosen)
        assert colors(conversation) == [RED]
    monkeypatch.setenv("HOME", str(folder.parent))
    [conversation] = read(file, columns=columns, image_folder="~/data")
    assert colors(conversation) == [RED]
    [without] = read(file, columns={"prompt": "q", "completion": "a"})
    assert colors(without) == []


@pytest.mark.parametrize("name", ["a b.png", "ünï-図.png", "[1].png", "a#b?.png", "%41.png", "a.PNG", "no suffix"])
def test_unusual_file_names_are_found(folder: Path, name: str) -> None:
    write_picture(folder / "sub" / name, 8, 8, BLUE)
    [conversation] = read(write(folder / "d.jsonl", {"prompt": "q", "completion": "a", "images": [f"sub/{name}"]}))
    assert colors(conversation) == [BLUE]


def test_home_and_quoted_file_urls_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    write_picture(folder / "a b.png", 8, 8, BLUE)
    paths = ["~/a b.png", f"file://{folder}/a%20b.png", f"file://{folder}/a b.png", (folder / "a b.png").as_uri()]
    rows = [{"prompt": "q", "completion": "a", "image": path} for path in paths]
    assert [colors(turns) for turns in read(write(folder.parent / "d.jsonl", *rows))] == [[BLUE]] * 4


@pytest.mark.parametrize("cell", ["a.png", '["a.png"]', ' [ "a.png" ] ', URL, json.dumps([URL]), '[{"path": "a.png"}]'])
def test_cells_of_tables_have_paths_or_json(folder: Path, cell: str) -> None:
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        out = io.StringIO()
        csv.writer(out, delimiter=separator).writerows(
            [["prompt", "completion", "images"], [QUESTION, "a square", cell]]
        )
        (folder / f"d{suffix}").write_text(out.getvalue(), encoding="utf-8")
        assert [colors(turns) for turns in read(str(folder / f"d{suffix}"))] == [[RED]]


def test_empty_cells_and_null_columns_are_rows_without_images(folder: Path) -> None:
    (folder / "d.csv").write_text("prompt,completion,images\nq,a,\nq,b,[]\n", encoding="utf-8")
    assert [colors(turns) for turns in read(str(folder / "d.csv"))] == [[], []]
    rows = [{"prompt": "q", "completion": "a", "images": None}, {"prompt": "q", "completion": "b", "image": ""}]
    assert [colors(turns) for turns in read(write(folder / "d.jsonl", *rows))] == [[], []]


IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def image_table(cells: list[Any], *, several: bool) -> pyarrow.Table:
    """Return a table with the Image feature, as datasets writes it."""
    kind = pyarrow.list_(IMAGE) if several else IMAGE
    column = pyarrow.array([[cell] for cell in cells] if several else cells, kind)
    texts = {"prompt": [QUESTION] * len(cells), "completion": ["a square"] * len(cells)}
    return pyarrow.table({**texts, "images" if several else "image": column})


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables_with_the_image_feature_are_read(folder: Path, kind: str, several: bool) -> None:
    cells = [{"bytes": PNG, "path": None}, {"bytes": PNG, "path": "gone.png"}, {"bytes": None, "path": "a.png"}] * 20
    table = image_table(cells, several=several)
    file = folder / ("d.parquet" if kind == "parquet" else "d.arrow")
    if kind == "parquet":
        parquet.write_table(table, file)
    else:
        with (ipc.new_stream if kind == "stream" else ipc.new_file)(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=25)
    conversations = read(str(file))
    assert [turns.line for turns in conversations] == list(range(1, 61))
    assert all(colors(turns) == [RED] for turns in conversations)
    assert len({dump_conversation(turns) for turns in conversations}) == 1


def image_dataset(folder: Path) -> datasets.Dataset:
    features = datasets.Features({
        "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "images": datasets.List(datasets.Image()),
    })  # fmt: skip
    columns = {"messages": [[user(QUESTION), ANSWER]] * 3, "images": [[str(folder / "a.png")], [picture()], []]}
    return datasets.Dataset.from_dict(columns, features)


def test_folders_of_save_to_disk_are_read(folder: Path) -> None:
    data = image_dataset(folder)
    data.save_to_disk(folder / "saved", num_shards=2)
    assert [colors(turns) for turns in read(str(folder / "saved"))] == [[RED], [RED], []]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(folder / "splits")
    assert len(read(str(folder / "splits" / "test"))) == 3
    with pytest.raises(DataError) as caught:
        read(str(folder / "splits"))
    assert str(folder / "splits" / "train") in caught.value.fix
    (folder / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"although state\.json names it"):
        read(str(folder / "saved"))
    (folder / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../../a.arrow"}]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"saved.a\.arrow"):  # not a file outside the folder
        read(str(folder / "saved"))


# --- rows in memory ----------------------------------------------------------------------------------------------


def test_images_in_memory_are_read(folder: Path) -> None:
    red = picture()
    images = [
        red, PNG, bytearray(PNG), memoryview(PNG), folder / "a.png", str(folder / "a.png"), URL, {"bytes": PNG},
        red.convert("RGBA"), red.convert("P"), red.convert("CMYK"), red.convert("YCbCr"),
        PIL.Image.open(folder / "a.png"),
    ]  # fmt: skip
    rows = [{"prompt": QUESTION, "completion": "a square", "images": [image]} for image in images]
    rows += [{"messages": [user(parts({"type": "image", "image": image}, QUESTION)), ANSWER]} for image in images]
    for row in rows:
        [conversation] = read_memory([row])
        assert conversation.messages[0].content == f"{MARK}{QUESTION}"
        assert np.abs(np.subtract(colors(conversation), [RED])).max() <= 2  # YCbCr is rounded


def test_tables_in_memory_are_read(folder: Path) -> None:
    frame = pandas.DataFrame({"prompt": ["q", "r"], "completion": ["a", "b"], "image": [picture(), None]})
    assert [colors(turns) for turns in read_memory(frame)] == [[RED], []]
    assert [colors(turns) for turns in read_memory(image_table([{"bytes": PNG, "path": None}], several=True))] == [
        [RED]
    ]
    dataset = image_dataset(folder)
    for value in (dataset, dataset.to_iterable_dataset()):
        conversations = read_memory(value)
        assert [colors(turns) for turns in conversations] == [[RED], [RED], []]
        assert conversations[0].messages[0].images[0].digest == read(str_of_png(folder))[0].messages[0].images[0].digest
    assert isinstance(dataset[0]["images"][0], PIL.Image.Image)  # unchanged


def str_of_png(folder: Path) -> str:
    return write(folder / "one.jsonl", {"prompt": "q", "completion": "a", "image": "a.png"})


def test_bytes_in_memory_are_never_text() -> None:
    for row in ({"text": b"abc"}, {"prompt": "q", "completion": b"abc"}, {"messages": [user(b"abc"), ANSWER]}):
        errors: list[RowError] = []
        rows = read_rows(write_rows("rows", [row]), errors=errors)
        try:
            conversations = list(ConversationReader(rows, errors=errors))
        except DataError:
            continue
        assert conversations == [] and len(errors) == 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_in_memory_that_a_file_would_change_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match="row 2: a PIL image: pixels of 32 bits"):
        write_rows("rows", [{"prompt": "q"}, {"prompt": "q", "image": PIL.Image.new(mode, (4, 4))}])


@pytest.mark.parametrize("mode", ["I;16B", "RGBa", "La"])
def test_pil_images_of_rare_modes_keep_brightness_and_transparency(mode: str) -> None:
    if mode == "I;16B":
        image = PIL.Image.frombytes(mode, (2, 1), bytes([64, 0, 255, 255]))
        expected = [(63, 63, 63), (255, 255, 255)]
    else:
        plain = PIL.Image.frombytes("RGBA", (2, 1), bytes([0, 0, 0, 255, 0, 0, 0, 0]))
        image = plain.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
        expected = [(0, 0, 0), (255, 255, 255)]  # transparent parts are put on white
    shown = open_image(read_image(image, None, "image"))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == expected


def test_animations_in_memory_are_refused() -> None:
    frames = encode(picture(), "GIF", save_all=True, append_images=[picture(color=BLUE)])
    with pytest.raises(DataError, match="row 1: a PIL image: 2 frames"):
        write_rows("rows", [{"prompt": "q", "image": PIL.Image.open(io.BytesIO(frames))}])


def test_a_server_gets_images_as_data_urls(folder: Path) -> None:
    row = {"messages": [user("<image>\nWhat?"), {**ANSWER, "weight": 0}], "images": ["a.png"]}
    [conversation] = read(write(folder / "d.jsonl", row))
    question, answer = map(request_message, conversation.messages)
    assert answer == ANSWER and str(folder) not in json.dumps(question)
    [sent] = read_images(parse_request({"messages": [question]}), None).messages
    assert sent.content == f"{MARK}What?"
    assert colors(dataclasses.replace(conversation, messages=(sent,))) == [RED]


# --- preparation -------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(seeing_folder: Path) -> Any:
    return load_tokenizer(locate(str(seeing_folder)))


def run(
    train: str, tokenizer: Any, *, data_kind: DataKind = "turns", cache: Path | None = None, **options: Any
) -> Prepared:
    return prepare(DataSection(train=train, **options), tokenizer, data_kind=data_kind, cache=cache)


def chat(text: str = QUESTION, *images: str, answer: str = "a square") -> dict[str, Any]:
    return {"messages": [user(text), {**ANSWER, "content": answer}], "images": list(images)}


def shown(prepared: Prepared) -> list[list[tuple[int, ...]]]:
    """Return the colors of the images of each training example, found by their token ids."""
    table = prepared.renderer.image_table
    assert table is not None
    result = []
    for example in prepared.train:
        ids = example.ids[example.ids >= FIRST_IMAGE_ID]
        numbers = dict.fromkeys(table.find(int(id)) for id in ids)
        assert sum(map(table.tokens, numbers)) == len(ids)
        pixels = [np.asarray(open_image(table.images[number]))[0, 0] for number in numbers]
        result.append([tuple(pixel.tolist()) for pixel in pixels])
    return result


def test_changed_images_are_prepared_again(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = write(folder / "d.jsonl", chat(QUESTION, "a.png"))
    first = run(file, tokenizer, cache=tmp_path / "cache")
    assert shown(first) == [[RED]]
    [store] = (tmp_path / "cache").glob("*/facts.json")
    written = store.stat().st_mtime_ns
    assert shown(run(file, tokenizer, cache=tmp_path / "cache")) == [[RED]]
    assert store.stat().st_mtime_ns == written  # reused
    write_picture(folder / "a.png", 30, 30, BLUE)
    with pytest.raises(DataError, match="the image has changed since the rows were prepared"):
        shown(first)
    assert shown(run(file, tokenizer, cache=tmp_path / "cache")) == [[BLUE]]
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match="No such file"):
        shown(first)
    with pytest.raises(DataError) as caught:
        run(file, tokenizer, cache=tmp_path / "cache")
    assert caught.value.where[0].what.startswith("images: no file")


def test_restored_image_is_found_by_the_next_run(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = write(folder / "d.jsonl", chat(QUESTION, "a.png"), chat("And this?", "new.png"))
    options: dict[str, Any] = {"cache": tmp_path / "cache", "bad_rows": "drop"}
    for content in (None, b"", encode(picture(40, 40, BLUE))[:60]):
        if content is not None:
            (folder / "new.png").write_bytes(content)
        assert shown(run(file, tokenizer, **options)) == [[RED]]
    write_picture(folder / "new.png", 30, 30, BLUE)
    assert shown(run(file, tokenizer, **options)) == [[RED], [BLUE]]


def test_folders_with_equal_rows_and_other_images_are_not_confused(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, cache = chat(QUESTION, "a.png"), tmp_path / "cache"
    other = tmp_path / "other"
    write_picture(other / "a.png", 64, 48, BLUE)
    for name, color in ((folder, RED), (other, BLUE)):
        write(name / "d.jsonl", row)
        monkeypatch.chdir(name)
        assert shown(run("d.jsonl", tokenizer, cache=cache)) == [[color]]
    for name, color in ((folder, RED), (other, BLUE)):
        assert shown(run("d.jsonl", tokenizer, cache=cache, image_folder=str(name))) == [[color]]


def test_moved_folder_is_read_at_its_new_place(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    write(folder / "d.jsonl", chat(QUESTION, "a.png"))
    assert shown(run(str(folder / "d.jsonl"), tokenizer, cache=tmp_path / "cache")) == [[RED]]
    moved = folder.rename(tmp_path / "moved")
    prepared = run(str(moved / "d.jsonl"), tokenizer, cache=tmp_path / "cache")
    assert shown(prepared) == [[RED]]
    assert prepared.train_conversations[0].messages[0].images[0].path == str(moved / "a.png")


def test_one_picture_under_two_names_is_a_repeated_row(folder: Path, tokenizer: Any) -> None:
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    rows = [chat(QUESTION, name) for name in ("a.png", "b.png", "copy.png", URL)]
    prepared = run(write(folder / "d.jsonl", *rows), tokenizer)
    assert "2 training rows repeat an earlier one" in prepared.report.warnings
    first, other, copy, same = (example.ids.tolist() for example in prepared.train)
    assert first == copy == same != other
    evaluated = run(write(folder / "d.jsonl", *rows[:2]), tokenizer, eval=write(folder / "e.jsonl", rows[2]))
    assert "1 evaluation row is also a training row" in evaluated.report.warnings


def test_token_ids_of_training_and_evaluation_images_differ(
    folder: Path, tokenizer: Any, seeing_folder: Path, tmp_path: Path
) -> None:
    train = write(folder / "t.jsonl", chat("<image>x<image>", "a.png", "b.png"), chat("y", "c.png"))
    held_out = write(folder / "e.jsonl", chat("z", "c.png"), chat("<image>x<image>", "b.png", "a.png"))
    expected = {train: [[RED, GREEN], [BLUE]], held_out: [[BLUE], [GREEN, RED]]}
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        for first, second in ((train, held_out), (held_out, train)):
            own = load_tokenizer(locate(str(seeing_folder)))
            prepared = run(first, own, cache=cache, eval=second)
            assert prepared.eval is not None
            assert shown(prepared) == expected[first]
            assert shown(dataclasses.replace(prepared, train=prepared.eval)) == expected[second]
            ids = [{*example.ids[example.ids >= FIRST_IMAGE_ID].tolist()} for example in prepared.train]
            others = [{*example.ids[example.ids >= FIRST_IMAGE_ID].tolist()} for example in prepared.eval]
            assert ids[0] == others[1] and ids[1] == others[0]  # the same pictures
            assert not ids[0] & ids[1]


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_no_image_token_is_supervised(folder: Path, tokenizer: Any, loss: str) -> None:
    rows = [
        chat("<image> and <image>?", "a.png", "b.png"),
        {"messages": [user("a"), ANSWER, user("<image>b"), ANSWER, user("c"), ANSWER], "images": ["c.png"]},
        chat("<|im_end|> is <image> text <fake_token_around_image>", "a.png"),
    ]
    prepared = run(write(folder / "d.jsonl", *rows), tokenizer, loss=loss)
    table = prepared.renderer.image_table
    assert table is not None and len(table) == 3
    image_token = tokenizer.image_encoder.image_token_id
    for example, conversation in zip(prepared.train, prepared.train_conversations, strict=True):
        is_image = example.ids >= FIRST_IMAGE_ID
        assert is_image.sum() == sum(
            tokenizer.image_encoder.expand(image.width, image.height).tokens
            for turn in conversation.messages
            for image in turn.images
        )
        assert not example.weights[is_image].any() and image_token not in example.ids
        supervised = tokenizer.decode(example.ids[example.weights > 0])
        assert "a square<|im_end|>" in supervised
        prompt = prepared.renderer.prompt(conversation.messages[:-1])
        assert example.ids[: len(prompt)].tolist() == prompt.tolist()
    assert "<|im_end|> is " in tokenizer.decode(hide_images(prepared.train[2].ids))


@pytest.mark.parametrize("overlong", ["refuse", "drop", "truncate-start", "split"])
def test_row_with_an_image_is_never_cut(folder: Path, tokenizer: Any, overlong: str) -> None:
    long = {"messages": [user("word " * 60), ANSWER, user("<image>b"), ANSWER], "images": ["a.png"]}
    file = write(folder / "d.jsonl", chat("a", "a.png"), long)
    data = DataSection(train=file, overlong=overlong, max_length=80, bad_rows="drop")
    prepared = prepare(data, tokenizer, strict=False)
    assert shown(prepared) == [[RED]] and prepared.report.by_reason == {"too-long": 1}
    assert (prepared.refusal is None) == (overlong != "refuse")


def test_fix_for_long_rows_with_images_does_not_offer_to_shorten_them(folder: Path, tokenizer: Any) -> None:
    image = {"messages": [user("<image>" + "word " * 60), ANSWER], "images": ["a.png"]}
    text = {"messages": [user("word " * 99), ANSWER]}
    for rows, fix in (
        ([image], "or choose --data.overlong drop"),
        ([image, text], "drop or truncate-start or split (1 of them can only be dropped: it has images)"),
    ):
        file = write(folder / "d.jsonl", chat("a", "a.png"), *rows)
        refusal = prepare(DataSection(train=file, max_length=80), tokenizer, strict=False).refusal
        assert refusal is not None and refusal.fix is not None and refusal.fix.endswith(fix)


def test_pairs_have_equal_prompts_with_the_same_image_tokens(folder: Path, tokenizer: Any) -> None:
    row = {"prompt": "<image>q", "chosen": "yes", "rejected": "no", "images": ["a.png"]}
    prepared = run(write(folder / "d.jsonl", row), tokenizer, data_kind="pairs")
    chosen, rejected = prepared.train
    length = chosen.prompt_length
    assert (chosen.ids[:length] >= FIRST_IMAGE_ID).any() and chosen.ids[:length].tolist() == rejected.ids[
        :length
    ].tolist()


def test_image_is_shown_as_one_mark(folder: Path, tokenizer: Any) -> None:
    prepared = run(write(folder / "d.jsonl", chat("<image> or <image>? " + "word " * 30, "a.png", "b.png")), tokenizer)
    for options in ({}, {"soft_wrap": True}):  # as the console of the commands
        console = Console(file=io.StringIO(), width=60, **options)
        check.print_examples(prepared, 1, console)
        text = console.file.getvalue().replace("\n", "")  # type: ignore[attr-defined]
        for mark in ("[image 64x48, 20 tokens]", "[image 40x40, 20 tokens]"):
            assert text.count(mark) == 1
        assert text.count("word") == 30 and "<image>" not in text


@pytest.mark.parametrize("kind", ["turns", "pairs", "prompts"])
def test_cleaned_copy_has_the_same_images(folder: Path, tokenizer: Any, kind: DataKind) -> None:
    rows: dict[DataKind, list[Any]] = {
        "turns": [chat("<image>\nWhat <image>?", "a.png", URL), chat("a", "b.png"), chat("b", "gone.png"), chat("c")],
        "pairs": [
            {"prompt": "q", "chosen": "yes", "rejected": "no", "images": [name]} for name in ("a.png", "gone.png")
        ],
        "prompts": [{"prompt": "q", "images": [name]} for name in ("a.png", "gone.png")],
    }
    data = DataSection(train=write(folder / "d.jsonl", *rows[kind]))
    clean = folder.parent / "elsewhere" / "clean.jsonl"
    changes = check.write_cleaned_copy(data, tokenizer, clean, kind)
    assert [change.change for change in changes if "gone" in change.change] == [
        f"dropped: images: no file {folder / 'gone.png'}"
    ]
    before = prepare(data.model_copy(update={"bad_rows": "drop"}), tokenizer, data_kind=kind)
    after = run(str(clean), tokenizer, data_kind=kind)
    conversations = [[*map(dump_conversation, x.train_conversations)] for x in (before, after)]
    assert conversations[0] == conversations[1] != []
    assert [e.ids.tolist() for e in after.train] == [e.ids.tolist() for e in before.train]


def test_images_that_cannot_be_stored_are_an_error(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "file"))
    with pytest.raises(FolderError, match="an image cannot be stored: Not a directory"):
        run(write(folder / "d.jsonl", chat(QUESTION, URL)), tokenizer)
    assert shown(run(write(folder / "d.jsonl", chat(QUESTION, "a.png")), tokenizer)) == [[RED]]  # a file needs no copy


def test_messages_after_the_last_answer_leave_their_images_out(folder: Path, tokenizer: Any) -> None:
    row = {"messages": [user("<image>q"), ANSWER, user("<image>r")], "images": ["a.png", "b.png"]}
    assert shown(run(write(folder / "d.jsonl", row), tokenizer)) == [[RED]]


def test_each_example_of_a_row_has_the_images_before_it(folder: Path, tokenizer: Any) -> None:
    """A template that shows reasoning only in the last turn makes one example of each turn."""
    reasoning = (
        "{% if message.reasoning_content and loop.last %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    )
    is_text = "{% if message['content'] is string %}"
    template = tokenizer.chat_template.replace(is_text, reasoning + is_text)
    (folder / "t.jinja").write_text(template, encoding="utf-8")
    turns = [user("<image>q"), {**ANSWER, "reasoning": "hm"}, user("<image>r<image>"), {**ANSWER, "reasoning": "ha"}]
    file = write(folder / "d.jsonl", {"messages": turns, "images": THREE})
    for loss in ("assistant", "all"):
        prepared = run(file, tokenizer, template=str(folder / "t.jinja"), loss=loss)
        assert shown(prepared) == [[RED], [RED, GREEN, BLUE]]
        assert not any(example.weights[example.ids >= FIRST_IMAGE_ID].any() for example in prepared.train)


def test_templates_that_lose_or_repeat_images_are_refused(folder: Path, tokenizer: Any) -> None:
    condition, place = "{%- if part['type'] == 'image' %}", "<image>"
    assert condition + place in tokenizer.chat_template
    for shown_place in (f"{place}{place}", "{% if not loop.first %}<image>{% endif %}", None):
        other = tokenizer.chat_template.replace(condition + place, f"{condition}{shown_place}")
        other = CHATML_TEXT if shown_place is None else other
        (folder / "t.jinja").write_text(other, encoding="utf-8")
        data = DataSection(train=write(folder / "d.jsonl", chat("<image>q", "a.png"), chat("q")), bad_rows="drop")
        prepared = prepare(data.model_copy(update={"template": str(folder / "t.jinja")}), tokenizer)
        assert prepared.report.by_reason == {"image-lost": 1} and [example.line for example in prepared.train] == [2]


CHATML_TEXT = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
