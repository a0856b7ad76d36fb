"""Options that are lists or maps: on the command line, in a recipe file and in Python."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from strop import api
from strop.config.load import Resolved, resolve
from strop.config.schema import allows_type, option_fields
from strop.errors import InputError, StropError
from tests.support.runs import run

REQUIRED = {"model.name": "demo", "data.train": "rows.jsonl"}
HINTS = {field: info.annotation for field, info in option_fields()}
LISTS = [field for field, hint in HINTS.items() if allows_type(hint, list)]
MAPS = [field for field, hint in HINTS.items() if allows_type(hint, dict)]


def sample(field: str) -> Any:
    """Return a valid value with two entries."""
    if field in MAPS:
        return {"one": 3, "two": 5} if field.startswith(("lora.", "train.")) else {"one": "a", "two": "b"}
    choices = get_args(get_args(HINTS[field])[0]) if get_origin(get_args(HINTS[field])[0]) is Literal else ()
    return list(choices[:2]) or ["<A>", "<B>"]


def on_command_line(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return what `strop train` resolves, or its error output."""
    resolved: list[Resolved] = []

    def train(recipe: Path | None, **options: Any) -> None:
        fields = {name: value for name, value in options.items() if name in HINTS}
        resolved.append(resolve(recipe, fields))
        raise InputError("not trained")

    monkeypatch.setattr(api, "train", train)
    monkeypatch.setattr(api, "check_recipe_inputs", lambda *_args, **_options: None)  # the files do not exist
    given = [] if any(word.startswith("--data.train") for word in words) else ["--data.train", "rows.jsonl"]
    code, _, err = run("train", "--model.name", "demo", *given, *words, capsys=capsys)
    assert code == 2 and "Traceback" not in err
    return resolved[0].choices if resolved else err


@pytest.mark.parametrize("field", LISTS)
def test_list_has_the_same_forms_everywhere(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = expected = sample(field)
    forms = [
        [f'--{field}=["{first}","{second}"]'],
        [f"--{field}", f"[{first}, {second}]"],
        [f"--{field}", f"['{first}', '{second}']"],
        [f"--{field}", first, f"--{field}", second],
        [f"--{field}", f'["{first}"]', f"--{field}", second],
    ]
    if not field.startswith("data."):  # names of files may contain commas
        forms.append([f"--{field}", f"{first},{second}"])
    for words in forms:
        assert on_command_line(words, monkeypatch, capsys)[field].value == expected, words
    file = tmp_path / "r.yaml"
    file.write_text(yaml.dump({**REQUIRED, field: expected}))
    assert resolve(file).choices[field].value == expected
    assert resolve(None, {**REQUIRED, field: tuple(expected)}).choices[field].value == expected


@pytest.mark.parametrize("field", MAPS)
def test_map_has_the_same_forms_everywhere(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = sample(field)
    one, two = expected["one"], expected["two"]
    forms = [
        [f"--{field}", json.dumps(expected)],
        [f"--{field}", f"{{one: {one}, two: {two}}}"],
        [f"--{field}", f"one={one},two={two}"],
        [f"--{field}", f"one={one}", f"--{field}", f"two={two}"],
    ]
    for words in forms:
        assert on_command_line(words, monkeypatch, capsys)[field].value == expected, words
    file = tmp_path / "r.yaml"
    file.write_text(yaml.dump({**REQUIRED, field: expected}))
    assert resolve(file).choices[field].value == resolve(None, {**REQUIRED, field: expected}).choices[field].value


@pytest.mark.parametrize("field", [*LISTS, *MAPS])
@pytest.mark.parametrize(
    "text",
    [
        '["<A>","<B>"',
        '"<A>","<B>"',
        '[["<A>"]]',
        "{<A>, <B>}",
        "{a:1}",
        '{"<A>"',
        "[<A>, <B>",
        '{"a": {"a": 1}, }}',
        "['a]",
    ],
)
def test_what_looks_like_a_list_or_a_map_is_refused_with_a_form_that_works(
    field: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if text == "{a:1}" and field in LISTS:
        return  # a token may look so
    refused = on_command_line([f"--{field}={text}"], monkeypatch, capsys)
    assert isinstance(refused, str) and f"--{field}" in refused, refused
    if "JSON: " in refused:
        form = shlex.split(" ".join(refused.split("JSON: ")[1].split()))
        shown = on_command_line(form, monkeypatch, capsys)
        assert field in shown or "must be" in shown, shown  # the entries are examples


@pytest.mark.parametrize("field", [*LISTS, *MAPS])
def test_list_or_map_in_quotes_is_refused_in_a_recipe_file_and_in_python(field: str, tmp_path: Path) -> None:
    text = json.dumps(sample(field))
    file = tmp_path / "r.yaml"
    file.write_text(yaml.dump({**REQUIRED, field: text}))
    for source in ((file, None), (None, {**REQUIRED, field: text})):
        with pytest.raises(StropError) as raised:
            resolve(*source)
        assert f"not text: write {'{' if field in MAPS else '['}" in raised.value.lines()[0]


def test_name_given_twice_in_a_map_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for texts in (["q=4,q=8"], ['{"q": 4, "q": 8}'], ["q=4", "q=8"]):
        words = [word for text in texts for word in ("--lora.rank_pattern", text)]
        assert "given twice" in on_command_line(words, monkeypatch, capsys)


def test_tokens_may_have_brackets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for text, tokens in {
        "[INST],[/INST]": ["[INST]", "[/INST]"],
        "[CITE]": ["[CITE]"],
        '["[", "a,b", "\\ud83d\\ude00"]': ["[", "a,b", "😀"],
        "[]": [],
    }.items():
        assert on_command_line(["--lora.new_tokens", text], monkeypatch, capsys)["lora.new_tokens"].value == tokens


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.exact"], True),
        (["--train.exact", "--lora.use_dora"], True),
        (["--train.exact", "false", "--train.max_steps", "1"], False),
        (["--train.exact=false"], False),
        (["--lora.use_dora", "--train.exact", "true"], True),
    ],
)
def test_boolean_without_a_value_is_true(words: list[str], expected: bool, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        "train", "--model", "demo", "--data", "demo", "--print-recipe", "--json", *words, capsys=capsys
    )
    assert code == 0, err
    assert json.loads(out)["recipe"]["train"]["exact"] is expected
