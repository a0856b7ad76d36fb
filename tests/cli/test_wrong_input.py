"""Invalid input ends with one line, a fix and exit code 2, before weights load."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from strop.cli import app
from strop.errors import suggest
from tests.support.runs import QUICK, run

GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n'


@pytest.fixture
def model_without_weights(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the tiny model; loading its weights fails the test."""
    monkeypatch.setattr("strop.training.build.load_base", lambda *args, **more: pytest.fail("weights were loaded"))
    return tiny_folder


def test_nearest_excludes_the_word_itself() -> None:
    assert suggest("rows.jsonl", ["rows.jsonl", "x"]) == ""
    assert suggest("rows.jsonl", ["rows.jsonl", "rows.json"]) == " (did you mean rows.json?)"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "nope.jsonl"], "nope.jsonl"),
        (["--data", "rows.json"], "rows.jsonl"),  # the most similar file
        (["--data", "bad.jsonl"], "bad.jsonl:2"),
        (["--data", "empty.jsonl"], "empty.jsonl"),
        (["--data", "rows.jsonl", "--lora.rnk", "8"], "--lora.rnk"),
        (["--data", "rows.jsonl", "--lora.r", "0"], "--lora.r"),
        (
            ["--data", "rows.jsonl", "--lora.target_modules", "q_prj"],
            "q_prj matches no linear layer (did you mean q_proj?)",
        ),
        (["--data", "rows.jsonl", "--out", "taken"], "taken: is not empty"),
        (["--data", "rows.jsonl", "--out", "a-run"], "strop resume a-run"),
        (["--data", "rows.jsonl", "--out", "rows.jsonl"], "rows.jsonl: cannot be written"),
        (["--data", "rows.jsonl", "--model", "no-such-model"], "no-such-model"),
        (["--data", "rows.jsonl", "--model", "./no/such/model"], "no such run or model folder"),
        (["--data", "rows.jsonl", "--model", "rows.jsonl"], "rows.jsonl: data, not a model"),
        (["--data", "rows.jsonl", "--model", "./rows.jsonl"], "rows.jsonl: data, not a model"),
        (["--data", "rows.jsonl", "--model", "pickled"], "pickle"),
        (["--data", "rows.jsonl", "--model", "remote-code"], "remote-code"),
        (["--data", "rows.jsonl", "--adapter", "taken"], "no adapter there"),
        (["--data", "rows.jsonl", "--track", "trackio"], "pip install trackio"),
        (["--data", "rows.jsonl", "--model.device", "cuda:7"], "cuda:7"),
        (["--data", "rows.jsonl", "--data.max_length", "4"], "data.overlong"),
        (["--data", "rows.jsonl."], "Fix: use rows.jsonl"),
        (["--data", "https://example.com/rows.jsonl"], "download it"),
        (["--data", "rows.jsonl", "--lora.target_modules", "q_proj", "v_proj"], "a list as a,b"),
        (["--data", "rows.jsonl", "--model", "demoo"], "Fix: give demo, or"),
        (["no-recipe.yaml"], "no-recipe.yaml: no such recipe file"),
    ],
)
def test_invalid_input_is_refused_before_weights_load(
    words: list[str],
    expected: str,
    model_without_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(GOOD)
    Path("bad.jsonl").write_text(GOOD + "{oops\n" + GOOD)
    Path("empty.jsonl").write_text("")
    Path("taken").mkdir()
    Path("taken/file").write_text("x")
    Path("a-run").mkdir()
    Path("a-run/recipe.yaml").write_text("{}")
    Path("a-run/lock.json").write_text("{}")
    config = json.loads((model_without_weights / "config.json").read_text())
    for name, changes in (("pickled", {}), ("remote-code", {"auto_map": {"AutoModel": "x.py"}})):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({**config, **changes}))
        Path(name, "pytorch_model.bin").write_bytes(b"x")
    model = [] if "--model" in words else ["--model", str(model_without_weights)]
    out = [] if "--out" in words else ["--out", "fresh"]
    code, _, err = run("train", *QUICK, *model, *out, *words, capsys=capsys)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in err
    assert "Traceback" not in err and not Path("fresh").exists()


def test_all_bad_lines_are_listed(
    model_without_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(GOOD + "{oops\n" + GOOD + '{"messages": "hello"}\n')
    words = ["train", "--model", model_without_weights, "--data", rows, "--out", tmp_path / "o", "--json"]
    code, out, err = run(*words, capsys=capsys)
    assert code == 2 and f"{rows}:2" in err and f"{rows}:4" in err
    error = json.loads(out)["error"]
    assert [place["line"] for place in error["where"]] == [2, 4] and error["kind"] == "DataError"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_read_only_folder_is_refused_before_weights_load(
    model_without_weights: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run(
        "train",
        "--model",
        model_without_weights,
        "--data",
        rows_file,
        "--out",
        tmp_path / "locked" / "r",
        capsys=capsys,
    )
    assert code == 2 and "cannot be written" in err


def test_claimed_run_folder_is_refused(
    tiny_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A claim of a running process counts, a stale claim does not."""
    out = tmp_path / "r"
    assert run("train", "--model", tiny_folder, "--data", rows_file, "--out", out, *QUICK, capsys=capsys)[0] == 0
    (out / "report.json").unlink()
    holder = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        import psutil

        started = psutil.Process(holder.pid).create_time()
        (out / "claim.json").write_text(json.dumps({"pid": holder.pid, "started": started}))
        code, _, err = run("resume", out, capsys=capsys)
        assert code == 2 and f"in use by process {holder.pid}" in err
    finally:
        holder.communicate()
    assert run("resume", out, capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--model", "dmeo", "--data", "rows.jsonl"], "did you mean demo?"),
        (["train", "--model", "demo", "--data", "rows.jsnl"], "did you mean rows.jsonl?"),
        (["train", "--model", "demo", "--data", "rows.jsonl", "--out", "taken"], "taken: is not empty"),
        (["train", "nope.gguf", "--data", "rows.jsonl"], "nope.gguf: no such GGUF file"),
        (["eval", "nope", "--data", "rows.jsonl"], "nope: no such folder"),
        (["eval", "demo", "--data", "nope.jsonl"], "nope.jsonl: no such file"),
        (["chat", "./nope"], "./nope: no such run or model folder"),
        (["serve", "nope"], "nope: no such folder"),
        (["merge", "nope", "--out", "merged"], "nope: no such run or adapter folder"),
        (["export", "gguf", "nope", "--out", "x.gguf"], "nope: no such folder"),
        (["export", "ollama", "demo", "--out", "taken"], "taken: already exists"),
        (["export", "gguf", "demo", "--out", "tuned"], "tuned: the name must end in .gguf"),
        (["export", "gguf", "demo", "--out", "rows.jsonl/tuned.gguf"], "rows.jsonl is a file"),
        (["export-script", "nope", "--out", "script"], "nope: no such run"),
        (["push", "nope", "me/x"], "nope: no such run, adapter or model folder"),
        (["adapters", "nope"], "nope: no such folder"),
        (["resume", "nope"], "nope: no such run"),
    ],
)
def test_a_path_that_does_not_exist_is_refused_before_torch_is_imported(
    words: list[str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    code = (
        "import sys, atexit; from strop.cli.app import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules)); main()"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "train --model demo --data rows.jsonl --lr high",
            "error: --lr: must be a number, such as 0.0001 (got 'high')",
        ),
        ("train demo --data rows.jsonl --train.learning_rate high", "error: --train.learning_rate: must be a number"),
        ("train demo --data rows.jsonl --rank 0", "error: --rank: must be at least 1 (got '0')"),
        ("train demo --data rows.jsonl --rank many", "error: --rank: must be a whole number, such as 16 (got 'many')"),
        ("train demo --data rows.jsonl --device gpu", "--device: must be auto, cpu, mps, cuda or cuda:N (got 'gpu')"),
        ("train demo --data rows.jsonl --max-time soon", "--max-time: must be a value such as 90s, 30m or 2h"),
        (
            "train demo --data rows.jsonl --train.gradient_checkpointing 0",
            "must be auto, off, on or offload, or must be at least 1 (got '0')",
        ),
        (
            "train demo --data rows.jsonl --train.micro_batch 9",
            "error: --train.micro_batch: larger than --batch-size\n",
        ),
        ("serve demo --port x", "error: --port: must be a whole number (got 'x')\nFix: for example: strop serve runs/"),
        ("train", "error: --model and --data are required\nFix: give --model and --data, or a recipe file\n"),
        ("plan --data rows.jsonl", "error: --model is required\nFix: give --model, or a recipe file\n"),
        ("train recipe.yaml", "error: --data is required\nFix: give --data, or complete recipe.yaml\n"),
        ("train demo --packing", "--packing: no such option: rows are always packed, so leave it out\nFix: see `strop"),
        ("train demo --data rows.jsonl --lr abc --epochs 0", "Fix: for example --epochs 3 --lr 0.0001\n"),
        ("train demo --data rows.jsonl --quantization 4bit", "Fix: for example --quantization nf4\n"),
        ("train demo --data rows.jsonl --quantization 8bit", "Fix: for example --quantization int8\n"),
        ("train demo --data rows.jsonl --data.format documnt", "Fix: for example --data.format document\n"),
        ("train demo --data rows.jsonl --device gpu", "Fix: for example --device cuda\n"),
        ("train demo --data rows.jsonl --max-time soon", "Fix: for example --max-time 90s\n"),
        ("train demo --data rows.jsonl --max-steps x", "Fix: correct it, or leave it out for the default\n"),
        ("train demo --gpu", "error: --gpu: no such option (did you mean --device cuda?)\n"),
        (
            "train demo --gradient_accumulation_steps 4 --bf16 --colour --lora_alpha=8 --packing",
            "error: --gradient_accumulation_steps: no such option (did you mean --batch-size? It is the effective "
            "batch size, in rows per update; --train.micro_batch is the number of rows computed at once)\n"
            "error: --bf16: no such option (did you mean --model.dtype bf16?)\n"
            "error: --colour: no such option\n"
            "error: --lora_alpha: no such option (did you mean --alpha?)\n"
            "error: --packing: no such option: rows are always packed, so leave it out\n"
            "Fix: see `strop train --help`\n",
        ),
        (
            "train demo --per_device_train_batch_size 4",
            "(did you mean --train.micro_batch? It is the number of rows computed at once; --batch-size is the "
            "effective batch size, in rows per update)\n",
        ),
        ("export gguf runs/a --foo --out x --bar", "error: --foo: no such option\nerror: --bar: no such option\n"),
        ("--foo", "error: no such option: --foo\nFix: see `strop --help`\n"),
        ("check your rows.jsonl --show 1", "Fix: quote the path: strop check 'your rows.jsonl' --show 1\n"),
        ("train demo rows.jsonl", "Fix: give it with --data rows.jsonl\n"),
        ("train demo --report-to wandb", "Fix: see `strop train --help-all`\n"),  # its panel is not in --help
        ("train demo --train.gradient_accumulation 4", "(did you mean --batch-size? It is the effective batch size"),
        ("train demo --colour", "error: --colour: no such option\nFix: see `strop train --help`"),
        ("merge runs/a -o x", "error: -o: no such option (did you mean --out?)\n"),
        ("train demo -d rows.jsonl", "error: -d: no such option (did you mean --data?)\n"),
        ("merge runs/a --ouut x", "error: --ouut: no such option (did you mean --out?)\nFix: "),
        ("train --data", "error: option '--data' requires an argument\nFix: for example: strop train --model demo"),
        (
            "chat a b",
            "error: got unexpected extra argument(s) (b)\nFix: give the prompt through a pipe: echo b | strop chat a",
        ),
        ("finetune", "error: finetune: no such command (did you mean train?)\nFix: for example: strop train --model"),
        ("compare a b", "compare: no such command (did you mean eval?)\nFix: for example: strop eval runs/mine"),
        ("gguf runs/a", "(did you mean export gguf?)\nFix: for example: strop export gguf runs/mine --out mine.gguf"),
        ("report runs/a", "report: no such command (did you mean dash?)\nFix: "),
        ("sweep", "error: --over is required\nFix: give the values to compare: --over lora.r=8,16,32"),
        ("mrege runs/a", "mrege: no such command (did you mean merge?)\nFix: for example: strop merge runs/mine"),
        ("colour", "error: colour: no such command\nFix: see `strop --help`"),
        (
            "export rows.jsonl",
            "commands first: gguf, ollama (got rows.jsonl)\nFix: for example: strop export gguf rows.",
        ),
        ("merge runs/a", "error: --out is required\nFix: for example: strop merge runs/mine --out mine-merged"),
        ("eval", "error: RUN|MODEL is required\nFix: for example: strop eval runs/mine --data held_out.jsonl"),
        (
            "train demo --data nope.jsonl",
            "error: nope.jsonl: no such file\nFix: the data files there are rows.jsonl, broken.jsonl, ",
        ),
        (
            "import recipe.yaml",
            "error: TOOL, the program of which the file is, is required\nFix: for example: strop import axolotl ",
        ),
        ("train demo --data nope", "error: nope: no such file\nFix: a Hub data set is named owner/name"),
        ("train demo --model demo --data rows.jsonl", "error: --model: given twice, as demo and as an option"),
        (
            "check broken.jsonl",
            "correct them, or write the others to a file: `strop check --data broken.jsonl --fix clean.jsonl`; or",
        ),
    ],
)
def test_a_terminal_shows_the_typed_names_and_a_fix(
    words: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "your rows.jsonl"):
        Path(name).write_text(GOOD)
    Path("broken.jsonl").write_text(GOOD + '{"messages": [{"role": "us\n')
    Path("recipe.yaml").write_text("model: demo\n")
    code, out, err = run(*words.split(), capsys=capsys)
    assert code == 2 and expected in (out if words == "check broken.jsonl" else err), err


def test_cut_json_error_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD + '{"messages": [{"role": "us\n')
    _, out, _ = run("check", tmp_path / "rows.jsonl", capsys=capsys)
    assert "column 24: not valid JSON: Unterminated string\n" in out


def test_bad_rows_are_refused_before_torch_is_imported(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD + '{"messages": [{"role": "us\n')
    code = (
        "import sys, atexit; from strop.cli.app import main\n"
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    words, environment = ["train", str(tiny_folder), "--data", "rows.jsonl"], {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "error: rows.jsonl:2: column 24: not valid JSON" in done.stderr
    command = f"strop check --data rows.jsonl --model {tiny_folder} --fix clean.jsonl"
    assert f"write the others to a file: `{command}`" in done.stderr
    assert done.stdout.split() == ["False"]


def test_chat_with_a_model_without_a_template_is_refused_before_it_loads(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("strop.engine.decode.model.load", lambda *args, **options: pytest.fail("the model was loaded"))
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    code, _, err = run("chat", base, capsys=capsys)
    assert code == 2 and "the model has no chat template" in err and "Fix: " in err


def test_retries_of_the_hub_are_one_line() -> None:
    texts = [
        "'[Errno -2]' thrown while requesting HEAD https://hub",
        "Retrying in 1s [Retry 1/5].",
        "a token is invalid",
    ]
    shorten = app._ShortRetries()
    records = [logging.makeLogRecord({"msg": text}) for text in texts * 2]
    shown = [record.getMessage() for record in records if shorten.filter(record)]
    assert shown == ["the Hub does not answer; trying again for up to half a minute", texts[2], texts[2]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("chat runs/mine --temp 0", "did you mean --temperature?"),
        ("chat runs/mine hello", "echo hello | strop chat runs/mine"),
        ("train --resume_from_checkpoint x", "did you mean strop resume RUN?"),
        ("train --gpus 2", "did you mean --devices?"),
        ("train --wandb", "did you mean --track wandb?"),
        ("train --dpo", "did you mean --objective dpo?"),
        ("serve --model x", "the run or model without an option"),
        ("export gguf x --quantize q8_0", "did you mean --type?"),
        ("ps", "did you mean runs?"),
    ],
)
def test_words_of_other_tools_are_explained(words: str, expected: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "strop", *words.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert process.returncode == 2 and expected in " ".join(process.stderr.split()), process.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [("help", "Usage: strop"), ("help plan", "Usage: strop plan"), ("version", "strop 0."), ("-V", "strop 0.")],
)
def test_help_and_version_are_words_too(words: str, expected: str) -> None:
    process = subprocess.run([sys.executable, "-m", "strop", *words.split()], capture_output=True, text=True)
    assert process.returncode == 0 and expected in process.stdout


def test_recipe_of_another_tool_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "ax.yml"
    recipe.write_text("base_model: x\nadapter: lora\ndatasets: []\nsequence_len: 8\n", encoding="utf-8")
    code, _, err = run("train", recipe, capsys=capsys)
    assert code == 2 and f"strop import TOOL {recipe} --out recipe.yaml" in err


def test_missing_run_names_the_runs_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        run_folder = tmp_path / "runs" / name
        run_folder.mkdir(parents=True)
        (run_folder / "lock.json").write_text("{}")
        (run_folder / "recipe.yaml").write_text("{}")
        os.utime(run_folder / "recipe.yaml", (0, 1000 if name == "first" else 2000))
    for words in (
        "chat runs/nope",
        "merge runs/nope --out x",
        "resume runs/nope",
        "export gguf runs/nope --out x.gguf",
    ):
        code, _, err = run(*words.split(), capsys=capsys)
        assert code == 2 and "Fix: give one of the runs runs/second, runs/first\n" in err, err


def test_only_runs_are_suggested_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("r/fooa", "r/food"):
        Path(folder).mkdir(parents=True)
    Path("r/foo.log").write_text("output of a run", encoding="utf-8")
    code, _, err = run("resume", "r/foo", capsys=capsys)
    assert code == 2 and "r/foo: no such run" in err and "did you mean" not in err
    Path("r/food/recipe.yaml").write_text("", encoding="utf-8")
    Path("r/food/lock.json").write_text("{}", encoding="utf-8")
    code, _, err = run("resume", "r/foo", capsys=capsys)
    assert "did you mean r/food?" in err
