"""Preparation of rows: the report, refusals, the cache, printing, and cleaned copies."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from strop.config.schema import DataSection
from strop.data import check, converters
from strop.data.accounting import MAX_LOST_SHARE
from strop.data.formats import FORMATS
from strop.data.prepare import Prepared, prepare
from strop.data.rendering import overlong
from strop.data.rendering.render import Renderer
from strop.data.row_errors import REASONS
from strop.data.store import LOCK, Writer
from strop.data.types import Conversation, DataKind, Message
from strop.errors import DataError, FolderError
from tests.support import families, templates
from tests.support.shared_data import shared

TOKENIZER = families.tokenizer("chatml")


def row(*texts: str, system: str = "") -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def run(
    train: str, *, strict: bool = True, tokenizer: Any = TOKENIZER, cache: Path | None = None, **options: Any
) -> Prepared:
    return prepare(DataSection(train=train, **options), tokenizer, strict=strict, cache=cache)


def account(prepared: Prepared) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(prepared.report.as_json()))
    return value


def test_rows_are_stored_and_read_back_unchanged(tmp_path: Path) -> None:
    rows = [row(f"question {i}", f"answer {i}") for i in range(5)]
    prepared = run(write(tmp_path / "a.jsonl", rows))
    assert [example.line for example in prepared.train] == [1, 2, 3, 4, 5]
    assert [turn.messages[1].content for turn in prepared.train_conversations] == [f"answer {i}" for i in range(5)]
    renderer = Renderer(TOKENIZER)
    for example, conversation in zip(prepared.train, prepared.train_conversations, strict=True):
        [expected] = renderer.render(conversation)
        assert example.ids.tolist() == expected.ids.tolist()
        assert example.weights.tolist() == expected.weights.tolist()
        assert example.ids.flags.writeable  # torch warns about arrays that are not
    report = account(prepared)
    assert report["rows"] == {"read": 5, "used": 5, "truncated": 0, "split": 0, "dropped": 0}
    assert report["tokens"]["all"] == sum(map(len, prepared.train))
    assert report["tokens"]["supervised"] == sum(example.supervised for example in prepared.train)
    assert report["stop_token"] == {"rows": 5, "share": 1.0} and not report["would_refuse"]
    assert prepared.eval is None and prepared.eval_conversations is None


def test_counts_of_training_rows_exclude_held_out_rows(tmp_path: Path) -> None:
    prepared = run(write(tmp_path / "a.jsonl", [row(f"question {i}", f"answer {i}") for i in range(20)]), eval="30%")
    assert prepared.eval is not None
    report = account(prepared)
    trained, held_out = len(prepared.train), len(prepared.eval)
    assert trained + held_out == 20 and held_out
    assert report["tokens"]["all"] == sum(map(len, prepared.train))
    assert report["stop_token"] == {"rows": trained, "share": 1.0}
    assert report["eval"]["stop_token"] == {"rows": held_out, "share": 1.0}


GOOD = [row("a question", "an answer"), row("b", "c", "d", "e", system="s")]
BAD = [
    "{broken",
    {"messages": "x"},
    row("only a question"),
    row("q", " "),
    {"messages": [{"role": "usr", "content": "a"}]},
]


@settings(max_examples=60)
@given(
    rows=st.lists(st.sampled_from([*GOOD, *BAD, row("long " * 40, "x"), row(*["long " * 9, "y"] * 4)]), max_size=12),
    policy=st.sampled_from(["refuse", "drop", "truncate-start", "split"]),
)
def test_every_row_ends_as_used_truncated_split_or_dropped(tmp_path: Path, rows: list[Any], policy: str) -> None:
    rows = [GOOD[0], *rows]
    prepared = run(write(tmp_path / "a.jsonl", rows), overlong=policy, max_length=60, strict=False)
    report = account(prepared)
    counts = report["rows"]
    assert counts["read"] == len(rows) == sum(counts[k] for k in ("used", "truncated", "split", "dropped"))
    assert counts["dropped"] == len(report["dropped"]) == sum(report["by_reason"].values())
    assert {place["line"] for place in report["dropped"] if place["reason"] != "too-long"} == {
        i for i, value in enumerate(rows, 1) if value in BAD
    }
    assert set(report["by_reason"]) <= set(REASONS)
    assert all(len(example) <= 60 for example in prepared.train)
    assert report["stop_token"]["share"] == 1.0
    lines = {example.line for example in prepared.train}
    assert lines == set(range(1, len(rows) + 1)) - {place["line"] for place in report["dropped"]}


def test_invalid_rows_are_refused_with_all_places_or_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD[0], *BAD])
    with pytest.raises(DataError) as caught:
        run(path)
    assert [place.line for place in caught.value.where] == [2, 3, 4, 5, 6]
    assert "--data.bad_rows drop" in caught.value.fix
    report = account(run(path, bad_rows="drop"))
    assert report["rows"]["dropped"] == 5 and not report["would_refuse"]
    with pytest.raises(DataError) as caught:
        run(write(tmp_path / "b.jsonl", BAD))
    assert "bad_rows" not in caught.value.fix and "--fix" not in caught.value.fix  # no row would be left


def test_row_that_the_template_refuses_has_a_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(write(tmp_path / "a.jsonl", GOOD), tokenizer=families.tokenizer("gemma"))
    assert [place.line for place in caught.value.where] == [2] and "first user message" in caught.value.fix


def test_long_rows_are_refused_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD[0], row("long " * 100, "x")])
    with pytest.raises(DataError) as caught:
        run(path, max_length=50)
    length = run(path).report.tokens.max
    assert [place.line for place in caught.value.where] == [2] and f"--data.max_length {length}" in caught.value.fix
    for policy in ("drop", "truncate-start", "split"):
        assert policy in caught.value.fix
    assert account(run(path, max_length=50, overlong="drop"))["rows"]["dropped"] == 1
    with pytest.raises(DataError, match="0 of 2"):
        run(path, max_length=5, overlong="drop")


def test_rows_that_cannot_be_shortened_are_refused_above_a_share(tmp_path: Path) -> None:
    rows = [row(f"a{i}", "b") for i in range(98)] + [row("long " * 200, "b", "c", "d"), row("q", "long " * 100)]
    path = write(tmp_path / "a.jsonl", rows)
    assert len(rows) * MAX_LOST_SHARE == 1  # one row of 100 may be dropped
    assert account(run(path, max_length=50, overlong="truncate-start"))["rows"]["dropped"] == 1
    path = write(tmp_path / "b.jsonl", rows[50:])
    with pytest.raises(DataError, match="cannot be shortened") as caught:
        run(path, max_length=50, overlong="truncate-start")
    assert caught.value.fix == "--data.max_length 412, or choose --data.overlong drop"  # `split` does not help either


def decode(ids: Any) -> str:
    text: str = TOKENIZER.decode(ids.tolist())
    return text


def test_truncation_keeps_the_system_turn_and_the_stop_token(tmp_path: Path) -> None:
    long = row("one " * 30, "first", "two " * 5, "second", system="keep me")
    [example] = run(write(tmp_path / "a.jsonl", [long]), max_length=60, overlong="truncate-start").train
    text = decode(example.ids)
    assert text.startswith("<|im_start|>system\nkeep me<|im_end|>") and text.endswith("second<|im_end|>")
    assert "one" not in text and text.count("two ") == 5
    # one exchange alone is too long: the end of the question is kept
    long = row("one " * 300 + "the end", "answer", system="keep me")
    [example] = run(write(tmp_path / "b.jsonl", [long]), max_length=60, overlong="truncate-start").train
    text = decode(example.ids)
    assert "keep me<|im_end|>" in text and "one the end<|im_end|>" in text and text.endswith("answer<|im_end|>")
    assert 50 < len(example) <= 60


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_truncated_raw_text_keeps_bos(tmp_path: Path, family: str) -> None:
    tokenizer = families.tokenizer(family)
    path = write(tmp_path / "a.jsonl", [{"text": " ".join(f"word{i}" for i in range(100))}])
    whole = run(path, tokenizer=tokenizer).train[0]
    [cut] = run(path, tokenizer=tokenizer, max_length=50, overlong="truncate-start").train
    head = int(whole.ids[0] == tokenizer.bos_token_id)
    assert cut.ids.tolist() == [*whole.ids[:head], *whole.ids[head - 50 :]] and head == (family == "llama3")
    assert cut.weights.tolist() == [*[0.0] * (head + 1), *[1.0] * (49 - head)]
    shortest = run(path, tokenizer=tokenizer, max_length=2, overlong="truncate-start", strict=False).report
    assert shortest.rows["dropped"] == head and shortest.tokens.supervised == 1 - head


def test_splitting_supervises_every_answer_and_every_token_of_a_text_once(tmp_path: Path) -> None:
    turns = [text for i in range(6) for text in (f"question {i} " * 4, f"answer {i}")]
    prepared = run(write(tmp_path / "a.jsonl", [row(*turns, system="s")]), max_length=120, overlong="split")
    texts = [decode(example.ids) for example in prepared.train]
    assert len(texts) > 1 and all("<|im_start|>system\ns<|im_end|>" in text for text in texts)
    assert "".join(decode(example.ids[example.weights > 0]) for example in prepared.train) == "".join(
        f"answer {i}<|im_end|>" for i in range(6)
    )
    assert prepared.report.rows["split"] == 1 and len(prepared.train_conversations) == 1
    words = " ".join(f"word{i}" for i in range(100))
    whole = run(write(tmp_path / "b.jsonl", [{"text": words}])).train[0]
    pieces = run(write(tmp_path / "b.jsonl", [{"text": words}]), max_length=50, overlong="split").train
    supervised = np.concatenate([piece.ids[piece.weights > 0] for piece in pieces])
    assert supervised.tolist() == whole.ids[1:].tolist()


def test_parts_without_trained_turns_are_left_out() -> None:
    messages = tuple(
        Message("user" if i % 2 == 0 else "assistant", "long " * 8, weight=float(i == 5 or i % 2 == 0))
        for i in range(6)
    )
    renderer = Renderer(TOKENIZER)
    conversation = Conversation("f", 1, messages)
    examples = renderer.render(conversation)
    limit = len(examples[0]) // 2
    pieces = overlong.split(renderer, conversation, examples, limit)
    assert pieces is not None and len(pieces) == 1 and pieces[0].supervised == examples[0].supervised
    cut = overlong.truncate_start(renderer, conversation, examples, limit)
    assert cut is not None and cut[0].ids.tolist() == pieces[0].ids.tolist()


@pytest.mark.parametrize("kind", ["turns", "pairs"])
def test_each_row_of_a_weighted_file_is_evaluated_once(tmp_path: Path, kind: DataKind) -> None:
    rows = [row(f"q{i}", f"a{i}") for i in range(40)]
    if kind == "pairs":  # each row makes two
        rows = [{"prompt": f"q{i}", "responses": ["a", "b", "c"], "scores": [2, 1, 0]} for i in range(40)]
    path, other = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:5])

    def evaluated(train: str, share: str) -> Prepared:
        return prepare(DataSection(train=train, eval=share), TOKENIZER, data_kind=kind)

    for share in ("25%", other):
        once, thrice = evaluated(path, share), evaluated(f"{path}@3", share if share == "25%" else f"{share}@3")
        assert once.eval_conversations is not None and thrice.eval_conversations is not None
        assert thrice.eval_conversations.digests.tolist() == once.eval_conversations.digests.tolist()
        assert once.eval is not None and thrice.eval is not None
        assert [example.ids.tolist() for example in thrice.eval] == [example.ids.tolist() for example in once.eval]
        parts = [prepared.report.eval for prepared in (once, thrice)]
        assert parts[0] is not None and parts[1] is not None and parts[0].as_json() == parts[1].as_json()
        assert len(thrice.train_conversations) == 3 * len(once.train_conversations)
        assert thrice.report.held_out == 3 * once.report.held_out and thrice.report.duplicates["within"] == 0
        assert thrice.report.stop_token == {"rows": 3 * once.report.stop_token["rows"], "share": 1.0}


def test_held_out_rows_are_chosen_by_content(tmp_path: Path) -> None:
    rows = [row(f"q{i % 50}", f"a{i % 50}") for i in range(100)]  # each twice
    prepared = run(write(tmp_path / "a.jsonl", rows), eval="20%")
    part = prepared.report.eval
    assert part is not None and part.stop_token == {"rows": part.rows["used"], "share": 1.0}
    assert prepared.eval_conversations is not None and prepared.eval is not None
    held_out = {c.messages[0].content for c in prepared.eval_conversations}
    trained = {c.messages[0].content for c in prepared.train_conversations}
    assert not held_out & trained and len(held_out | trained) == 50 and 3 <= len(held_out) <= 20
    report = account(prepared)
    assert report["rows"]["read"] == 100 and report["held_out"] == len(prepared.eval) == 2 * len(held_out)
    assert report["duplicates"]["across"] == 0
    assert part.warnings == [f"{len(held_out)} evaluation rows repeat an earlier one"]
    again = run(write(tmp_path / "b.jsonl", rows[::-1]), eval="20%")
    assert again.eval_conversations is not None
    assert {c.messages[0].content for c in again.eval_conversations} == held_out
    few = run(write(tmp_path / "c.jsonl", rows[:3]), eval="1%")  # too few rows for 1 %: still one
    assert few.eval is not None and len(few.eval) == 1 and len(few.train) == 2
    with pytest.raises(DataError, match="0 of 1 training rows") as caught:
        run(write(tmp_path / "d.jsonl", rows[:1]), eval="10%")
    assert caught.value.fix == "data.eval 10% holds out 1 of them: give more rows, or a file to evaluate on"
    with pytest.raises(DataError, match="leaves no rows"):
        run(write(tmp_path / "d.jsonl", rows[:1]), eval="100%")


def test_conversations_of_one_row_are_held_out_together(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"task {i}", "instances": [{"input": f"{i} {k}", "output": "yes"} for k in range(4)]}
        for i in range(30)
    ]
    prepared = run(write(tmp_path / "a.jsonl", rows), eval="30%")
    held_out, trained = (
        {conversation.line for conversation in part}
        for part in (prepared.eval_conversations, prepared.train_conversations)
    )
    assert held_out and trained and not held_out & trained


def test_held_out_rows_are_the_same_as_in_earlier_versions(tmp_path: Path) -> None:
    rows = [row(f"q{i}", f"a{i}") for i in range(60)]
    prepared = run(write(tmp_path / "a.jsonl", rows), eval="20%")
    held_out = [conversation.line for conversation in prepared.eval_conversations or ()]
    assert held_out == [
        5,
        7,
        15,
        16,
        18,
        19,
        21,
        22,
        25,
        30,
        37,
        42,
        44,
        45,
        54,
        57,
    ]  # unfinished runs resume with the same rows


def test_prompts_in_training_and_evaluation_give_a_warning(tmp_path: Path) -> None:
    rows = [row("one question", f"answer {i}") for i in range(20)]
    report = run(write(tmp_path / "a.jsonl", rows), eval="30%").report
    assert report.duplicates["across"] == 0 and report.duplicates["prompts"] == report.held_out > 0
    assert f"{report.held_out} evaluation rows have a prompt that is also in training rows" in report.warnings
    distinct = run(write(tmp_path / "b.jsonl", [row(f"question {i}", "answer") for i in range(20)]), eval="30%").report
    assert distinct.duplicates["prompts"] == 0 and not distinct.warnings


def test_fix_for_windows_text_can_be_followed_and_a_wrong_encoding_gives_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\nsay \x93hi\x94,yo\n")
    with pytest.raises(DataError) as caught:
        run(str(path))
    suggested = re.findall(r"cp1252|latin-1", "\n".join(caught.value.lines()))
    assert suggested[0] == "cp1252"
    right, wrong = (run(str(path), encoding=encoding) for encoding in ("cp1252", "latin-1"))
    assert right.train_conversations[0].messages[0].content == "say “hi”" and not right.report.warnings
    [warning] = wrong.report.warnings
    assert "1 rows have characters that a wrong encoding gives" in warning and "a.csv:2: U+0093" in warning
    path.write_bytes(b"prompt,completion\nsay \x81,yo\n")  # not a character of cp1252: another encoding is needed
    with pytest.raises(DataError) as caught:
        run(str(path), encoding="cp1252")
    assert "not valid cp1252; set --data.encoding to another one" in "\n".join(caught.value.lines())


def test_unnamed_column_is_reported_as_unnamed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",prompt,completion\n0,hi,yo\n1,hey,yo\n", encoding="utf-8")
    assert run(str(path)).report.warnings == ["columns not read: (unnamed) (2 rows)"]
    warnings = run(str(path), columns={"prompt": "completion", "completion": "prompt"}).report.warnings
    assert "columns not read: (unnamed) (2 rows)" in warnings
    with pytest.raises(DataError, match=r"there are: \(unnamed\), prompt, completion"):
        run(str(path), columns={"prompt": "Q", "completion": "A"})


def test_duplicates_and_placeholders_give_warnings(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [GOOD[0], GOOD[0], row("I am {{name}}", "b <|im_end|> c")])
    report = account(run(train, eval=write(tmp_path / "b.jsonl", GOOD)))
    assert report["duplicates"] == {"within": 1, "across": 1, "prompts": 1}
    assert report["template"] == [f"an answer ends with {families.ANSWER['chatml'][1]}"]
    warnings = "\n".join(report["warnings"])
    assert "{{name}}" in warnings and "a.jsonl:3" in warnings and "control tokens" in warnings
    assert "1 training row repeats" in warnings and "1 evaluation row is also a training row" in warnings
    assert report["eval"]["rows"]["read"] == 2


def test_messages_after_the_last_answer_give_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row("a", "b"), row("a", "b", "c")])
    expected = "1 rows have messages after the last answer, which are left out"
    assert any(expected in warning for warning in run(path, loss="all").report.warnings)
    assert not run(write(tmp_path / "b.jsonl", [row("a", "b")])).report.warnings


def test_null_arguments_of_tools_give_a_warning(tmp_path: Path) -> None:
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    called = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    plain = {"messages": [{"role": "user", "content": "hi"}, called], "tools": [tool]}
    nulls = json.loads(json.dumps(plain).replace('"x": 1', '"x": 1, "zone": null'))
    qwen = families.tokenizer("qwen3")
    assert not run(write(tmp_path / "a.jsonl", [plain]), tokenizer=qwen).report.warnings
    [warning] = run(write(tmp_path / "b.jsonl", [nulls]), tokenizer=qwen).report.warnings
    assert "1 rows have null arguments" in warning and "zone" in warning
    shapes = json.loads(json.dumps(plain).replace('{"type": "integer"}', "null"))
    assert "null" in str(run(write(tmp_path / "c.jsonl", [shapes]), tokenizer=qwen).report.warnings)


def test_invalid_evaluation_rows_are_refused(tmp_path: Path) -> None:
    train, evaluation = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", [GOOD[0], BAD[0]])
    with pytest.raises(DataError, match="1 of 2 evaluation rows"):
        run(train, eval=evaluation)
    assert account(run(train, eval=evaluation, strict=False))["would_refuse"]


def test_hash_depends_on_rows_tokens_and_template(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    same = write(tmp_path / "b.jsonl", ["", *GOOD])
    reordered = write(tmp_path / "c.jsonl", GOOD[::-1])
    assert run(path).hash == run(same).hash
    hashes = [run(path).hash, run(reordered).hash, run(path, loss="all").hash, run(path, template="chatml").hash]
    assert len(set(hashes)) == 4


def test_cache_is_used_for_the_same_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "a.jsonl", [*GOOD, BAD[0]]), tmp_path / "cache"
    first = run(path, cache=cache, bad_rows="drop")
    monkeypatch.setattr(Renderer, "render_many", None)  # a second pass would now fail
    again = run(path, cache=cache, bad_rows="drop")
    assert account(again) == account(first) and again.hash == first.hash
    assert [e.ids.tolist() for e in again.train] == [e.ids.tolist() for e in first.train]
    assert list(again.train_conversations) == list(first.train_conversations)
    with pytest.raises(DataError):  # errors of rows are cached too
        run(path, cache=cache)
    monkeypatch.undo()
    assert len(list(cache.iterdir())) == 1
    for options in ({"max_length": 99}, {"loss": "all"}, {"template": "chatml"}, {"overlong": "drop"}):
        run(path, cache=cache, bad_rows="drop", **options)
    run(path, cache=cache, bad_rows="drop", tokenizer=families.tokenizer("qwen3"))
    write(tmp_path / "a.jsonl", GOOD)
    run(path, cache=cache)
    assert len(list(cache.iterdir())) == 7


def test_cache_of_a_version_that_left_a_column_out_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "hi", "output": "yo", "system_prompt": "be brief"}])
    alpaca, cache = FORMATS["alpaca"], tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        optional = tuple(name for name in alpaca.optional if name not in converters.SYSTEM[1:])
        patch.setitem(FORMATS, "alpaca", dataclasses.replace(alpaca, optional=optional))
        patch.setattr(converters, "SYSTEM", ("system",))
        assert run(path, cache=cache).train_conversations[0].messages[0].role == "user"
    for _ in range(2):
        assert run(path, cache=cache).train_conversations[0].messages[0] == Message("system", "be brief")
    assert len(list(cache.iterdir())) == 2


def test_damaged_cache_is_rebuilt(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.jsonl", GOOD), tmp_path / "cache"
    expected = [example.ids.tolist() for example in run(path, cache=cache).train]
    [folder] = cache.iterdir()
    ids = (folder / "ids.bin").read_bytes()
    zeros = bytes(len(ids))  # as after a power loss; a bit may also flip
    flipped = ids[:40] + bytes([ids[40] ^ 1]) + ids[41:]
    wrong = (("ids.bin", b"123"), ("facts.json", b"{"), ("rows.bin", b""), ("ids.bin", zeros), ("ids.bin", flipped))
    for name, content in wrong:
        (folder / name).write_bytes(content)
        assert [example.ids.tolist() for example in run(path, cache=cache).train] == expected
    assert [place.name for place in cache.iterdir()] == [folder.name]


def test_failed_pass_leaves_no_files(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.jsonl", ['{"a": 1}', '{"b": 2}']), tmp_path / "cache"
    with pytest.raises(DataError):
        run(path, cache=cache)
    assert list(cache.iterdir()) == []


def test_invalid_and_too_long_rows_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row("q", "a"), row("q", ""), row("q " * 40, "a")])
    with pytest.raises(DataError, match="1 of 3 training rows cannot be used") as caught:
        run(path, max_length=40)
    assert [place.line for place in caught.value.where] == [2, 3]
    assert "--data.bad_rows drop; and 1 of 3 training rows are longer than data.max_length 40" in caught.value.fix
    with pytest.raises(DataError) as caught:
        run(path, max_length=40, overlong="drop")
    assert [place.line for place in caught.value.where] == [2]


def test_files_of_a_killed_pass_are_removed_and_those_of_a_live_one_kept(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.jsonl", GOOD), tmp_path / "cache"
    live = Writer(cache / "0123abcd")
    abandoned = Path(tempfile.mkdtemp(prefix=".4567cdef-", dir=cache))
    for folder in (abandoned, *cache.glob(".0123abcd-*")):
        (folder / LOCK).touch()
        os.utime(folder / LOCK, (1, 1))  # long ago
    expected = run(path, cache=cache).hash
    assert not abandoned.exists() and len(list(cache.iterdir())) == 2
    live.discard()
    assert len(list(cache.iterdir())) == 1 and run(path, cache=cache).hash == expected


def test_better_answers_are_only_suggested_where_columns_can_select_them(tmp_path: Path) -> None:
    ranking = write(tmp_path / "ranking.jsonl", [{"prompt": "hi", "answers": ["yo", "no"], "scores": [1, 0]}])
    with pytest.raises(DataError) as error:
        run(ranking)
    assert "--train.objective dpo" in str(error.value.fix) and "--data.columns" not in str(error.value.fix)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "hi", "chosen": "yo", "rejected": "no"}])
    [conversation] = run(pairs, columns={"prompt": "prompt", "completion": "chosen"}).train_conversations
    assert [turn.content for turn in conversation.messages] == ["hi", "yo"]


def test_preference_pairs_are_refused_for_sft_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="preference") as caught:
        run(write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    assert "completion=chosen" in caught.value.fix


def printed(draw: Any) -> str:
    console = Console(file=io.StringIO(), width=400)
    draw(console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_shortened_rows_count_as_used(tmp_path: Path) -> None:
    rows = [row("long " * 200, "b", "c", "d"), row("q", "long " * 100), row("a", "b")]
    path = write(tmp_path / "a.jsonl", rows)
    prepared = run(path, max_length=60, overlong="truncate-start", bad_rows="drop")
    report = printed(lambda console: check.print_report(prepared.report.as_json(), console))
    assert "3 rows read, 2 used (1 of them truncated), 1 dropped" in report


def test_report_and_rows_are_printed(tmp_path: Path) -> None:
    rows = [row("a b\n\x1b[31m", "日本 🙂"), GOOD[0], GOOD[0], *BAD]
    prepared = run(write(tmp_path / "a.jsonl", rows), strict=False, eval=write(tmp_path / "b.jsonl", GOOD))
    report = printed(lambda console: check.print_report(prepared.report.as_json(), console))
    for part in (
        "8 rows read, 3 used, 5 dropped",
        "a.jsonl:4",
        "error: ",
        "Fix: ",
        "--data.bad_rows drop",
        "repeat",
        "eval",
    ):
        assert part in report
    shown = printed(lambda console: check.print_examples(prepared, 1, console))
    assert "⟦日本·🙂<|im_end|>⟧" in shown and "a·b↵" in shown
    assert "\x1b" not in shown and "\\x1b[31m" in shown
    numbers = printed(lambda console: check.print_examples(prepared, 1, console, ids=True))
    assert f"<|im_end|>({TOKENIZER.convert_tokens_to_ids('<|im_end|>')})⟧" in numbers


def test_serving_prompt_matches_the_training_rows(tmp_path: Path) -> None:
    tokenizer = templates.tokenizer("opens-with-switch")
    with_reasoning = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]
    }

    def prompt(*rows: dict[str, Any], **fields: Any) -> tuple[str, Prepared]:
        prepared = run(write(tmp_path / "a.jsonl", list(rows)), tokenizer=tokenizer, **fields)
        return tokenizer.decode(prepared.renderer.prompt([Message("user", "x")])).rpartition("assistant")[2], prepared

    end, none = prompt(row("a", "b"), row("c", "d"))
    assert end.endswith("</think>\n\n") and "served as trained: enable_thinking=false" in " ".join(none.report.template)
    end, all_think = prompt(with_reasoning)
    assert end == "\n<think>\n" and all_think.hash != none.hash
    end, some = prompt(with_reasoning, row("a", "b"))
    assert end == "\n<think>\n" and "1 training rows have reasoning and 1 have none" in " ".join(some.report.warnings)
    end, on = prompt(row("a", "b"), template_options={"enable_thinking": True})
    assert (
        end == "\n<think>\n" and on.train[0].supervised > none.train[0].supervised
    )  # the training text closes the block
    _, dropped = prompt(with_reasoning, reasoning="drop")
    assert "data.reasoning drop leaves out" in " ".join(dropped.report.warnings)


def test_cleaned_copy_has_a_log_of_each_change(tmp_path: Path) -> None:
    aliases = {"messages": [{"role": "human", "content": "x"}, {"role": "gpt", "content": "y"}]}
    path = write(tmp_path / "a.jsonl", [GOOD[0], BAD[0], aliases, GOOD[0]])
    out = tmp_path / "out.jsonl"
    tokenizer = families.tokenizer("llama3")
    data = DataSection(train=path, template="chatml")
    changes = check.write_cleaned_copy(data, tokenizer, out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [GOOD[0], row("x", "y")]
    logged = [json.loads(line) for line in (tmp_path / "out.jsonl.changes.jsonl").read_text().splitlines()]
    assert logged == [vars(change) for change in changes]
    what = {change.line: change.change for change in changes}
    assert what[2].startswith("dropped: ") and what[4].startswith("dropped: the same as") and what[4].endswith(":1")
    assert "human -> user" in what[3] and "gpt -> assistant" in what[3] and 1 not in what
    assert account(run(str(out), tokenizer=tokenizer, template="chatml"))["rows"]["dropped"] == 0
    with pytest.raises(FolderError):
        check.write_cleaned_copy(data, tokenizer, out)


def test_cleaned_copy_of_two_formats_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", [row("a", "b")]), write(tmp_path / "b.jsonl", [{"text": "words"}])]
    with pytest.raises(DataError, match=r"b\.jsonl:1 is written with text, rows before it with messages"):
        check.write_cleaned_copy(DataSection(train=files), TOKENIZER, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("overlong", "kept"), [("refuse", 1), ("drop", 1), ("truncate-start", 2)])
def test_cleaned_copy_leaves_out_too_long_rows(tmp_path: Path, overlong: Any, kept: int) -> None:
    path, out = write(tmp_path / "a.jsonl", [row("a", "b"), row("long " * 99, "b")]), tmp_path / "out.jsonl"
    data = DataSection(train=path, max_length=60, overlong=overlong)
    changes = check.write_cleaned_copy(data, TOKENIZER, out)
    assert len(out.read_text().splitlines()) == kept
    assert len(prepare(data.model_copy(update={"train": str(out)}), TOKENIZER).train) == kept
    assert [(change.line, "tokens, data.max_length is 60" in change.change) for change in changes] == [(2, True)][
        kept - 1 :
    ]


def test_shared_files_are_prepared() -> None:
    assert account(run(shared("formats/alpaca.json"), max_length=9999))["duplicates"]["within"] == 14
    assert "{{name}}" in "".join(run(shared("formats/alpaca_placeholders.json"), max_length=9999).report.warnings)
    tools = run(shared("formats/sharegpt_tools.json"), template="chatml", max_length=99999)
    assert tools.report.rows == {"read": 300, "used": 300, "truncated": 0, "split": 0, "dropped": 0}
    thinking = run(shared("formats/messages_tools_reasoning.jsonl"), template="chatml", max_length=99999)
    assert thinking.report.rows["used"] == 50 and not thinking.report.warnings
