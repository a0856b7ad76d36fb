"""Pairs, rankings and judged answers: what is read, and what must hold before anything is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strop.config.schema import DataSection
from strop.data import check
from strop.data.formats import conversations, detect_format
from strop.data.prepare import Prepared, prepare
from strop.data.row_errors import REASONS, RowError
from strop.data.types import Conversation, DataKind, Prompt, Row
from strop.errors import DataError
from tests.support.families import tokenizer
from tests.support.templates import tokenizer as of_trait

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
NO, MORE = {"role": "assistant", "content": "no"}, {"role": "user", "content": "more"}
S = {"role": "system", "content": "s"}
PAIR = {"prompt": "hi", "chosen": "yo", "rejected": "no"}


def convert(value: dict[str, Any]) -> tuple[list[Conversation], list[RowError]]:
    bad: list[RowError] = []
    return list(conversations([Row("d", 1, value)], bad=bad)), bad


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
def test_pairs_under_other_names(value: dict[str, Any]) -> None:
    (made,), bad = convert(value)
    assert not bad and detect_format(value) == "preference"
    said = [[turn.content for turn in side.messages if turn.role != "system"] for side in made.sides]
    assert said == [["hi", "yo"], ["hi", "no"]]


def test_whole_conversations_share_what_they_begin_with() -> None:
    (made,), _ = convert({"chosen": [U, A, MORE, A], "rejected": [U, A, MORE, NO]})
    assert texts(made) == [[("hi", 1.0), ("yo", 0.0), ("more", 1.0), (side, 1.0)] for side in ("yo", "no")]


def test_answers_of_several_turns_are_one_answer() -> None:
    (made,), _ = convert({"prompt": "hi", "chosen": [A, MORE, A], "rejected": [NO]})
    assert [[weight for _, weight in side] for side in texts(made)] == [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0]]


def test_a_ranking_makes_pairs_of_what_differs() -> None:
    made, bad = convert({"prompt": "hi", "answers": ["a", "b", "c"], "scores": [2, 1, 2]})
    assert not bad
    assert [tuple(side[-1][0] for side in texts(one)) for one in made] == [("a", "b"), ("c", "b")]


@pytest.mark.parametrize("judged", [True, False])
@pytest.mark.parametrize("words", [("true", "false"), ("up", "down"), ("Good", "bad"), (True, False), (1, 0)])
@pytest.mark.parametrize("column", ["label", "kto_tag", "thumbs"])
def test_answers_with_a_label(column: str, words: tuple[Any, Any], judged: bool) -> None:
    label = words[0] if judged else words[1]
    for value in (
        {"prompt": "hi", "completion": "yo"},
        {"messages": [U, A]},
        {"instruction": "hi", "output": "yo"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    ):
        if column == "label" and words[0] is not True and words[0] == 1:  # it may be a class
            assert detect_format({**value, column: label}) != "labelled"
            continue
        (made,), bad = convert({**value, column: label})
        assert not bad and made.desirable is judged and made.messages[-1].content == "yo"


def test_a_label_judges_the_last_turn_alone() -> None:
    (made,), _ = convert({"messages": [U, A, MORE, A], "label": True})
    assert [message.weight for message in made.messages] == [1.0, 0.0, 1.0, 1.0]


def test_a_turn_of_an_answer_may_be_left_out_and_a_weight_of_the_prompt_counts_nothing() -> None:
    (made,), _ = convert({"prompt": [U, {**A, "weight": 0.5}, MORE], "chosen": [A], "rejected": [NO]})
    assert [weight for _, weight in texts(made)[0]] == [1.0, 0.0, 1.0, 1.0]
    (made,), _ = convert({"prompt": [U], "chosen": [{**A, "train": False}, MORE, A], "rejected": [NO]})
    assert [weight for _, weight in texts(made)[0]] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({**PAIR, "rejected": "yo"}, "same-answers"),
        ({"chosen": "yo", "rejected": "no"}, "no-prompt"),
        ({"messages": [U, A], "chosen": "yo", "rejected": "no"}, "no-question"),
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
        ({"messages": [U, A], "images": ["a.png"]}, "media"),
        ({"messages": [U, A], "audio": "a.wav"}, "media"),
        ({"messages": [{**U, "content": "<image>what is it"}, A]}, "media"),
        ({**PAIR, "video": "a.mp4"}, "media"),
    ],
)
def test_rows_that_are_wrong_name_the_reason(value: dict[str, Any], code: str, tmp_path: Path) -> None:
    bad: list[RowError] = []
    format = "preference" if "rejected" in value else "labelled" if code == "bad-label" else "auto"
    assert not list(conversations([Row("d", 1, value)], format=format, bad=bad))
    assert [fault.code for fault in bad] == [code] and code in REASONS
    data_kind: DataKind = "pairs" if "rejected" in value or "scores" in value else "turns"
    data_kind = "labels" if {"kto_tag", "label"} & set(value) else data_kind
    said = refusal(write(tmp_path / "a.jsonl", [value]), data_kind, format=format)
    assert "a.jsonl:1" in said


def test_what_was_half_read_before_is_read() -> None:
    (made,), _ = convert({"query": "more", "response": "yo", "history": [["hi", "no"]]})
    assert [m.content for m in made.messages] == ["hi", "no", "more", "yo"]
    (made,), _ = convert({"conversation": [{"human": "hi", "assistant": "no"}, {"human": "more", "assistant": "yo"}]})
    assert [m.content for m in made.messages] == ["hi", "no", "more", "yo"]


# --- which objective learns from what ----------------------------------------------------------------------------


def test_each_objective_names_the_rows_that_it_needs(tmp_path: Path) -> None:
    pairs, turns = write(tmp_path / "pairs.jsonl", [PAIR]), write(tmp_path / "turns.jsonl", [{"messages": [U, A]}])
    judged = write(tmp_path / "judged.jsonl", [{"messages": [U, A], "label": True}])
    assert "--train.objective dpo" in refusal(pairs, "turns")
    assert "prompt=A,completion=chosen, with your names" in refusal(pairs, "turns"), "a file's own names may be others"
    assert "--train.objective kto" in refusal(judged, "turns") and "--data.columns" in refusal(judged, "turns")
    assert "pairs" in refusal(turns, "pairs") and "--train.objective kto" in refusal(judged, "pairs")
    assert "label" in refusal(turns, "labels")
    numbers = write(tmp_path / "numbers.jsonl", [{"messages": [U, A], "label": 1}, {"messages": [U, NO], "label": 0}])
    assert "--data.format labelled" in refusal(numbers, "labels")
    assert len(run(numbers, "labels", format="labelled").train_items or ()) == 2
    assert run(judged, "turns", columns={"messages": "messages"}).train_items is None


def test_one_class_of_judgements_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "yo", "label": True} for n in range(4)]
    assert "all training rows are judged good" in refusal(write(tmp_path / "a.jsonl", rows), "labels")


def test_one_class_of_judgements_is_told_of_held_out_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": f"yo {n}", "label": n not in (3, 4)} for n in range(30)]
    path, held = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[5:8])
    part = run(path, "labels", eval=str(held)).report.eval
    assert part is not None and part.refusal is None
    assert part.answers["desirable"] == 3 and part.answers["undesirable_tokens"] == part.answers["undesirable"] == 0
    assert part.warnings == ["all evaluation rows are judged good: the evaluation says nothing of the other kind"]
    assert run(path, "labels", eval="10%").eval_items  # all of them good, as it happens


def test_judged_answers_to_one_prompt_have_no_divergence(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": f"yo {n}", "label": n % 2 == 0} for n in range(6)]
    prepared = run(write(tmp_path / "a.jsonl", rows), "labels")
    (said,) = prepared.report.warnings
    assert said.startswith("all training rows have one prompt: the divergence in the loss is 0 throughout")
    assert prepared.train_items is not None and not any(unit.kl_examples for unit in prepared.train_items)
    assert not run(write(tmp_path / "b.jsonl", [*rows, {**rows[0], "prompt": "ho"}]), "labels").report.warnings


# --- units -------------------------------------------------------------------------------------------------------


def test_a_pair_has_one_prompt_and_both_stop_tokens(tmp_path: Path) -> None:
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


def test_a_pair_is_cut_in_its_prompt_alike_or_dropped_never_in_an_answer(tmp_path: Path) -> None:
    """On record, 1 and 2: an answer that truncation leaves empty; each side cut by itself, which then has another
    prompt, or has lost its stop token."""
    rows = [
        {"prompt": "word " * 40 + "end", "chosen": "a b c d e f g h", "rejected": "x"},
        {"prompt": "hi", "chosen": "word " * 60, "rejected": "x"},
        *[{**PAIR, "prompt": f"p{n}"} for n in range(300)],
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert "longer than data.max_length" in refusal(path, max_length=40)
    prepared = run(path, max_length=40, overlong="truncate-start", bad_rows="drop")
    assert prepared.report.rows["truncated"] == 1 and prepared.report.by_reason == {"too-long": 1}
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
    with pytest.raises(DataError) as raised:
        run(path, max_length=40)
    assert raised.value.fix.endswith("--data.overlong drop or truncate-start")


def test_contradictions_are_refused(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "chosen": "no", "rejected": "yo"}]
    said = refusal(write(tmp_path / "a.jsonl", rows))
    assert "a.jsonl:2" in said and "opposite of" in said and "a.jsonl:1" in said
    judged = [{"prompt": "hi", "completion": "yo", "label": label} for label in (True, False)]
    assert "opposite of" in refusal(write(tmp_path / "b.jsonl", judged), "labels")
    kept = run(write(tmp_path / "c.jsonl", rows), bad_rows="drop")
    assert kept.report.by_reason == {"contradiction": 1} and len(kept.train_items or ()) == 1


def test_a_row_of_which_a_part_is_wrong_is_not_used_and_counts_once(tmp_path: Path) -> None:
    long = "word " * 60
    ranking = write(tmp_path / "a.jsonl", [{"prompt": "hi", "answers": ["yo", "no", long], "scores": [3, 2, 1]}])
    report = run(ranking, strict=False, max_length=60).report
    assert report.rows["dropped"] == 1 and report.by_reason == {"too-long": 1} and report.tokens.examples == 0
    assert "1 of 1 training rows are longer" in str(report.refusal)
    sides = write(tmp_path / "b.jsonl", [{"prompt": "hi", "chosen": "yo", "rejected": long}])
    report = run(sides, "labels", strict=False, max_length=60, overlong="drop").report
    assert report.rows["dropped"] == 1 and report.tokens.examples == 0
    assert "0 of 1 training rows are left" in str(report.refusal)


def test_a_ranking_as_judged_answers_contradicts_itself_and_its_cleaned_copy_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi", "answers": ["yo", "no", "hm"], "scores": [3, 2, 1]}])
    assert "its own pairs say the opposite of each other" in refusal(path, "labels")
    check.write_cleaned_copy(DataSection(train=str(path)), tokenizer("chatml"), tmp_path / "b.jsonl", "labels")
    assert run(tmp_path / "b.jsonl", "labels").report.rows["dropped"] == 0


def test_what_is_odd_is_counted_by_row_on_both_sides(tmp_path: Path) -> None:
    odd = {"prompt": "hi", "answers": ["yo", "no", "{{name}} <|im_end|>"], "scores": [3, 2, 1]}
    warnings = run(write(tmp_path / "a.jsonl", [odd]), "pairs").report.warnings
    assert any(said.startswith("1 rows hold unfilled placeholders") for said in warnings)
    assert any(said.startswith("1 rows hold control tokens in the text") for said in warnings)


def test_length_bias_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "a b c d", "rejected": "a" if n else "a b c d e f"} for n in range(4)]
    found = run(write(tmp_path / "a.jsonl", rows)).report.answers
    assert found["pairs"] == 4 and found["chosen_longer"] == 0.75 and found["length_accuracy"] == 0.75


def test_pairs_as_judged_answers_and_answers_beside(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "chosen": f"yo {n}", "rejected": "no"} for n in range(3)]
    prepared = run(write(tmp_path / "a.jsonl", rows), "labels")
    units = prepared.train_items
    assert units is not None and [unit.desirable for unit in units] == [True, False] * 3
    assert prepared.report.rows["read"] == prepared.report.rows["used"] == 3
    assert prepared.report.answers["desirable"] == 3
    for unit in units:  # the same prompt with the answer of another
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


def test_a_share_for_evaluation_keeps_pairs_whole(tmp_path: Path) -> None:
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
    ("rows", "data_kind"),
    [(RANKINGS, "pairs"), (BOTH_SIDES, "labels"), (TWO_LINES, "pairs"), (JUDGED, "labels")],
)
def test_a_share_for_evaluation_shares_no_prompt_with_training(
    rows: list[Any], data_kind: DataKind, tmp_path: Path
) -> None:
    def held(name: str, given: list[Any]) -> set[str]:
        prepared = run(write(tmp_path / name, given), data_kind, eval="30%")
        trained, held = (
            {made.messages[0].content for made in part}
            for part in (prepared.train_conversations, prepared.eval_conversations or ())
        )
        assert held and trained and not held & trained
        assert prepared.report.duplicates["prompts"] == 0 and not prepared.report.warnings
        return held

    first = held("a.jsonl", rows)
    more = [{**row, "prompt": f"more {n}"} for n, row in enumerate(rows)]
    assert held("b.jsonl", rows[::-1]) == first and first <= held("c.jsonl", [*more, *rows])


def test_prompts_on_both_sides_are_told(tmp_path: Path) -> None:
    one_prompt = [{"prompt": "hi", "chosen": f"yo {n}", "rejected": f"no {n}"} for n in range(40)]
    prepared = run(write(tmp_path / "a.jsonl", one_prompt), eval="30%")
    held = len(prepared.eval_conversations or ())
    assert 0 < held < 40 and prepared.report.duplicates == {"within": 0, "across": 0, "prompts": held}
    assert f"{held} evaluation rows have a prompt that train rows have too" in prepared.report.warnings
    other = write(tmp_path / "b.jsonl", [one_prompt[0], {**one_prompt[1], "chosen": "oh"}, {**PAIR, "prompt": "ho"}])
    report = run(tmp_path / "a.jsonl", eval=str(other)).report
    assert report.eval is not None and report.eval.duplicates == {"within": 0, "across": 1, "prompts": 2}
    assert report.warnings[-2:] == [
        "1 evaluation rows are also train rows",
        "2 evaluation rows have a prompt that train rows have too",
    ]


def test_a_cleaned_copy_of_pairs(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "rejected": "yo"}, PAIR, {**PAIR, "chosen": "no", "rejected": "yo"}]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "clean.jsonl"
    check.write_cleaned_copy(DataSection(train=str(path)), tokenizer("chatml"), out, "pairs")
    assert [json.loads(line)["rejected"][-1]["content"] for line in out.read_text().splitlines()] == ["no"]
    assert len(run(out).train_items or ()) == 1
    judged = write(tmp_path / "b.jsonl", [{"prompt": "hi", "completion": w, "label": w == "yo"} for w in ("yo", "no")])
    check.write_cleaned_copy(DataSection(train=str(judged)), tokenizer("chatml"), tmp_path / "c.jsonl", "labels")
    assert len(run(tmp_path / "c.jsonl", "labels").train_items or ()) == 2


# --- prompts, to which the model answers itself ------------------------------------------------------------------


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
def test_prompts_with_right_answers_and_without(value: dict[str, Any], gold: str | None, tmp_path: Path) -> None:
    prepared = run(write(tmp_path / "a.jsonl", [value]), "prompts")
    assert prepared.train_items is not None
    (prompt,) = prepared.train_items
    assert isinstance(prompt, Prompt) and prompt.gold == gold and prompt.row == 0
    text = prepared.renderer.tokenizer.decode(prompt.examples[0].ids)
    assert text.endswith("<|im_start|>assistant\n") and "yo" not in text.split("more")[-1]
    assert not prompt.examples[0].weights.any()
    assert prepared.report.answers == {"prompts": 1, "right_answers": int(gold is not None)}


def test_the_right_answer_to_a_prompt_has_its_calls(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 3}}}
    turns = [U, {"role": "assistant", "content": "", "tool_calls": [call]}]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    data = DataSection(train=str(path), max_length=100)
    units = prepare(data, tokenizer("qwen3"), cache=None, data_kind="prompts").train_items
    assert units is not None and isinstance(units[0], Prompt)
    assert units[0].gold == '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'


def test_the_prompt_is_what_fine_tuning_has_in_front_of_the_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"messages": [S, U, A, MORE, A]}])
    units, turns = run(path, "prompts").train_items, run(path, "turns").train[0]
    assert units is not None
    ids = units[0].examples[0].ids
    assert turns.ids[: len(ids)].tolist() == ids.tolist() and turns.weights[len(ids) :].all()


@pytest.mark.parametrize(
    ("its", "reasoning_ends"), [(of_trait("opens-with-switch"), ()), (tokenizer("qwen3"), ("</think>",))]
)
def test_a_prompt_is_asked_with_reasoning_where_its_right_answer_has_some(
    its: Any, reasoning_ends: tuple[str, ...], tmp_path: Path
) -> None:
    """closes: as texts of answers have it; not where it is a special token."""
    shows_reasoning, asks = [U, {**A, "reasoning": "so"}], [[U, A], [U]]
    path = write(tmp_path / "a.jsonl", [{"messages": turns} for turns in (shows_reasoning, *asks)])
    data = DataSection(train=str(path))
    units = prepare(data, its, cache=None, data_kind="prompts").train_items
    path.write_text(json.dumps({"messages": shows_reasoning}) + "\n" + json.dumps({"messages": asks[0]}) + "\n")
    turns = prepare(data, its, cache=None, data_kind="turns").train
    assert units is not None
    for unit, example in zip(units, turns, strict=False):
        ids = unit.examples[0].ids
        assert example.ids[: len(ids)].tolist() == ids.tolist() and example.weights[len(ids) :].all()
    assert [unit.reasoning_ends for unit in units] == [reasoning_ends, (), ()]  # type: ignore[attr-defined]
    assert [unit.gold for unit in units] == [A["content"], A["content"], None]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "hi"}, {"prompt": ""}], "a.jsonl:2"),
        ([{"prompt": [U, A]}], "nothing to answer"),
        ([PAIR], "prompts, with right answers or without"),
        ([{"text": "once"}], "prompts, with right answers or without"),
    ],
)
def test_rows_that_ask_nothing_are_refused(rows: list[Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path / "a.jsonl", rows), "prompts")


def test_a_missing_answer_is_a_fault_where_answers_are_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "completion": "yo"}, {"prompt": "hey", "completion": None}]
    assert "a.jsonl:2: completion is null" in refusal(write(tmp_path / "a.jsonl", rows), "turns")
    assert "--train.objective grpo" in refusal(write(tmp_path / "b.jsonl", [{"prompt": "hi"}]), "turns")


def test_a_cleaned_copy_of_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi"}, {"prompt": " "}, {"prompt": "hi"}])
    check.write_cleaned_copy(DataSection(train=str(path)), tokenizer("chatml"), tmp_path / "b.jsonl", "prompts")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [{"prompt": [U]}]
    assert len(run(tmp_path / "b.jsonl", "prompts").train_items or ()) == 1
    mixed = write(tmp_path / "c.jsonl", [{"messages": [U, A, MORE]}, {"messages": [U, A]}])  # with an answer, without
    check.write_cleaned_copy(DataSection(train=str(mixed)), tokenizer("chatml"), tmp_path / "d.jsonl", "prompts")
    assert len(run(tmp_path / "d.jsonl", "prompts").train_items or ()) == 2


def test_a_text_file_is_one_document_where_that_is_asked_for(tmp_path: Path) -> None:
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
    assert "0 rows" in refusal(path, "turns", format="document")
    assert "document" in refusal(long, "turns", format="documnt")


def test_a_prompt_is_an_exact_prefix_on_both_sides(tmp_path: Path) -> None:
    """On record, 3: a token would cover the prompt's end and one answer's start; elsewhere the end is not trained."""
    template, whole = tmp_path / "bare.jinja", "what is the answer then"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    encode = tokenizer("chatml").encode
    cut = next(n for n in range(1, len(whole)) if encode(whole)[: len(encode(whole[:n]))] != encode(whole[:n]))
    rows = [{"prompt": whole[:cut], "chosen": whole[cut:], "rejected": "!"}]
    prepared = run(write(tmp_path / "a.jsonl", rows), template=str(template))
    assert prepared.train_items is not None
    better, worse = prepared.train_items[0].examples
    for side, text in ((better, whole[cut:]), (worse, "!")):
        assert side.ids[: side.prompt_length].tolist() == encode(whole[:cut]) and side.weights[-1] > 0
        assert prepared.renderer.tokenizer.decode(side.ids[side.prompt_length :]) == f"{text}<|im_end|>"
    assert any("encoded apart" in warning for warning in prepared.report.warnings)
