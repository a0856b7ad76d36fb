"""Pairs, rankings, labelled answers and prompts: how they are read, checked and prepared."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from strop.config.schema import DataSection
from strop.data import check
from strop.data.formats import ConversationReader, detect_format
from strop.data.prepare import Prepared, prepare
from strop.data.row_errors import REASONS, RowError
from strop.data.types import Conversation, DataKind, ExampleGroup, Prompt, Row
from strop.errors import DataError
from tests.support.families import tokenizer
from tests.support.templates import tokenizer as of_trait

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
NO, MORE = {"role": "assistant", "content": "no"}, {"role": "user", "content": "more"}
S = {"role": "system", "content": "s"}
PAIR = {"prompt": "hi", "chosen": "yo", "rejected": "no"}


def convert(value: dict[str, Any]) -> tuple[list[Conversation], list[RowError]]:
    bad: list[RowError] = []
    return list(ConversationReader([Row("d", 1, value)], errors=bad)), bad


def texts(conversation: Conversation) -> list[list[tuple[str, float]]]:
    return [[(m.content, m.weight) for m in side.messages] for side in conversation.sides]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(path: Path, data_kind: DataKind = "pairs", strict: bool = True, **options: Any) -> Prepared:
    section = DataSection(train=str(path), **options)
    return prepare(section, tokenizer("chatml"), strict=strict, data_kind=data_kind)


def refusal(path: Path, data_kind: DataKind = "pairs", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        run(path, data_kind, **options)
    return "\n".join(caught.value.lines())


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"chosen_messages": [U, A], "rejected_messages": [U, NO]},
        {"messages": [U, A], "rejected_messages": [U, NO]},
        {"messages": [U, A], "rejected_response": "no"},
        {"prompt": [U], "chosen": [S, U, A], "rejected": [S, U, NO]},
        {"prompt": " hi\n", "chosen": [U, A], "rejected": [U, NO]},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": A, "rejected": NO},
        {"messages": [S, U], "chosen": A, "rejected": NO},
        {"conversation": [U], "chosen": "yo", "rejected": "no"},
        {"messages": [U, A], "chosen": [U, A], "rejected": [U, NO]},
        {"prompt": "hi", "messages": [U, A], "chosen": [U, A], "rejected": [U, NO]},
    ],
)
def test_pairs_with_alternative_columns_are_read(value: dict[str, Any]) -> None:
    (converted,), bad = convert(value)
    assert not bad and detect_format(value) == "preference"
    sides = [[turn.content for turn in side.messages if turn.role != "system"] for side in converted.sides]
    assert sides == [["hi", "yo"], ["hi", "no"]]


def test_shared_beginning_of_whole_conversations_is_the_prompt() -> None:
    (converted,), _ = convert({"chosen": [U, A, MORE, A], "rejected": [U, A, MORE, NO]})
    assert texts(converted) == [[("hi", 1.0), ("yo", 0.0), ("more", 1.0), (side, 1.0)] for side in ("yo", "no")]


def test_answer_of_several_turns_is_trained_as_a_whole() -> None:
    (converted,), _ = convert({"prompt": "hi", "chosen": [A, MORE, A], "rejected": [NO]})
    assert [[weight for _, weight in side] for side in texts(converted)] == [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0]]


def test_ranking_gives_pairs_of_answers_with_different_scores() -> None:
    converted, bad = convert({"prompt": "hi", "answers": ["a", "b", "c"], "scores": [2, 1, 2]})
    assert not bad
    assert [tuple(side[-1][0] for side in texts(pair)) for pair in converted] == [("a", "b"), ("c", "b")]


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("words", [("true", "false"), ("up", "down"), ("Good", "bad"), (True, False), (1, 0)])
@pytest.mark.parametrize("column", ["label", "kto_tag", "thumbs"])
def test_labels_are_read(column: str, words: tuple[Any, Any], judged: bool) -> None:
    label = words[0] if judged else words[1]
    for value in (
        {"prompt": "hi", "completion": "yo"},
        {"messages": [U, A]},
        {"instruction": "hi", "output": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    ):
        if column == "label" and words[0] is not True and words[0] == 1:  # a number in label may be a class
            assert detect_format({**value, column: label}) != "labelled"
            continue
        (converted,), bad = convert({**value, column: label})
        assert not bad and converted.desirable is judged and converted.messages[-1].content == "yo"


def test_label_applies_only_to_the_last_turn() -> None:
    (converted,), _ = convert({"messages": [U, A, MORE, A], "label": True})
    assert [message.weight for message in converted.messages] == [1.0, 0.0, 1.0, 1.0]


def test_answer_turns_may_have_weight_0_and_prompt_weights_are_ignored() -> None:
    (converted,), _ = convert({"prompt": [U, {**A, "weight": 0.5}, MORE], "chosen": [A], "rejected": [NO]})
    assert [weight for _, weight in texts(converted)[0]] == [1.0, 0.0, 1.0, 1.0]
    (converted,), _ = convert({"prompt": [U], "chosen": [{**A, "train": False}, MORE, A], "rejected": [NO]})
    assert [weight for _, weight in texts(converted)[0]] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({**PAIR, "rejected": "yo"}, "same-answers"),
        ({"chosen": "yo", "rejected": "no"}, "no-prompt"),
        ({"messages": [U, A], "chosen": "yo", "rejected": "no"}, "no-question"),
        ({"prompt": [U, A], "chosen": "yo", "rejected": "no"}, "no-question"),
        ({"prompt": [U, A], "chosen": [A], "rejected": [NO]}, "no-question"),
        ({"question": [U, A], "answers": ["a", "b"], "scores": [1, 0]}, "no-question"),
        ({"prompt": [U, A], "completion": "yo", "label": True}, "no-question"),
        ({"prompt": [U, A], "completion": "yo"}, "no-question"),
        ({"prompt": "hi", "completion": [MORE, A]}, "prompts-differ"),
        ({"messages": [U, A], "chosen": [MORE, A], "rejected": [MORE, NO]}, "prompts-differ"),
        ({**PAIR, "chosen": ""}, "empty-answer"),
        ({**PAIR, "rejected": "  "}, "empty-answer"),
        ({**PAIR, "rejected": None, "messages": None}, "no-content"),
        ({**PAIR, "prompt": ""}, "empty-prompt"),
        ({**PAIR, "chosen": 3}, "not-text"),
        ({"chosen": [U, A], "rejected": [MORE, NO]}, "prompts-differ"),
        ({"chosen": [U, A], "rejected": [U, A, MORE, NO]}, "prompts-differ"),
        ({"prompt": [U], "chosen": [MORE, A], "rejected": [NO]}, "prompts-differ"),
        ({"prompt": "hi", "chosen": [MORE, A], "rejected": [MORE, NO]}, "prompts-differ"),
        ({"chosen": [{"role": "usr", "content": "x"}, A], "rejected": [U, NO]}, "unknown-role"),
        ({"prompt": "hi", "answers": ["a", "b"], "scores": [1]}, "bad-ranking"),
        ({"prompt": "hi", "answers": ["a", "b"], "scores": [1, 1]}, "bad-ranking"),
        ({"prompt": "hi", "answers": ["a", "b"], "scores": [1, "x"]}, "bad-ranking"),
        ({"prompt": "hi", "answers": "ab", "scores": [1, 0]}, "bad-ranking"),
        ({"prompt": "hi", "completion": "yo", "kto_tag": "maybe"}, "bad-label"),
        ({"messages": [U, A, MORE], "label": True}, "no-assistant"),
        ({"messages": [U, {**A, "weight": 0.5}], "label": True}, "answer-weight"),
        ({"prompt": [U], "chosen": [{**A, "weight": 2}], "rejected": [NO]}, "answer-weight"),
        ({"prompt": [U], "chosen": [A], "rejected": [NO, MORE, {**A, "loss_weight": 0.5}]}, "answer-weight"),
        ({"prompt": "hi", "answers": [{**A, "weight": 0.5}, NO], "scores": [2, 1]}, "answer-weight"),
        ({"messages": [U, A], "images": ["a.png"]}, "image-missing"),
        ({"messages": [U, A], "audio": "a.wav"}, "media"),
        ({"messages": [{**U, "content": "<image>what is it"}, A]}, "image-count"),
        ({**PAIR, "video": "a.mp4"}, "media"),
    ],
)
def test_invalid_row_has_its_reason_code(value: dict[str, Any], code: str, tmp_path: Path) -> None:
    bad: list[RowError] = []
    format = "preference" if "rejected" in value else "labelled" if code == "bad-label" else "auto"
    assert not list(ConversationReader([Row("d", 1, value)], format=format, errors=bad))
    assert [error.code for error in bad] == [code] and code in REASONS
    data_kind: DataKind = "pairs" if "rejected" in value or "scores" in value else "turns"
    data_kind = "labels" if {"kto_tag", "label"} & set(value) else data_kind
    message = refusal(write(tmp_path / "a.jsonl", [value]), data_kind, format=format)
    assert "a.jsonl:1" in message


@pytest.mark.parametrize(
    "prompt, completion", [("hi", [U, A]), ([U], [U, A]), ([U, NO, MORE], [U, NO, MORE, A]), ([U], [S, U, A])]
)
def test_completion_that_repeats_its_prompt_is_read_once(prompt: Any, completion: list[dict[str, str]]) -> None:
    (converted,), bad = convert({"prompt": prompt, "completion": completion})
    assert not bad and [(m.role, m.content) for m in converted.messages] == [tuple(m.values()) for m in completion]
    assert [m.weight for m in converted.messages if m.role == "assistant"][:-1] == [0.0] * (NO in completion)
    assert converted.messages[-1].weight == 1


def test_history_precedes_the_prompt_of_a_pair() -> None:
    (converted,), _ = convert({**PAIR, "history": [["a", "b"]]})
    assert texts(converted) == [[("a", 1.0), ("b", 0.0), ("hi", 1.0), (side, 1.0)] for side in ("yo", "no")]


@pytest.mark.parametrize(
    ("more", "unread"),
    [
        ({"question": "ho"}, "columns not read: question (1 rows)"),
        ({"input": "ho", "system": "s"}, "columns not read: input (1 rows)"),
        ({"input": "", "question": None, "history": []}, None),
    ],
)
def test_columns_that_are_no_part_of_the_prompt_of_a_pair_are_reported(
    more: dict[str, Any], unread: str | None, tmp_path: Path
) -> None:
    warnings = run(write(tmp_path / "a.jsonl", [{**PAIR, **more}])).report.warnings
    assert warnings == ([unread] if unread else [])


def test_other_columns_of_prompts_are_for_the_rewards(tmp_path: Path) -> None:
    report = run(write(tmp_path / "a.jsonl", [{"prompt": "hi", "cost": 3}]), "prompts", format="prompt").report
    screen = io.StringIO()
    check.print_report(report.as_json(), Console(file=screen, width=80))
    assert report.warnings == [] and f"tokens    {report.tokens.all} in prompts" in screen.getvalue()
    assert "supervised" not in screen.getvalue()


def test_history_and_exchanges_of_a_question_are_read() -> None:
    (converted,), _ = convert({"query": "more", "response": "yo", "history": [["hi", "no"]]})
    assert [m.content for m in converted.messages] == ["hi", "no", "more", "yo"]
    (converted,), _ = convert(
        {"conversation": [{"human": "hi", "assistant": "no"}, {"human": "more", "assistant": "yo"}]}
    )
    assert [m.content for m in converted.messages] == ["hi", "no", "more", "yo"]


# --- data kinds of objectives ----------------------------------------------------------------------------


def test_rows_of_another_kind_are_refused_with_the_objective_for_them(tmp_path: Path) -> None:
    pairs, turns = write(tmp_path / "pairs.jsonl", [PAIR]), write(tmp_path / "turns.jsonl", [{"messages": [U, A]}])
    judged = write(tmp_path / "judged.jsonl", [{"messages": [U, A], "label": True}])
    assert "--train.objective dpo" in refusal(pairs, "turns")
    assert "only the better answers: --data.columns prompt=prompt,completion=chosen" in refusal(pairs, "turns")
    whole = write(tmp_path / "whole.jsonl", [{"chosen": [U, A], "rejected": [U, NO]}])
    assert "only the better answers: --data.columns messages=chosen" in refusal(whole, "turns")
    assert "--train.objective kto" in refusal(judged, "turns")
    assert "pairs" in refusal(turns, "pairs") and "--train.objective kto" in refusal(judged, "pairs")
    assert "label" in refusal(turns, "labels")
    numbers = write(tmp_path / "numbers.jsonl", [{"messages": [U, A], "label": 1}, {"messages": [U, NO], "label": 0}])
    assert "--data.format labelled" in refusal(numbers, "labels")
    assert len(run(numbers, "labels", format="labelled").train_items or ()) == 2
    assert run(judged, "turns", columns={"messages": "messages"}).train_items is None


def test_rows_with_one_label_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "yo", "label": True} for n in range(4)]
    assert "all training rows are labelled good" in refusal(write(tmp_path / "a.jsonl", rows), "labels")
    bad = write(tmp_path / "b.jsonl", [{**row, "label": False} for row in rows])
    assert "all training rows are labelled bad" in refusal(bad, "labels") and "sft" not in refusal(bad, "labels")


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"prompt": "q", "completion": "yo", "label": True, "system": "s"}, None),
        ({"query": "q", "response": "yo", "kto_tag": True}, None),
        ({"instruction": "q", "input": "i", "output": "yo", "label": "good"}, None),
        ({"conversations": [U, A], "label": True}, None),
        ({"Q": "q", "my answer": "yo", "was good": 1}, {"prompt": "Q", "completion": "my answer", "label": "was good"}),
    ],
)
def test_fix_of_labelled_answers_can_be_followed(
    row: dict[str, Any], columns: dict[str, str] | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, "id": n} for n in range(3)])
    for data_kind in ("labels", "turns"):
        message = refusal(path, data_kind, columns=columns)
        words = shlex.split(message[message.index("--data.format") :])
        options = dict(zip(words[::2], words[1::2], strict=False))
        given = dict(pair.split("=") for pair in options.get("--data.columns", "").split(",") if pair) or None
        (conversation, *_) = run(
            path, format=options["--data.format"], columns=given, data_kind="turns"
        ).train_conversations
        assert conversation.messages[-1].content == "yo" and conversation.desirable is None
        assert len(conversation.messages) == 2 + ("system" in row)


def test_evaluation_rows_with_one_label_give_a_warning(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": f"yo {n}", "label": n not in (3, 4)} for n in range(30)]
    path, evaluation = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[5:8])
    part = run(path, "labels", eval=str(evaluation)).report.eval
    assert part is not None and part.refusal is None
    assert part.answers["desirable"] == 3 and part.answers["undesirable_tokens"] == part.answers["undesirable"] == 0
    assert part.warnings == ["all evaluation rows are labelled good: the evaluation does not measure the other label"]
    assert run(path, "labels", eval="10%").eval_items  # all of them are good


def test_kl_examples_are_found_behind_many_rows_of_one_prompt(tmp_path: Path) -> None:
    prompts = ["one"] * 1500 + ["two"]
    rows = [{"prompt": prompt, "completion": f"yo {n}", "label": n % 2 == 0} for n, prompt in enumerate(prompts)]
    items = run(write(tmp_path / "a.jsonl", rows), "labels").train_items
    assert items is not None
    first, last = items[0], items[1500]
    assert isinstance(first, ExampleGroup) and isinstance(last, ExampleGroup)
    for group, other in ((first, last), (last, first)):
        begin = group.examples[0].prompt_length
        (mismatched,) = group.kl_examples
        assert mismatched.ids[:begin].tolist() == group.examples[0].ids[:begin].tolist()
        answer = other.examples[0]
        assert mismatched.ids[begin:].tolist() == answer.ids[answer.prompt_length :].tolist()


def test_labelled_answers_to_same_prompt_have_no_kl_examples(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": f"yo {n}", "label": n % 2 == 0} for n in range(6)]
    prepared = run(write(tmp_path / "a.jsonl", rows), "labels")
    (warning,) = prepared.report.warnings
    assert warning.startswith("all training rows have one prompt: the KL estimate in the loss is always 0")
    assert prepared.train_items is not None and not any(unit.kl_examples for unit in prepared.train_items)
    assert not run(write(tmp_path / "b.jsonl", [*rows, {**rows[0], "prompt": "ho"}]), "labels").report.warnings


# --- training items ---------------------------------------------------------------------------------------------------


def test_pair_has_same_prompt_and_both_stop_tokens(tmp_path: Path) -> None:
    prepared = run(write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "hey", "chosen": "yo yo yo"}]))
    assert prepared.train_items is not None and len(prepared.train_items) == 2
    for unit in prepared.train_items:
        better, worse = unit.examples
        assert (
            better.prompt_length == worse.prompt_length
            and (better.ids[: better.prompt_length] == worse.ids[: worse.prompt_length]).all()
        )
        assert better.ids[np.flatnonzero(better.weights)[-1]] in prepared.renderer.stop_ids
        assert worse.ids[np.flatnonzero(worse.weights)[-1]] in prepared.renderer.stop_ids
        assert unit.computed_tokens(True) == better.prompt_length + sum(
            len(side) - side.prompt_length for side in unit.examples
        )
    assert prepared.report.stop_token == {"rows": 2, "share": 1.0}


def test_first_turn_of_one_answer_with_weight_0_is_named(tmp_path: Path) -> None:
    turns = [{**A, "weight": 0}, MORE, A], [NO, MORE, A]
    path = write(tmp_path / "a.jsonl", [{"prompt": [U], "chosen": turns[0], "rejected": turns[1]}])
    error = refusal(path)
    assert "only one answer begins with tokens that do not count: its first turn has weight 0" in error
    assert "count the first turn of each answer" in error


def test_pair_is_truncated_in_its_prompt_or_dropped(tmp_path: Path) -> None:
    """On record, 1 and 2: truncation must not empty an answer, or give the two sides different prompts."""
    rows = [
        {"prompt": "word " * 40 + "end", "chosen": "a b c d e f g h", "rejected": "x"},
        {"prompt": "hi", "chosen": "word " * 60, "rejected": "x"},
        *[{**PAIR, "prompt": f"p{n}"} for n in range(300)],
    ]
    path = write(tmp_path / "a.jsonl", rows)
    error = refusal(path, max_length=40)
    assert "2 of 302 training rows are longer than data.max_length" in error
    assert "or choose --data.overlong drop or truncate-start (1 of them can only be dropped: one answer" in error
    long_answers = write(tmp_path / "long.jsonl", [rows[1], *rows[2:]])
    assert refusal(long_answers, max_length=40).endswith("or choose --data.overlong drop")
    prepared = run(path, max_length=40, overlong="truncate-start", bad_rows="drop")
    assert prepared.report.rows["truncated"] == 1 and prepared.report.by_reason == {"answer-too-long": 1}
    assert prepared.train_items is not None
    better, worse = prepared.train_items[0].examples
    assert (
        len(better) <= 40
        and better.prompt_length == worse.prompt_length
        and (better.weights[better.prompt_length :] > 0).all()
    )
    text = prepared.renderer.tokenizer.decode(better.ids)
    assert (
        "a b c d e f g h" in text
        and "end" in text
        and (better.ids[: better.prompt_length] == worse.ids[: worse.prompt_length]).all()
    )
    assert len(run(path, max_length=40, overlong="drop").train_items or ()) == 300


def test_contradicting_rows_are_refused(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "chosen": "no", "rejected": "yo"}]
    message = refusal(write(tmp_path / "a.jsonl", rows))
    assert "a.jsonl:2" in message and "contradicts" in message and "a.jsonl:1" in message
    judged = [{"prompt": "hi", "completion": "yo", "label": label} for label in (True, False)]
    assert "contradicts" in refusal(write(tmp_path / "b.jsonl", judged), "labels")
    lenient = run(write(tmp_path / "c.jsonl", rows), bad_rows="drop")
    assert lenient.report.by_reason == {"contradiction": 1} and len(lenient.train_items or ()) == 1


def test_row_with_an_invalid_part_is_dropped_once(tmp_path: Path) -> None:
    long = "word " * 60
    ranking = write(tmp_path / "a.jsonl", [{"prompt": "hi", "answers": ["yo", "no", long], "scores": [3, 2, 1]}])
    report = run(ranking, strict=False, max_length=60).report
    assert report.rows["dropped"] == 1 and report.by_reason == {"answer-too-long": 1} and report.tokens.examples == 0
    assert "1 of 1 training rows are longer" in str(report.refusal)
    sides = write(tmp_path / "b.jsonl", [{"prompt": "hi", "chosen": "yo", "rejected": long}])
    report = run(sides, "labels", strict=False, max_length=60, overlong="drop").report
    assert report.rows["dropped"] == 1 and report.tokens.examples == 0
    assert "0 of 1 training rows are left" in str(report.refusal)


def test_ranking_as_labels_contradicts_itself_and_its_cleaned_copy_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi", "answers": ["yo", "no", "hm"], "scores": [3, 2, 1]}])
    assert "pairs of this row contradict each other" in refusal(path, "labels")
    check.write_cleaned_copy(DataSection(train=str(path)), tokenizer("chatml"), tmp_path / "b.jsonl", "labels")
    assert run(tmp_path / "b.jsonl", "labels").report.rows["dropped"] == 0


def test_warnings_count_rows_and_include_both_sides(tmp_path: Path) -> None:
    odd = {"prompt": "hi", "answers": ["yo", "no", "{{name}} <|im_end|>"], "scores": [3, 2, 1]}
    warnings = run(write(tmp_path / "a.jsonl", [odd]), "pairs").report.warnings
    assert any(warning.startswith("1 rows have unfilled placeholders") for warning in warnings)
    assert any(warning.startswith("1 rows have control tokens in the text") for warning in warnings)


def test_report_measures_length_bias(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "a b c d", "rejected": "a" if n else "a b c d e f"} for n in range(4)]
    answers = run(write(tmp_path / "a.jsonl", rows)).report.answers
    assert answers["pairs"] == 4 and answers["chosen_longer"] == 0.75 and answers["length_accuracy"] == 0.75


def test_pairs_as_labels_have_kl_examples_with_other_answers(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"yo {n}", "rejected": "no"} for n in range(3)]
    prepared = run(write(tmp_path / "a.jsonl", rows), "labels")
    units = prepared.train_items
    assert units is not None and [unit.desirable for unit in units] == [True, False] * 3
    assert prepared.report.rows["read"] == prepared.report.rows["used"] == 3
    assert prepared.report.answers["desirable"] == 3
    for unit in units:  # the same prompt with another row's answer
        (answer,), (kl_examples,) = unit.examples, unit.kl_examples
        assert (
            kl_examples.ids[: answer.prompt_length] == answer.ids[: answer.prompt_length]
        ).all() and kl_examples.prompt_length == answer.prompt_length
        others = {other.examples[0].ids[other.examples[0].prompt_length :].tobytes() for other in units}
        assert kl_examples.ids[kl_examples.prompt_length :].tobytes() in others
    first, second = units[0].kl_examples[0], units[1].kl_examples[0]
    assert (
        first.ids[first.prompt_length :].tolist() == second.ids[second.prompt_length :].tolist()
    )  # both from the next prompt


def test_held_out_pairs_are_whole(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"yo {n}", "rejected": "no"} for n in range(40)]
    prepared = run(write(tmp_path / "a.jsonl", rows), eval="30%")
    assert prepared.train_items is not None and prepared.eval_items is not None
    assert len(prepared.train_items) + len(prepared.eval_items) == 40
    for unit in [*prepared.train_items, *prepared.eval_items]:
        assert unit.examples[0].line == unit.examples[1].line


RANKINGS = [{"prompt": f"q{n}", "answers": [f"{n} {k}" for k in range(4)], "scores": [4, 3, 2, 1]} for n in range(30)]
BOTH_SIDES = [{"prompt": f"question {n}", "chosen": f"yo {n}", "rejected": f"no {n}"} for n in range(30)]
TWO_LINES = [{"prompt": f"q{n % 15}", "chosen": f"yo {n}", "rejected": f"no {n}"} for n in range(30)]
JUDGED = [{"prompt": f"q{n % 15}", "completion": f"yo {n}", "label": n < 15} for n in range(30)]


@pytest.mark.parametrize(
    ("rows", "data_kind"), [(RANKINGS, "pairs"), (BOTH_SIDES, "labels"), (TWO_LINES, "pairs"), (JUDGED, "labels")]
)
def test_held_out_rows_share_no_prompt_with_training(rows: list[Any], data_kind: DataKind, tmp_path: Path) -> None:
    def held_out_prompts(name: str, source: list[Any]) -> set[str]:
        prepared = run(write(tmp_path / name, source), data_kind, eval="30%")
        trained, held_out = (
            {converted.messages[0].content for converted in part}
            for part in (prepared.train_conversations, prepared.eval_conversations or ())
        )
        assert held_out and trained and not held_out & trained
        assert prepared.report.duplicates["prompts"] == 0 and not prepared.report.warnings
        return held_out

    first = held_out_prompts("a.jsonl", rows)
    more = [{**row, "prompt": f"more {n}"} for n, row in enumerate(rows)]
    assert held_out_prompts("b.jsonl", rows[::-1]) == first and first <= held_out_prompts("c.jsonl", [*more, *rows])


def test_prompts_in_training_and_evaluation_give_a_warning(tmp_path: Path) -> None:
    same_prompt = [{"prompt": "hi", "chosen": f"yo {n}", "rejected": f"no {n}"} for n in range(40)]
    prepared = run(write(tmp_path / "a.jsonl", same_prompt), eval="30%")
    num_held_out = len(prepared.eval_conversations or ())
    assert 0 < num_held_out < 40 and prepared.report.duplicates == {"within": 0, "across": 0, "prompts": num_held_out}
    assert f"{num_held_out} evaluation rows have a prompt that is also in training rows" in prepared.report.warnings
    evaluation = write(
        tmp_path / "b.jsonl", [same_prompt[0], {**same_prompt[1], "chosen": "oh"}, {**PAIR, "prompt": "ho"}]
    )
    report = run(tmp_path / "a.jsonl", eval=str(evaluation)).report
    assert report.eval is not None and report.eval.duplicates == {"within": 0, "across": 1, "prompts": 2}
    assert report.warnings[-2:] == [
        "1 evaluation row is also a training row",
        "2 evaluation rows have a prompt that is also in training rows",
    ]


def test_cleaned_copy_of_pairs(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "rejected": "yo"}, PAIR, {**PAIR, "chosen": "no", "rejected": "yo"}]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "clean.jsonl"
    check.write_cleaned_copy(DataSection(train=str(path)), tokenizer("chatml"), out, "pairs")
    assert [json.loads(line)["rejected"][-1]["content"] for line in out.read_text().splitlines()] == ["no"]
    assert len(run(out).train_items or ()) == 1
    judged = write(tmp_path / "b.jsonl", [{"prompt": "hi", "completion": w, "label": w == "yo"} for w in ("yo", "no")])
    check.write_cleaned_copy(DataSection(train=str(judged)), tokenizer("chatml"), tmp_path / "c.jsonl", "labels")
    assert len(run(tmp_path / "c.jsonl", "labels").train_items or ()) == 2


# --- prompts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ({"prompt": "hi"}, None),
        ({"prompt": [S, U]}, None),
        ({"prompt": "hi", "id": 3, "system": "s"}, None),
        ({"messages": [U]}, None),
        ({"conversations": [{"from": "human", "value": "hi"}]}, None),
        ({"messages": [U, A, MORE]}, None),
        ({"messages": [U, A]}, "yo"),
        ({"prompt": "hi", "completion": "yo"}, "yo"),
        ({"instruction": "hi", "output": "yo"}, "yo"),
    ],
)
def test_prompts_with_and_without_reference_answers(value: dict[str, Any], gold: str | None, tmp_path: Path) -> None:
    prepared = run(write(tmp_path / "a.jsonl", [value]), "prompts")
    assert prepared.train_items is not None
    (prompt,) = prepared.train_items
    assert isinstance(prompt, Prompt) and prompt.gold == gold and prompt.row == 0
    text = prepared.renderer.tokenizer.decode(prompt.examples[0].ids)
    assert text.endswith("<|im_start|>assistant\n") and "yo" not in text.split("more")[-1]
    assert not prompt.examples[0].weights.any()
    assert prepared.report.answers == {"prompts": 1, "right_answers": int(gold is not None)}


def test_reference_answer_includes_calls(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 3}}}
    turns = [U, {"role": "assistant", "content": "", "tool_calls": [call]}]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    data = DataSection(train=str(path), max_length=100)
    units = prepare(data, tokenizer("qwen3"), cache=None, data_kind="prompts").train_items
    assert units is not None and isinstance(units[0], Prompt)
    assert units[0].gold == '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'


def test_prompt_has_the_tokens_of_fine_tuning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [S, U, A, MORE, A]}])
    units, turns = run(path, "prompts").train_items, run(path, "turns").train[0]
    assert units is not None
    ids = units[0].examples[0].ids
    assert turns.ids[: len(ids)].tolist() == ids.tolist() and turns.weights[len(ids) :].all()


@pytest.mark.parametrize(
    ("its", "reasoning_ends"), [(of_trait("opens-with-switch"), ()), (tokenizer("qwen3"), ("</think>",))]
)
def test_prompt_has_reasoning_options_if_its_reference_answer_has_reasoning(
    its: Any, reasoning_ends: tuple[str, ...], tmp_path: Path
) -> None:
    """reasoning_ends is empty if a special token ends reasoning."""
    with_reasoning, without = [U, {**A, "reasoning": "so"}], [[U, A], [U]]
    path = write(tmp_path / "a.jsonl", [{"messages": turns} for turns in (with_reasoning, *without)])
    data = DataSection(train=str(path))
    units = prepare(data, its, cache=None, data_kind="prompts").train_items
    path.write_text(json.dumps({"messages": with_reasoning}) + "\n" + json.dumps({"messages": without[0]}) + "\n")
    turns = prepare(data, its, cache=None, data_kind="turns").train
    assert units is not None
    for unit, example in zip(units, turns, strict=False):
        ids = unit.examples[0].ids
        assert example.ids[: len(ids)].tolist() == ids.tolist() and example.weights[len(ids) :].all()
    assert [unit.reasoning_ends for unit in units] == [reasoning_ends, (), ()]  # type: ignore[attr-defined]
    assert [unit.gold for unit in units] == [A["content"], A["content"], None]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "hi"}, {"prompt": ""}], "a.jsonl:2"),
        ([{"prompt": [U, A]}], "nothing to answer"),
        ([PAIR], "prompts, with reference answers or without"),
        ([{"text": "once"}], "prompts, with reference answers or without"),
    ],
)
def test_rows_without_a_usable_prompt_are_refused(rows: list[Any], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(write(tmp_path / "a.jsonl", rows), "prompts")


def test_missing_answer_is_refused_for_sft(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": "yo"}, {"prompt": "hey", "completion": None}]
    assert "a.jsonl:2: completion is null" in refusal(write(tmp_path / "a.jsonl", rows), "turns")
    assert "--train.objective grpo" in refusal(write(tmp_path / "b.jsonl", [{"prompt": "hi"}]), "turns")


def test_cleaned_copy_of_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi"}, {"prompt": " "}, {"prompt": "hi"}])
    check.write_cleaned_copy(DataSection(train=str(path)), tokenizer("chatml"), tmp_path / "b.jsonl", "prompts")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [{"prompt": [U]}]
    assert len(run(tmp_path / "b.jsonl", "prompts").train_items or ()) == 1
    mixed = write(
        tmp_path / "c.jsonl", [{"messages": [U, A, MORE]}, {"messages": [U, A]}]
    )  # without and with an answer
    check.write_cleaned_copy(DataSection(train=str(mixed)), tokenizer("chatml"), tmp_path / "d.jsonl", "prompts")
    assert len(run(tmp_path / "d.jsonl", "prompts").train_items or ()) == 2


def test_format_document_reads_a_text_file_as_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\nfirst part\n\nsecond part\n\n", encoding="utf-8")
    assert [row.text for row in run(path, "turns").train_conversations] == ["first part", "second part"]
    (row,) = run(path, "turns", format="document").train_conversations
    assert (row.text, row.line) == ("first part\n\nsecond part", 3)
    long = tmp_path / "b.txt"
    long.write_text("word " * 400, encoding="utf-8")
    pieces = run(long, "turns", format="document", overlong="split", max_length=64)
    assert len(pieces.train) > 5 and len(pieces.train_conversations) == 1
    path.write_text("\n \n", encoding="utf-8")
    assert "no rows" in refusal(path, "turns", format="document")


def test_prompt_is_an_exact_prefix_on_both_sides(tmp_path: Path) -> None:
    """On record, 3: one answer would share a token with the end of the prompt, so both sides are encoded separately."""
    template, text = tmp_path / "bare.jinja", "what is the answer then"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    encode = tokenizer("chatml").encode
    cut = next(n for n in range(1, len(text)) if encode(text)[: len(encode(text[:n]))] != encode(text[:n]))
    rows = [{"prompt": text[:cut], "chosen": text[cut:], "rejected": "!"}]
    prepared = run(write(tmp_path / "a.jsonl", rows), template=str(template))
    assert prepared.train_items is not None
    better, worse = prepared.train_items[0].examples
    for side, answer in ((better, text[cut:]), (worse, "!")):
        assert side.ids[: side.prompt_length].tolist() == encode(text[:cut]) and side.weights[-1] > 0
        assert prepared.renderer.tokenizer.decode(side.ids[side.prompt_length :]) == f"{answer}<|im_end|>"
    assert any("encoded separately" in warning for warning in prepared.report.warnings)
