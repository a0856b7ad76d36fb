"""Every block, command, recipe field and link on the pages is checked against the CLI, the API and the files."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import strop
from strop.cli.app import COMMANDS
from strop.config.load import resolve
from strop.config.options import Options
from strop.config.schema import option_fields
from tests import ROOT
from tests.support.commands import find_error
from tests.support.pages import PAGES, SHELL, Block, anchors, blocks, commands, inline, links
from tests.support.scripts import script

BLOCKS = [block for page in PAGES for block in blocks(page)]
FIELDS = {name for name, _ in option_fields()}
TARGETS = set(re.findall(r"^([a-z]+(?:-%|-all)?):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
OTHERS = (
    "sbatch",
    "ray",
    "kubectl",
    "sky",
    "torchrun",
    "pip",
    "git",
    "export",
    "echo",
    "cd",
    "mkdir",
    "curl",
    "uv",
    "pipx",
    "docker",
    "ollama",
    "python3.11",
    "hf",
    "sudo",
)


def shell_faults(block: Block) -> list[str]:
    results = []
    for words in commands(block.text):
        first = words[0].rpartition("/")[2]
        if first == "strop":
            results.append(find_error(words[1:]))
        elif first == "make":
            results += [
                f"no target {word}"
                for word in words[1:]
                if "=" not in word and not {word, re.sub(r"-.*", "-%", word)} & TARGETS
            ]
        elif first in ("python", "python3"):
            results.append(python_fault(words[1:]))
        elif first not in OTHERS:
            results.append(f"a command that nobody checks: {' '.join(words)}")
    return [one for one in results if one]


def python_fault(words: list[str]) -> str | None:
    if words[:1] == ["-m"]:
        name = words[1]
        inside = name.partition(".")[0] in ("strop", "tests", "benchmarks")
        return None if not inside or importlib.util.find_spec(name) else f"no module {name}"
    if words[:1] == ["-c"]:
        ast.parse(words[1])
        return None
    made_elsewhere = words and words[0].partition("/")[0].isupper()
    return None if made_elsewhere or (ROOT / words[0]).is_file() else f"no file {words[0]}"


def recipe_fault(tree: Any) -> str | None:
    if not isinstance(tree, dict) or not {"model", "data", "lora", "train"} & set(tree):
        return "no recipe"
    flat: dict[str, Any] = {}
    for head, value in tree.items():
        flat |= {f"{head}.{leaf}": one for leaf, one in value.items()} if isinstance(value, dict) else {head: value}
    try:
        resolve(None, {"model.name": "m", "data.train": "d", **flat})
    except strop.StropError as error:
        return "; ".join(error.lines())
    return None


def python_faults(text: str) -> list[str]:
    """Return invalid names, arguments and recipe fields in calls of `strop.NAME(...)`."""
    results = []
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "strop"):
            continue
        if node.attr not in dir(strop):
            results.append(f"no strop.{node.attr}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("strop."):
            function = getattr(strop, ast.unparse(node.func).removeprefix("strop."), None)
            if function is not None:
                results += call_faults(function, node)
    return results


def call_faults(function: Any, node: ast.Call) -> list[str]:
    signature = inspect.signature(function)
    free = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    results = []
    for keyword in node.keywords:
        name = keyword.arg
        if name is None or (name in signature.parameters and name not in ("model", "data", "lora", "train")):
            continue
        if not free:
            results.append(f"{function.__name__} takes no {name}")
        elif name in ("model", "data", "lora", "train") and isinstance(keyword.value, ast.Dict):
            keys = [f"{name}.{ast.literal_eval(key)}" for key in keyword.value.keys if key is not None]
            results += [f"no recipe field {key}" for key in keys if key not in FIELDS]
        elif name not in Options.__annotations__:
            results.append(f"no recipe field {name}")
    if len(node.args) > sum(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in signature.parameters.values()
    ):
        results.append(f"{function.__name__}: too many arguments")
    return results


def faults(block: Block) -> list[str]:
    if block.language in SHELL:
        return shell_faults(block) if not is_listing(block) else []
    if block.language == "python":
        return [] if "wrong" in block.marks else python_faults(block.text)
    if block.language == "yaml":
        error = recipe_fault(yaml.safe_load(block.text))
        return [error] if error else []
    if block.language == "json":
        json.loads(block.text)
        return []
    if block.language == "jsonl":
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
        return []
    return [] if block.language == "text" else [f"a block in {block.language!r}, which nobody checks"]


def is_listing(block: Block) -> bool:
    """Return whether a block lists the names in a run folder with their descriptions."""
    return block.language == "" and block.text.startswith("runs/")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_matches_the_cli_and_the_api(block: Block) -> None:
    assert not faults(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_between_backticks_exist(page: Path) -> None:
    """Commands of strop, recipe fields and files that a text mentions exist."""
    wrong = []
    for text in inline(page):
        if match := re.match(r"strop ([a-z][a-z-]*)(.*)", text):
            if match[1] not in (*COMMANDS, "export") and page.name != "comparison.md":
                wrong.append(text)
        elif match := re.match(r"(?:--)?((?:model|data|lora|train)\.[a-z_]+)\b(?![.(])", text):
            wrong += [] if match[1] in FIELDS else [text]
        elif page.name != "comparison.md" and re.fullmatch(r"(src|tests|tools|benchmarks)/[\w./-]+\.\w+", text):
            wrong += [] if (ROOT / text).exists() else [text]  # the comparison names files of other tools
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_targets_exist(page: Path) -> None:
    wrong = []
    for name, anchor in links(page):
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            wrong.append(name)
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{name}#{anchor}")
    assert not wrong


def test_commands_have_no_placeholder_that_a_shell_reads_as_a_redirection() -> None:
    assert [str(block) for block in BLOCKS if block.language in SHELL and re.search(r"<[\w ]+>", block.text)] == []
    clones = {re.sub(r" *#.*", "", line) for block in BLOCKS for line in block.text.splitlines() if "git clone" in line}
    assert clones == {"git clone ADDRESS strop && cd strop"}


def test_pytorch_for_cpus_is_installed_before_strop_with_the_tested_version() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition("### Upgrade")[0]
    lines = [line for line in page.splitlines() if line.startswith("    ")]
    torch = [n for n, line in enumerate(lines) if "whl/cpu" in line]
    strop = [n for n, line in enumerate(lines) if "make demo" in line or "constraints.txt" in line]
    assert len(torch) == 2 and torch[0] < strop[0] < torch[1] < strop[1]
    (version,) = re.findall(r"^torch(==.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert all(f"torch{version} " in lines[n] for n in torch)


def test_tutorial_plans_the_run_that_it_trains_and_finds_strop_of_each_installation() -> None:
    page, install = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tutorial.md", "install.md"))
    (planned,), (trained,) = (re.findall(rf"^strop {name} (.*)$", page, re.M) for name in ("plan", "train"))
    assert trained.startswith(f"{planned} --out ")
    paths = set(re.findall(r'export PATH="[^"]+"', install))
    assert len(paths) == 2 and paths <= set(re.findall(r'export PATH="[^"]+"', page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_link_texts_are_not_file_names(page: Path) -> None:
    assert re.findall(r"\[[\w/]+\.md\]\(", page.read_text(encoding="utf-8")) == []


def test_blocks_of_the_api_page_define_the_names_that_they_use() -> None:
    for block in (block for block in BLOCKS if block.page.name == "api.md"):
        names = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(dir(builtins))
        bound |= set(re.findall(r"^import (\w+)", block.text, re.M))
        assert {node.id for node in names} <= bound, block


def test_reference_reads_as_text() -> None:
    recipe, formats = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("recipe.md", "formats.md"))
    assert not re.search(r"\| `(None|True|False|\d+\.0)` \|", recipe)
    assert "auto, replicated, sharded, streamed" not in recipe
    columns = re.findall(r"^- (?:Columns|Or): (.*)", formats, re.M)
    assert len(columns) > 20 and all(line.count(" or ") <= 2 for line in columns)


PLANTED = [
    ("sh", "strop trian --model demo --data d.jsonl", "no command trian"),
    ("sh", "strop train --model demo --data d.jsonl --lora.rank 3", "--lora.rank"),
    ("sh", "strop train --model demo --data d.jsonl --model.quantization nf5", "nf4"),
    ("sh", "strop merge runs/a", "--out"),
    ("sh", "make cake", "no target cake"),
    ("sh", "python benchmarks/none.py", "no file"),
    ("sh", "wget http://x", "nobody checks"),
    ("yaml", "lora: {rank: 3}", "unknown key"),
    ("python", "strop.tune(model='demo')", "no strop.tune"),
    ("python", "strop.train(model='demo', lora={'rank': 3})", "lora.rank"),
    ("python", "strop.merge('a', 'b', dtpye='bf16')", "dtpye"),
    ("toml", "a = 1", "nobody checks"),
]


@pytest.mark.parametrize(("language", "text", "expected"), PLANTED)
def test_wrong_block_is_reported(language: str, text: str, expected: str) -> None:
    result = faults(Block(ROOT / "README.md", 1, language, (), text))
    assert result and expected in " ".join(result)


def test_tables_are_those_of_the_code() -> None:
    for page, text in script(ROOT / "tools" / "reference.py").pages().items():
        assert page.read_text(encoding="utf-8") == text, "run python tools/reference.py"
        assert text.count("\n| ") > 50 and "|  |" not in text


def test_the_site_reads_blocks_and_folded_parts_as_github_does() -> None:
    hooks = script(ROOT / "tools" / "site" / "hooks.py")
    place = SimpleNamespace(file=SimpleNamespace(src_path="a.md"))
    files = SimpleNamespace(get_file_from_path=lambda name: None)
    text = (
        "[t](../tests/test_docs.py) [d](data.md#the-hub)\n\n```sh run\nstrop runs\n```\n\n<details><summary>s</summary>"
    )
    converted = hooks.on_page_markdown(text, place, {"docs_dir": str(ROOT / "docs")}, files)
    assert (
        "t [d](data.md#the-hub)" in converted
        and "```sh\nstrop" in converted
        and '<details markdown="1"><summary>' in converted
    )
