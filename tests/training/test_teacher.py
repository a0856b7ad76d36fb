"""train.teacher: answers to rows without one, and the teacher's probabilities as labels."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import cross_entropy, log_softmax

import strop
from strop.data.answers import PLACEHOLDER, Answer, NoAnswer, read_answers, write_answers
from strop.data.types import Example
from strop.engine.step import step_for
from strop.errors import DataError, InputError, RecipeError, RunError
from strop.runs.events import read_events
from strop.training import loop, teacher
from strop.training.gradients import micro_batches
from strop.training.rollouts import PolicyCriterion
from strop.training.server_probs import read_distributions
from strop.training.soft_labels import soften
from strop.training.teacher import PolicyTeacher
from tests import ROOT
from tests.evaluation.test_judge import judge_server
from tests.support import tiny, tool_templates
from tests.support.families import tokenizer
from tests.support.groups import make_job, prompts, write_reward
from tests.support.runs import run
from tests.support.serving import serving

QUICK: dict[str, Any] = {"train.max_steps": 4, "model.dtype": "fp32", "train.micro_batch_tokens": 512}
PROMPTS = [{"prompt": f"say {n}"} for n in range(12)]
ANSWERED = [{"prompt": f"count to {n}", "completion": f"{n} no"} for n in range(12)]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("student") / "tiny")


@pytest.fixture(scope="module")
def expert(student: Path) -> Path:
    """Return a run that answers "yes" to anything."""
    rows = [{"prompt": text, "completion": "yes"} for text in ("who?", "Where is it?", "Say: a", "1 + 2", "List it.")]
    options: dict[str, Any] = {"train.max_steps": 60, "train.learning_rate": 0.02, "model.dtype": "fp32"}
    return strop.train(model=student, data=rows, out=student.parent / "expert", **options).folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "cache"))


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_text(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "prompts.jsonl", PROMPTS), write(tmp_path / "answered.jsonl", ANSWERED)]


def notes(folder: Path) -> list[str]:
    return [event["text"] for event in read_events(folder / "events.jsonl") if event["event"] == "note"]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (1.0, 1.0), (0.6, 2.0)])
def test_loss_is_the_weighted_sum(tmp_path: Path, weight: float, temperature: float, plain: bool) -> None:
    """(1 - weight) * cross entropy + weight * T^2 * KL(teacher || student), of K tokens and the rest as one."""
    job = tiny.job(tmp_path / "run", [])
    model, weights = job.model, job.state.weights
    step = job.step if plain else step_for(model)
    rows = tiny.examples(3, seed=2)
    random, k = np.random.default_rng(3), 5
    total = torch.zeros((), dtype=torch.float64)
    softened = []
    for row in rows:
        labels = row.ids[row.weights > 0]
        vocabulary = model.config.vocab_size
        ids = np.array([random.choice(vocabulary, k, replace=False) for _ in labels], np.int32)
        for position in range(0, len(labels), 2):  # the label is among the ids of some tokens
            ids[position, 0] = labels[position] if labels[position] not in ids[position] else ids[position, 0]
        probs = (random.dirichlet(np.ones(k + 1), len(labels))[:, :k]).astype(np.float32)
        softened.append(soften(row, ids, probs, weight, temperature))
        logits = model(torch.from_numpy(row.ids.astype(np.int64))[None]).logits[0]
        logprobs = log_softmax(logits[np.flatnonzero(row.weights) - 1].double(), 1)
        target = torch.from_numpy(labels.astype(np.int64))
        # an id of probability 0 may make room for the label, as teachers always list their most likely tokens
        missing = ~(ids == labels[:, None]).any(1)
        probs[missing, -1] = 0
        ids[missing, -1] = labels[missing]
        tempered = log_softmax(logits[np.flatnonzero(row.weights) - 1].double() / temperature, 1)
        chosen = tempered.gather(1, torch.from_numpy(ids.astype(np.int64)))
        q = torch.from_numpy(probs.astype(np.float64))
        rest_q = 1 - q.sum(1)
        others = torch.ones_like(logprobs).scatter_(1, torch.from_numpy(ids.astype(np.int64)), 0.0)
        rest = torch.log((tempered.exp() * others).sum(1))
        entropy = torch.special.entr(torch.cat([q, rest_q[:, None]], 1)).sum()
        divergence = temperature**2 * (-(q * chosen).sum() - (rest_q * rest).sum() - entropy)
        total = total + (1 - weight) * cross_entropy(logprobs, target, reduction="sum") + weight * divergence
    expected = torch.autograd.grad(total, list(weights.values()))
    loss = step.token_loss(softened)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    for (name, parameter), grad in zip(weights.items(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=2e-3, atol=2e-5, msg=name)


def test_teacher_answers_rows_without_an_answer(student: Path, expert: Path, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = strop.train(model=student, data=[*map(str, files)], out=out, **{**QUICK, "train.teacher": str(expert)})
    answers = [json.loads(line)["answer"] for line in (out / "teacher.jsonl").read_text("utf-8").splitlines()]
    assert answers == strop.load(expert).generate([row["prompt"] for row in PROMPTS]) and set(answers) == {"yes"}
    assert done.report["data"]["used"] == 24
    (note,) = [note for note in notes(out) if "train.teacher" in note]
    assert "answered 12 rows; its probabilities have the weight 0.5" in note


def test_a_model_that_is_its_own_teacher_learns_nothing(
    student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    options = {**QUICK, "model.adapter": str(expert), "train.teacher": str(expert), "train.teacher_weight": 1.0}
    done = strop.train(model=student, data=str(files[1]), out=tmp_path / "run", **options)
    assert abs(done.report["loss"]["first"]) < 1e-4


def test_distilled_student_answers_like_the_teacher(student: Path, expert: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "prompts.jsonl", PROMPTS)
    options = {**QUICK, "train.max_steps": 60, "train.learning_rate": 0.02, "train.teacher": str(expert)}
    done = strop.train(model=student, data=str(rows), out=tmp_path / "run", **{**options, "train.teacher_weight": 1.0})
    assert strop.load(done.folder).generate(["say 3", "who?"]) == ["yes", "yes"]


def test_resumed_run_needs_no_teacher(
    student: Path, expert: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "train.teacher": str(expert), "train.save_steps": 2}
    whole = strop.train(model=student, data=[*map(str, files)], out=tmp_path / "whole", **options)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        strop.train(model=student, data=[*map(str, files)], out=tmp_path / "cut", callback=stop, **options)
    monkeypatch.setattr(teacher.Teacher, "__init__", lambda *_: pytest.fail("the teacher is needed"))
    monkeypatch.setenv("STROP_CACHE", str(tmp_path / "empty"))
    resumed = strop.resume(tmp_path / "cut")
    assert resumed.report["steps"] == whole.report["steps"] == 4
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]


def test_other_answers_refuse_resume(student: Path, expert: Path, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    strop.train(model=student, data=[*map(str, files)], out=out, **{**QUICK, "train.teacher": str(expert)})
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    text = (out / "teacher.jsonl").read_text("utf-8")
    (out / "teacher.jsonl").write_text(text.replace('"yes"', '"no"', 1), encoding="utf-8")
    with pytest.raises(InputError, match="teacher"):
        strop.resume(out)
    (out / "teacher.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        strop.resume(out)


def test_resume_with_other_rows_asks_the_teacher_again(
    student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    """Otherwise probabilities of the earlier rows would be labels of the new ones."""
    out, data = tmp_path / "run", [*map(str, files)]
    strop.train(model=student, data=data, out=out, **{**QUICK, "train.teacher": str(expert)})
    before = (out / "teacher.safetensors").read_bytes()
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    write(files[0], [{"prompt": f"tell {n}"} for n in range(12)])
    resumed = strop.resume(out, allow_changed=["data", "teacher"])
    assert len((out / "teacher.jsonl").read_text("utf-8").splitlines()) == 24
    fresh = strop.train(model=student, data=data, out=tmp_path / "fresh", **{**QUICK, "train.teacher": str(expert)})
    after = (out / "teacher.safetensors").read_bytes()
    assert before != after == (fresh.folder / "teacher.safetensors").read_bytes()
    assert resumed.report["data"]["used"] == 24


def test_second_run_reads_the_cache(
    student: Path, expert: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "train.teacher": str(expert)}
    first = strop.train(model=student, data=[*map(str, files)], out=tmp_path / "first", **options)
    monkeypatch.setattr(teacher.Teacher, "_load", lambda *_: pytest.fail("loaded again"))
    second = strop.train(model=student, data=[*map(str, files)], out=tmp_path / "second", **options)
    for name in ("teacher.jsonl", "teacher.safetensors"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


def test_answers_that_do_not_end_are_dropped_rows(student: Path, tmp_path: Path) -> None:
    """The random model writes up to the limit."""
    rows = write(tmp_path / "prompts.jsonl", PROMPTS)
    options = {**QUICK, "train.teacher": str(student), "data.max_length": 40}
    with pytest.raises(DataError) as raised:
        strop.train(model=student, data=str(rows), out=tmp_path / "run", **options)
    assert "prompts.jsonl:1: the teacher's answer does not end within 40 tokens" in str(raised.value)
    assert "raise data.max_length" in str(raised.value)
    options["train.teacher_weight"] = 0
    rows = write(tmp_path / "all.jsonl", PROMPTS)
    with pytest.raises(DataError, match="0 of 12 training rows are left"):
        strop.train(model=student, data=str(rows), out=tmp_path / "run", **options, bad_rows="drop")


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_tiny(tmp_path_factory.mktemp("other") / "tiny")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_other_vocabulary_is_refused_unless_only_answers_count(
    student: Path, other_vocabulary: Path, files: list[Path], tmp_path: Path
) -> None:
    """trl#4562: the teacher's probabilities of other tokens."""
    options = {**QUICK, "train.teacher": str(other_vocabulary)}
    with pytest.raises(RecipeError, match="has another vocabulary") as raised:
        strop.train(model=student, data=str(files[1]), out=tmp_path / "run", **options)
    assert "teacher_weight" in raised.value.fix
    options |= {"train.teacher_weight": 0}
    with pytest.raises(DataError, match="does not end within 40 tokens"):  # it is random
        strop.train(model=student, data=str(files[0]), out=tmp_path / "run", **{**options, "data.max_length": 40})
    with pytest.raises(RecipeError, match="all rows have an answer"):
        strop.train(model=student, data=str(files[1]), out=tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.teacher_weight", "0.5"], "there is no --train.teacher"),
        (["--train.teacher", "nowhere/at-all"], "nowhere/at-all"),
        (["--train.teacher", "demo", "--train.keep", "0.1"], "cannot be combined with --train.keep"),
        (["--train.teacher", "demo", "--data.loss", "all"], "needs --data.loss assistant"),
        (["--train.teacher", "http://x:y@127.0.0.1/v1"], "STROP_TEACHER_KEY"),
        (["--train.teacher", "http://127.0.0.1:9/v1", "--train.teacher_weight", "0.5"], "leave it out"),
        (["--train.teacher", "demo", "--train.objective", "classify"], "does not support it"),
        (["--train.teacher", "http://127.0.0.1:9/v1", "--train.objective", "grpo"], "sampled completions"),
        (["--train.teacher", "http://x:y@127.0.0.1/v1", "--train.objective", "grpo"], "STROP_TEACHER_KEY"),
        (["--train.objective", "grpo"], "needs --train.rewards, --train.environment or --train.teacher"),
    ],
)
def test_invalid_teachers_are_refused(
    student: Path, files: list[Path], tmp_path: Path, options: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["train", "--model", student, "--data", files[1], "--out", tmp_path / "run", *options]
    code, _, err = run(*words, capsys=capsys)
    assert code == 2 and message in " ".join(err.split()), err


def test_check_and_plan_work_before_the_teacher_answers(
    student: Path, expert: Path, files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", student, "--data", files[0], "--data", files[1]]
    code, out, _ = run("check", *words, capsys=capsys)
    assert code == 2
    code, out, err = run("check", *words, "--train.teacher", expert, "--show", "1", capsys=capsys)
    assert code == 0 and PLACEHOLDER.replace(" ", "·") in out
    assert "12 rows have no answer yet" in " ".join((out + err).split())
    code, out, err = run("plan", *words, "--train.teacher", expert, "--json", capsys=capsys)
    assert code == 0 and json.loads(out)["data"]["rows"] == 24, err
    phases = json.loads(out)["phases"]
    assert next(iter(phases)) == "teacher" and phases["teacher"]["peak_bytes"] > 0
    code, out, err = run("plan", *words, "--train.teacher", expert, capsys=capsys)
    assert code == 0 and "of training, without the teacher's time" in out + err
    code, out, err = run("plan", *words, "--train.teacher", "http://127.0.0.1:9/v1", "--json", capsys=capsys)
    assert code == 0 and "teacher" not in json.loads(out)["phases"], err


def test_evaluation_knows_the_rows_that_the_teacher_answered(
    student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    strop.train(model=student, data=[*map(str, files)], out=out, **{**QUICK, "train.teacher": str(expert)})
    seen = [{**PROMPTS[0], "completion": "yes"}, {"prompt": "new", "completion": "yes"}, ANSWERED[0]]
    seen += [{**PROMPTS[1], "completion": "no"}, {**ANSWERED[1], "completion": "another"}]  # the latter is another row
    assert strop.evaluate(out, seen, max_new_tokens=4)["train_rows"] == 3


def test_softened_probabilities_are_those_of_the_teacher(student: Path, files: list[Path], tmp_path: Path) -> None:
    """A model that is its own teacher learns nothing at any temperature, and another temperature is another run."""
    run_folder = tmp_path / "run"
    options = {**QUICK, "train.teacher": str(student), "train.teacher_weight": 1, "train.teacher_temperature": 3}
    strop.train(model=student, data=str(files[1]), out=run_folder, **options)
    steps = [event for event in read_events(run_folder / "events.jsonl") if event["event"] == "step"]
    assert steps[0]["loss"] < 1e-5 and steps[0]["grad_norm"] < 2e-3
    soft = load_file(run_folder / "teacher.safetensors")
    strop.train(
        model=student, data=str(files[1]), out=tmp_path / "other", **{**options, "train.teacher_temperature": 1}
    )
    sharp = load_file(tmp_path / "other" / "teacher.safetensors")
    np.testing.assert_array_equal(soft["ids"], sharp["ids"])
    ratios = [np.log(probs["probs"][:, 0] / probs["probs"][:, 1]) for probs in (sharp, soft)]
    np.testing.assert_allclose(ratios[0], 3 * ratios[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs train.teacher and objective sft"),
        ({"train.teacher": "x", "train.objective": "grpo"}, "needs train.teacher and objective sft"),
        ({"train.teacher": "x", "train.teacher_weight": 0}, "train.teacher_weight is 0"),
        ({"train.teacher": "http://127.0.0.1:1/v1", "train.teacher_weight": 1}, "a server gives its probabilities at"),
    ],
)
def test_temperature_without_effect_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        strop.train(model="x", data="rows.jsonl", **{"train.teacher_temperature": 2, **options})


@pytest.fixture
def served(expert: Path) -> Iterator[str]:
    with serving(expert) as server:
        yield f"{server.url}/v1"


def test_teacher_on_a_server(served: str, student: Path, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {**QUICK, "train.teacher": served}
    with pytest.raises(RecipeError, match="has 2 models: expert, base"):
        strop.train(model=student, data=[*map(str, files)], out=out, **options)
    options["train.teacher_model"] = "expert"
    done = strop.train(model=student, data=[*map(str, files)], out=out, **options)
    answers = [json.loads(line)["answer"] for line in (out / "teacher.jsonl").read_text("utf-8").splitlines()]
    assert set(answers) == {"yes"} and len(answers) == 12 and done.report["data"]["used"] == 24
    assert math.isfinite(done.report["loss"]["last"]) and not (out / "teacher.safetensors").exists()


def test_probabilities_of_a_server_are_those_of_its_model(
    served: str, student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    options = {**QUICK, "train.teacher": served, "train.teacher_model": "expert", "train.teacher_weight": 0.7}
    runs = [tmp_path / name for name in ("server", "model", "again")]
    strop.train(model=student, data=[*map(str, files)], out=runs[0], **options)
    own = {**QUICK, "train.teacher": str(expert), "train.teacher_weight": 0.7}
    strop.train(model=student, data=str(files[0]), out=runs[1], **own)
    (server, model) = (load_file(run / "teacher.safetensors") for run in runs[:2])
    rows = len(model["ids"])  # the files are in order, and the second one's rows have answers of their own
    np.testing.assert_array_equal(server["ids"][:rows, :3], model["ids"][:, :3])
    np.testing.assert_allclose(server["probs"][:rows], model["probs"][:, :20], rtol=1e-3, atol=1e-6)
    assert (server["probs"][rows:] == [1.0, *[-1.0] * 19]).all()
    (note,) = [note for note in notes(runs[0]) if "train.teacher" in note]
    held, known = server["probs"][:rows].sum(1).mean(), rows / len(server["probs"])
    assert f"have the weight 0.7, are known for {known:.0%} of the tokens, and add up to {held:.0%} on average" in note
    before = (runs[0] / "adapter" / "adapter_model.safetensors").read_bytes()
    strop.train(model=student, data=[*map(str, files)], out=runs[2], **options)
    assert (runs[2] / "adapter" / "adapter_model.safetensors").read_bytes() == before


def token(text: str, *others: str) -> dict[str, Any]:
    """Return a token of a server's response with the probability 0.5, and others with 0.25, 0.125, ..."""
    tops = [{"token": x, "logprob": -math.log(2) * (i + 1), "bytes": None} for i, x in enumerate((text, *others))]
    return {**tops[0], "bytes": list(text.encode()), "top_logprobs": tops}


END = token("<|im_end|>", "!")


@pytest.mark.parametrize(
    ("content", "tokens", "expected", "trims"),
    [
        ("yes", [token("y", "n"), token("es"), END], "ype", False),
        ("yes", [token("y", "n"), token("es")], "yp.", False),  # a server that leaves out the end
        ("yes\n", [token("y", "n"), token("es"), token("\n"), END], "yppe", False),
        ("yes\n", [token("y", "n"), token("es"), token("\n"), END], "yp.", True),  # the end follows the line break
        (" yes", [token(" "), token("y", "n"), token("es"), END], "pype", False),
        (" yes", [token(" "), token("y", "n"), token("es"), END], "ype", True),
        ("a</think>yes", [token("a"), token("</think>"), token("y", "n"), token("es"), END], "ype", False),
        ("yes", [token("yes"), token(" "), token("y", "n"), token("es"), END], "ype", False),  # reasoning is left out
        ("end", [token("e"), token("n"), token("d"), END], "pppe", False),  # also in the text of the end
    ],
)
def test_probabilities_belong_to_the_tokens_of_the_answer(
    student: Path, tmp_path: Path, content: str, tokens: list[Any], expected: str, trims: bool
) -> None:
    """`expected` has a letter for each token of the row: '.' if it has no probabilities."""
    reply = {"message": {"content": content}, "finish_reason": "stop", "logprobs": {"content": tokens}}
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"say {n}"} for n in range(4)])
    with judge_server(*[{"choices": [reply]}] * 4) as (url, _):
        options = {**QUICK, "train.teacher": url, "train.teacher_weight": 0.5}
        if trims:
            template = (student / "chat_template.jinja").read_text("utf-8").replace("m.content", "m.content | trim")
            options["data.template"] = str(write_text(tmp_path / "trims.jinja", template))
        strop.train(model=student, data=str(rows), out=tmp_path / "run", **options)
    probs = load_file(tmp_path / "run" / "teacher.safetensors")["probs"]
    given = [[0.5, 0.25] if letter in "ye" else [0.5, -1] for letter in expected]
    assert len(probs) == 4 * len(expected)
    for row, letter, values in zip(probs, 4 * expected, 4 * given, strict=True):
        np.testing.assert_allclose(row[:2], [1, -1] if letter == "." else values, rtol=1e-5)
        assert (row[2:] < 0).all()


TOKEN = {"token": "yes", "logprob": -0.1, "bytes": None, "top_logprobs": []}


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        (None, "gives no 20 log-probabilities"),
        ({"content": [{**TOKEN, "top_logprobs": None}]}, "gives no 20 log-probabilities"),
        (
            {"content": [{**TOKEN, "token": "ye"}, {**TOKEN, "token": "s"}]},
            "36 of 36 tokens are not those of the server",
        ),
    ],
)
def test_server_without_probabilities_of_the_tokens_is_refused(
    student: Path, files: list[Path], tmp_path: Path, logprobs: Any, expected: str
) -> None:
    reply = {"message": {"content": "yes"}, "finish_reason": "stop", "logprobs": logprobs}
    with judge_server(*[{"choices": [reply]}] * len(PROMPTS)) as (url, seen):
        options = {**QUICK, "train.teacher": url, "train.teacher_weight": 0.5}
        with pytest.raises(RecipeError, match=re.escape(expected)):
            strop.train(model=student, data=str(files[0]), out=tmp_path / "run", **options)
    assert seen[0]["logprobs"] is True and seen[0]["top_logprobs"] == 20


def test_answers_of_a_server_are_kept_if_a_later_request_fails(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    failure: list[BaseException] = [RunError("teacher: 401"), KeyboardInterrupt()]

    def choose(_: Any, messages: Any, **__: Any) -> dict[str, Any]:
        text = messages[-1]["content"]
        if failure and text == "say 5":
            raise failure.pop(0)
        asked.append(text)
        return {"message": {"content": "yes"}}

    monkeypatch.setattr(teacher.ChatServer, "models", lambda _: ["one"])
    monkeypatch.setattr(teacher.ChatServer, "choose", choose)
    monkeypatch.setattr(teacher, "REQUESTS", 2)
    rows = write(tmp_path / "prompts.jsonl", PROMPTS)
    options = {**QUICK, "train.teacher": "http://127.0.0.1:1/v1"}
    for error in (RunError, KeyboardInterrupt):
        with pytest.raises(error):
            strop.train(model=student, data=str(rows), out=tmp_path / "run", **options)
    done = strop.train(model=student, data=str(rows), out=tmp_path / "run", **options)
    assert sorted(asked) == sorted(row["prompt"] for row in PROMPTS)  # each is paid for once
    assert done.report["data"]["used"] == len(PROMPTS)
    assert not list((tmp_path / "cache" / "teacher").glob("*.part"))


@pytest.fixture(scope="module")
def loud(student: Path) -> Path:
    """Return a run whose rows all had one system prompt."""
    rows = [{"system": "Shout.", "prompt": text, "completion": "LOUD"} for text in ("who?", "Say: a", "1 + 2")]
    options: dict[str, Any] = {"train.max_steps": 60, "train.learning_rate": 0.02, "model.dtype": "fp32"}
    return strop.train(model=student, data=rows, out=student.parent / "loud", **options).folder


def test_teacher_answers_with_the_system_prompt_it_was_trained_with(student: Path, loud: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "prompts.jsonl", PROMPTS)
    options = {**QUICK, "train.teacher": str(loud)}
    out = strop.train(model=student, data=str(rows), out=tmp_path / "run", **options).folder
    answers = [json.loads(line)["answer"] for line in (out / "teacher.jsonl").read_text("utf-8").splitlines()]
    assert answers == strop.load(loud).generate([row["prompt"] for row in PROMPTS])


def test_probabilities_of_a_teacher_are_those_with_its_system_prompt(student: Path, loud: Path, tmp_path: Path) -> None:
    other = [{**row, "system": "Be quiet."} for row in ANSWERED[:1]]
    written = {"with": [{**row, "system": "Shout."} for row in ANSWERED] + other, "without": ANSWERED + other}
    found = []
    for name, rows in written.items():
        file = write(tmp_path / f"{name}.jsonl", rows)
        out = strop.train(model=student, data=str(file), out=tmp_path / name, **QUICK, **{"train.teacher": str(loud)})
        found.append(load_file(out.folder / "teacher.safetensors"))
    np.testing.assert_allclose(found[0]["probs"], found[1]["probs"], rtol=1e-5)
    np.testing.assert_array_equal(found[0]["ids"], found[1]["ids"])


def test_each_turn_of_a_split_conversation_has_its_own_probabilities(tmp_path: Path) -> None:
    """The template rewrites earlier turns, so that each answer is an example; all have the same labels."""
    encoder = tool_templates.tokenizer("qwen3-thinking")
    encoder.save_pretrained(student := tmp_path / "tiny")
    tiny.model(vocab_size=len(encoder)).save_pretrained(student)
    shouted = [{"system": "Shout.", "prompt": text, "completion": "LOUD"} for text in ("who?", "Say: a", "1 + 2")]
    options = {**QUICK, "train.max_steps": 20, "train.learning_rate": 0.02}
    loud = strop.train(model=student, data=shouted, out=tmp_path / "loud", **options).folder
    turns = [
        {"role": role, "content": content}
        for question in ("who is it?", "what is 1 + 2?", "and now?")
        for role, content in (("user", question), ("assistant", "yes"))
    ]
    found = []
    for system in ([], [{"role": "system", "content": "Shout."}]):
        file = write(tmp_path / f"{len(system)}.jsonl", [{"messages": [*system, *turns]}] * 2)
        out = strop.train(
            model=student, data=str(file), out=tmp_path / f"run{len(system)}", **QUICK, **{"train.teacher": str(loud)}
        )
        found.append(load_file(out.folder / "teacher.safetensors")["probs"])
    np.testing.assert_allclose(*found, rtol=1e-5)
    first, second, *_ = np.array_split(found[0], 6)  # of each example
    assert not np.allclose(first, second, rtol=1e-3)


def test_rows_that_the_teacher_reads_without_its_system_prompt_are_counted(
    student: Path, loud: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": role, "content": f"{role[0]}{n}"} for n in range(6) for role in ("user", "assistant")]
    file = write(tmp_path / "rows.jsonl", [{"messages": turns}, *({"messages": turns[n : n + 2]} for n in (0, 2, 4))])
    options = {**QUICK, "train.teacher": str(loud), "data.max_length": 60, "data.overlong": "split"}
    strop.train(model=student, data=str(file), out=tmp_path / "run", **options)
    assert re.search(r"probabilities for [23] rows are without its system prompt", caplog.text)


def test_teacher_of_sampled_completions_reads_its_system_prompt(
    student: Path, loud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[teacher.PolicyTeacher] = []
    make = teacher.Teacher.for_policy
    monkeypatch.setattr(teacher.Teacher, "for_policy", lambda self, data: seen.append(make(self, data)) or seen[-1])
    rewritten: list[Example] = []
    rewrite = PolicyTeacher.rewrite
    monkeypatch.setattr(
        PolicyTeacher, "rewrite", lambda self, x: rewritten.extend([x, rewrite(self, x)]) or rewritten[-1]
    )
    rows = write(tmp_path / "prompts.jsonl", [*PROMPTS, {"system": "Be quiet.", "prompt": "say it"}])
    options = {**POLICY, "train.max_steps": 4, "train.teacher": str(loud)}
    strop.train(model=student, data=str(rows), out=tmp_path / "run", eval="25%", **options)
    shout = "<|im_start|>system\nShout.<|im_end|>\n"
    systems = set()
    for own, other in zip(rewritten[::2], rewritten[1::2], strict=True):
        begins = own.prompt_length, other.prompt_length
        assert own.ids[begins[0] :].tolist() == other.ids[begins[1] :].tolist()
        assert own.weights[begins[0] :].tolist() == other.weights[begins[1] :].tolist()
        prompts = [tokenizer("chatml").decode(x.ids[:begin]) for x, begin in zip((own, other), begins, strict=True)]
        assert prompts[1] == (prompts[0] if "system" in prompts[0] else shout + prompts[0])
        systems.add("system" in prompts[0])
    assert systems == {False, True} and len(seen) == 1


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b"])
def test_answers_are_stored_with_any_separator_of_lines(tmp_path: Path, separator: str) -> None:
    answers = {1: Answer(f"a{separator}b", []), 2: NoAnswer(f"c{separator}d")}
    assert read_answers(write_text(tmp_path / "answers.jsonl", write_answers(answers))) == answers


def test_changed_template_of_the_teacher_makes_new_answers(
    student: Path, expert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tmp_path / "merged"
    strop.merge(expert, merged, dtype="fp32", measure=False)
    rows = write(tmp_path / "prompts.jsonl", PROMPTS)
    asked: list[int] = []
    answer = teacher.Teacher.answer
    monkeypatch.setattr(teacher.Teacher, "answer", lambda self, rows: asked.append(1) or answer(self, rows))
    options = {**QUICK, "train.teacher": str(merged)}
    for name, template in (("a", ""), ("b", ""), ("c", "{# changed #}")):
        file = merged / "chat_template.jinja"
        file.write_text(template + file.read_text("utf-8"), encoding="utf-8")
        strop.train(model=student, data=str(rows), out=tmp_path / name, **options)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"message": {"content": "yes"}, "finish_reason": "stop"}, "yes"),
        ({"message": {"content": "let me see</think>\n\nyes"}, "finish_reason": "stop"}, "yes"),
        ({"message": {"content": "<think>let me see"}, "finish_reason": "stop"}, "reasoning does not end"),
        ({"message": {"content": "I was going to sa"}, "finish_reason": "content_filter"}, "cut, filtered"),
        ({"message": {"content": "Look.", "tool_calls": [{}]}, "finish_reason": "tool_calls"}, "a call of a tool"),
        ({"message": {"content": None}, "finish_reason": "stop"}, "no whole text"),
        ({"message": {"content": " "}, "finish_reason": "stop"}, "answer is empty"),
        (400, "400"),
    ],
)
def test_only_whole_answers_of_a_server_count(
    student: Path, tmp_path: Path, reply: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [str(write(tmp_path / "rows.jsonl", [{"messages": turns}])), str(write(tmp_path / "more.jsonl", ANSWERED))]
    response = reply if isinstance(reply, int) else {"choices": [reply]}
    with judge_server(response) as (url, seen):
        options = {**QUICK, "train.teacher": url, "data.bad_rows": "drop"}
        done = strop.train(model=student, data=rows, out=tmp_path / "run", **options)
    (line,) = (tmp_path / "run" / "teacher.jsonl").read_text("utf-8").splitlines()
    answer = json.loads(line)
    assert answer.get("answer") == expected if expected == "yes" else expected in answer["why"]
    assert done.report["data"]["used"] == 12 + (expected == "yes")
    assert seen[0]["messages"] == turns and seen[0]["model"] == "one"


def test_refused_resume_leaves_the_run_unchanged(
    student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = {**QUICK, "train.teacher": str(expert)}
    strop.train(model=student, data=[*map(str, files)], out=out, **options)
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    before = files[0].read_bytes()
    write(files[0], [{"prompt": f"tell {n}"} for n in range(12)])
    with pytest.raises(InputError, match="data has changed"):
        strop.resume(out)
    files[0].write_bytes(before)
    strop.resume(out)


def test_folder_of_a_run_that_was_killed_before_it_began_is_used_again(
    student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    """Its answers may be those of another teacher."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "teacher.jsonl").write_text('{"row": "00", "answer": "of another"}\n', encoding="utf-8")
    (out / "kept.jsonl").write_text("{}\n", encoding="utf-8")
    strop.train(model=student, data=[*map(str, files)], out=out, **{**QUICK, "train.teacher": str(expert)})
    assert "another" not in (out / "teacher.jsonl").read_text("utf-8") and not (out / "kept.jsonl").exists()


POLICY: dict[str, Any] = {
    **QUICK, "train.objective": "grpo", "train.group": 4, "train.answer_tokens": 6, "train.beta": 0,
}  # fmt: skip


def test_policy_gradient_moves_towards_the_teacher(tmp_path: Path) -> None:
    """The gradient is that of the mean over sampled tokens of -(log teacher - log student) * log-probability."""
    job = make_job(tmp_path / "run", prompts(4), **{"train.beta": 0, "train.teacher": "model"})
    assert isinstance(job.criterion, PolicyCriterion)
    other = make_job(tmp_path / "other", prompts(4))
    with torch.no_grad():
        for weight in other.state.weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    job = replace(job, criterion=replace(job.criterion, rewards=[], teacher=PolicyTeacher(other.step, {})))
    groups = job.criterion.prepare(job.step, job.train, 0, partial(micro_batches, job))
    examples = [example for group in groups for example in group.examples]
    copies = torch.tensor([float(example.weights[-1]) for example in examples for _ in range(example.supervised)])
    with torch.no_grad():
        gap = other.step.token_log_probs(examples) - job.step.token_log_probs(examples)
    loss = -(copies * gap * job.step.token_log_probs(examples)).sum() / copies.sum()
    expected = torch.autograd.grad(loss, list(job.state.weights.values()))
    result = loop.compute_gradients(job, groups)
    ((_, metrics),) = result.metrics
    divergence = float(metrics["teacher_kl"].mean())
    assert divergence == pytest.approx(-float((copies * gap).sum() / copies.sum()), rel=1e-4)
    assert "reward" not in metrics and abs(divergence) > 1e-3
    for weight, grad in zip(job.state.weights.values(), expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, grad, rtol=1e-3, atol=1e-6)


def test_policy_learns_from_a_teacher_without_rewards(
    student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    options = {**POLICY, "train.max_steps": 30, "train.learning_rate": 0.01, "train.teacher": str(expert)}
    out = tmp_path / "run"
    strop.train(model=student, data=str(files[0]), eval="25%", out=out, **options)
    steps = [event for event in read_events(out / "events.jsonl") if event["event"] == "step"]
    gaps = [step["teacher_kl"] for step in steps]
    assert sum(gaps[-5:]) < 0.5 * sum(gaps[:5]) and "reward" not in steps[0]
    assert any("judges each sampled token, with the weight 1" in note for note in notes(out))
    assert not any("same reward" in note for note in notes(out))


def test_teacher_next_to_rewards_resumes_exactly(
    student: Path, expert: Path, files: list[Path], tmp_path: Path
) -> None:
    reward = write_reward(tmp_path / "own.py")
    options = {**POLICY, "train.teacher": str(expert), "train.rewards": reward, "train.save_steps": 2}
    whole = strop.train(model=student, data=str(files[0]), out=tmp_path / "whole", **options)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(BaseException):  # noqa: B017
        strop.train(model=student, data=str(files[0]), out=tmp_path / "cut", callback=stop, **options)
    strop.resume(tmp_path / "cut")
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]
    steps = [event for event in read_events(whole.folder / "events.jsonl") if event["event"] == "step"]
    assert all({"reward", "teacher_kl"} <= step.keys() for step in steps)


def test_commands_of_the_page_work(
    student: Path, expert: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], served: str
) -> None:
    page = (ROOT / "docs" / "teacher.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (strop train .*)", page, re.MULTILINE)
    assert len(commands) == 4
    names = {"demo": student, "labelled.jsonl": files[1], "prompts.jsonl": files[0], "runs/large": expert}
    names["http://127.0.0.1:8000/v1"] = served
    for number, command in enumerate(commands):
        for index, word in enumerate(words := shlex.split(command)[1:]):
            words[index] = str(names.get(word, word))
        more = ["--out", str(tmp_path / f"run-{number}"), "--train.max_steps", "2", "--model.dtype", "fp32"]
        more += ["--train.teacher_model", "expert"] if served in words else []
        code, _, err = run(*words, *more, capsys=capsys)
        assert code == 0, err


def test_server_that_has_answered_no_row_is_refused() -> None:
    """For example if all rows that it answered were dropped."""
    renderer: Any = SimpleNamespace(tokenizer=tokenizer("chatml"), end_ids=())
    with pytest.raises(RecipeError, match="answered none of the rows"):
        read_distributions([], {}, renderer)  # type: ignore[arg-type]
