"""GRPO in an environment: the loss of a fixed trace, masks, limits, what is decoded, and exact resume."""

from __future__ import annotations

import asyncio
import copy
import json
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from strop.data.rendering.tool_calls import Call, ToolDialogue, Turn
from strop.data.types import RolloutGroup
from strop.engine.decode.decoder import CompiledDecoder
from strop.evaluation.traces import Tracer
from strop.objectives.policy import STD_EPS
from strop.runs.events import read_events
from strop.training import loop, state
from strop.training.gradients import micro_batches
from strop.training.loop import fit
from strop.training.state import Job, batch_stream
from tests import ROOT
from tests.support.families import tokenizer
from tests.support.pages import blocks
from tests.support.runs import QUICK, run
from tests.support.scripted import CALL, ENVIRONMENT, make_desk_job
from tests.support.tiny import move_from_reference

ADD = CALL("add", '{"a": 20, "b": 3}')


def first_calls(text: str, seed: int) -> str:
    """One trace of two calls a tool; the other answers at once."""
    if text.rstrip().endswith("assistant") and "</tool_response>" in text:
        return "It is 23."
    return ADD if seed % 2 else "I know: it is 23, I am sure."


def sample_groups(job: Job, index: int = 0) -> list[RolloutGroup]:
    rows = [job.train[row] for row in batch_stream(job.recipe, len(job.train)).rows(index)]
    return job.criterion.prepare(job.step, rows, index, partial(micro_batches, job))  # type: ignore[return-value]


def sample_traces(tracer: Tracer, job: Job, *, greedy: bool = False) -> list[Any]:
    criterion: Any = job.criterion
    rows = list(job.train)
    group = criterion.options.group
    seeds = [list(range(group * row, group * (row + 1))) for row in range(len(rows))]
    sampled = tracer.sample(rows, seeds, [0] * len(rows), criterion._turn_sampler(tracer, greedy=greedy))
    return [trace for group in sampled for trace in group]


def texts(example: Any) -> list[tuple[bool, str]]:
    """Return the parts of an example as text, each with whether it is supervised."""
    parts: list[tuple[bool, list[int]]] = []
    for token, weight in zip(example.ids.tolist(), example.weights.tolist(), strict=True):
        if not parts or parts[-1][0] != bool(weight):
            parts.append((bool(weight), []))
        parts[-1][1].append(token)
    return [(supervised, tokenizer("chatml").decode(ids)) for supervised, ids in parts]


def test_only_sampled_tokens_are_in_the_loss(tmp_path: Path) -> None:
    job, criterion = make_desk_job(tmp_path, 1, first_calls)
    traces = sample_traces(criterion.tracer, job)  # type: ignore[arg-type]
    calling = next(trace for trace in traces if trace.tool_calls)
    prompt, call, result, answer = texts(calling.as_example())
    assert not prompt[0] and prompt[1].endswith("<|im_start|>assistant\n") and '"name": "add"' in prompt[1]
    assert call == (True, f"{ADD}<|im_end|>")
    assert result == (
        False,
        "\n<|im_start|>user\n<tool_response>\n23\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    )
    assert answer == (True, "It is 23.<|im_end|>")
    assert len(calling.log_probs) == calling.as_example().supervised
    assert calling.counts == {"turns": 2, "tool_calls": 1, "tool_errors": 0, "truncated": 0}
    assert [message["role"] for message in calling.as_json()] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("group_loss", ["dapo", "grpo", "dr_grpo"])
def test_loss_and_gradient_of_fixed_traces_by_definition(tmp_path: Path, group_loss: str) -> None:
    """Against equations 3 and 4 of arXiv:2402.03300 in fp64, with a mask of the sampled tokens."""
    job, criterion = make_desk_job(tmp_path, 2, first_calls, **{"train.group_loss": group_loss, "train.group": 4})
    options = criterion.options
    items = sample_groups(job)
    assert len({len(group.examples) for group in items}) == 1 and any(
        group.counts_of_traces["turns"] for group in items
    )
    start = {name: weight.detach().clone() for name, weight in job.state.weights.items()}
    job = move_from_reference(job)
    result = loop.compute_gradients(job, items)
    gradients = {name: weight.grad.clone() for name, weight in job.state.weights.items() if weight.grad is not None}

    model = copy.deepcopy(job.model).double().eval()
    weights = dict(model.named_parameters())
    reference = copy.deepcopy(model)
    for name, weight in dict(reference.named_parameters()).items():
        if name in start:
            weight.data.copy_(start[name])

    def logprobs(of: Any, ids: np.ndarray) -> torch.Tensor:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        return of(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]

    total, lengths = torch.zeros((), dtype=torch.float64), []
    for group in items:
        spread = stdev(group.rewards) + STD_EPS if group_loss != "dr_grpo" else 1.0
        sampled_at = np.split(group.sampling_logprobs, np.cumsum([x.supervised for x in group.examples])[:-1])
        for example, reward, old in zip(group.examples, group.rewards, sampled_at, strict=True):
            mask = torch.from_numpy(example.weights[1:] > 0)
            now = logprobs(model, example.ids)[mask]
            with torch.no_grad():
                ref = logprobs(reference, example.ids)[mask]
            equal = max(group.rewards) - min(group.rewards) < 1e-9
            advantage = 0.0 if equal else (reward - fmean(group.rewards)) / spread
            ratio = (now - torch.from_numpy(old)).exp()
            clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)  # type: ignore[operator]
            kl = (ref - now).exp() - (ref - now) - 1
            losses = options.beta * ratio * kl - torch.minimum(ratio * advantage, clipped * advantage)
            total = total + (losses.sum() / len(losses) if group_loss == "grpo" else losses.sum())
            lengths.append(len(losses))
    divisor = {"dapo": sum(lengths), "grpo": len(lengths), "dr_grpo": len(lengths) * 80 * 3}[group_loss]
    expected = total / divisor
    expected.backward()  # type: ignore[no-untyped-call]
    assert len(set(lengths)) > 1 and abs(float(expected.detach())) > 1e-6
    assert float(result.loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, grad in gradients.items():
        right = weights[name].grad
        assert right is not None and (grad.double() - right).norm() <= 1e-3 * right.norm() + 1e-9, name


def test_turns_end_at_the_limit_done_or_text(tmp_path: Path) -> None:
    always = make_desk_job(tmp_path / "a", 1, lambda text, seed: ADD)
    trace = sample_traces(always[1].tracer, always[0])[0]  # type: ignore[arg-type]
    assert trace.counts == {"turns": 3, "tool_calls": 3, "tool_errors": 0, "truncated": 0}
    assert texts(trace.as_example())[-1] == (True, f"{ADD}<|im_end|>")  # its result is no part of the sequence
    assert trace.as_json()[-1] == {"role": "tool", "content": "23", "name": "add"}
    finish = make_desk_job(tmp_path / "b", 1, lambda text, seed: CALL("finish", "{}"))
    trace = sample_traces(finish[1].tracer, finish[0])[0]  # type: ignore[arg-type]
    assert trace.turns == 1 and trace.tool_calls == 1 and trace.environment.done


def test_errors_of_tools_are_part_of_the_trace(tmp_path: Path) -> None:
    calls = [CALL("fail", "{}"), CALL("sub", "{}"), "<tool_call>\nadd(1, 2)\n</tool_call>"]

    def write(text: str, seed: int) -> str:
        return calls[text.count("</tool_response>")]

    job, criterion = make_desk_job(tmp_path, 1, write, **{"train.turns": 4})
    calls.append("I give up.")
    trace = sample_traces(criterion.tracer, job)[0]  # type: ignore[arg-type]
    results = [message["content"] for message in trace.as_json() if message["role"] == "tool"]
    assert results[0] == "error: ValueError: no"
    assert results[1].startswith("error: there is no tool sub")
    assert results[2].startswith("error: the call is not valid JSON")
    assert trace.counts == {"turns": 4, "tool_calls": 3, "tool_errors": 3, "truncated": 0}
    assert "error: ValueError: no" in texts(trace.as_example())[2][1]


def test_several_calls_of_a_turn_are_answered_in_order(tmp_path: Path) -> None:
    two = f"{ADD}\n{CALL('add', chr(123) + chr(34) + 'a' + chr(34) + ': 1, ' + chr(34) + 'b' + chr(34) + ': 1}')}"
    job, criterion = make_desk_job(
        tmp_path, 1, lambda text, seed: "done" if "response" in text else two, **{"train.answer_tokens": 150}
    )
    trace = sample_traces(criterion.tracer, job)[0]  # type: ignore[arg-type]
    assert trace.tool_calls == 2 and [m["content"] for m in trace.as_json() if m["role"] == "tool"] == ["23", "2"]
    assert "\n23\n</tool_response>\n<tool_response>\n2\n</tool_response>" in texts(trace.as_example())[2][1]


def test_trace_at_a_limit_is_truncated(tmp_path: Path) -> None:
    job, criterion = make_desk_job(tmp_path / "turn", 1, lambda text, seed: ADD, **{"train.answer_tokens": 10})
    trace = sample_traces(criterion.tracer, job)[0]  # type: ignore[arg-type]
    assert trace.truncated and trace.turns == 1 and not trace.tool_calls and trace.as_example().supervised == 10
    length = len(criterion.tracer.prompt_ids(job.train[0]))  # type: ignore[union-attr, arg-type]
    turn = len(tokenizer("chatml").encode(ADD)) + 1
    tight = {"data.max_length": length + turn + 20}
    job, criterion = make_desk_job(tmp_path / "trace", 1, lambda text, seed: ADD, **tight)
    trace = sample_traces(criterion.tracer, job)[0]  # type: ignore[arg-type]
    assert trace.truncated and trace.tool_calls == 1  # its result would not leave room for a turn
    assert trace.length == length + turn


def reads_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read turns of the random model, which never writes a call, as calls of a tool, depending on their tokens."""

    def read(self: ToolDialogue, ids: Any) -> Turn:
        text = f"turn {int(ids.sum())}"
        return Turn(text, text, (Call("add", {"a": int(ids[0]), "b": len(ids)}),) if int(ids[0]) % 4 else ())

    monkeypatch.setattr(ToolDialogue, "read_turn", read)


def many_stops(job: Job, criterion: Any) -> Job:
    """Let a quarter of the vocabulary end a turn, so that the random model's turns are short."""
    from dataclasses import replace

    return replace(job, criterion=replace(criterion, stop_ids=tuple(range(2, 160))))


def test_tokens_are_processed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder keeps the keys and values of a trace between its turns: no prompt or turn is processed again."""
    reads_calls(monkeypatch)
    job = many_stops(*make_desk_job(tmp_path, 1, **{"train.turns": 4, "train.group": 5}))
    processed, forward = 0, CompiledDecoder.forward

    def counting(self: Any, chunks: Any, **options: Any) -> Any:
        nonlocal processed
        processed += sum(chunk.count for chunk in chunks)
        return forward(self, chunks, **options)

    monkeypatch.setattr(CompiledDecoder, "forward", counting)
    monkeypatch.setattr("strop.engine.decode.batch.propose_draft", lambda ids, limit: ())
    criterion: Any = job.criterion
    traces = sample_traces(criterion.tracer, job)
    assert sum(trace.turns for trace in traces) > 2 * len(traces)
    prompts = {trace.prompt_ids.tobytes(): len(trace.prompt_ids) for trace in traces}
    after = sum(len(trace.as_example()) - len(trace.prompt_ids) - 1 for trace in traces)  # not the last sampled one
    assert processed == sum(prompts.values()) + after


def test_continued_traces_equal_those_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads_calls(monkeypatch)
    job = many_stops(*make_desk_job(tmp_path, 3))
    criterion: Any = job.criterion
    cached = [trace.as_example().ids.tolist() for trace in sample_traces(criterion.tracer, job, greedy=True)]
    monkeypatch.setattr("strop.engine.decode.generate.why_decoder_unsupported", lambda model: "the test")
    again = [trace.as_example().ids.tolist() for trace in sample_traces(criterion.tracer, job, greedy=True)]
    assert cached == again


def test_sampling_logprobs_are_those_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads_calls(monkeypatch)
    job = many_stops(*make_desk_job(tmp_path, 4))
    groups = sample_groups(job)
    assert max(value for group in groups for value in group.counts_of_traces["turns"]) > 1
    for group in groups:
        now = job.step.token_log_probs(list(group.examples)).detach().double().numpy()
        assert abs(now - group.sampling_logprobs).max() < 1e-4


def test_traces_do_not_depend_on_how_many_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads_calls(monkeypatch)
    job = many_stops(*make_desk_job(tmp_path, 4))
    criterion: Any = job.criterion
    whole = [trace.as_example().ids.tolist() for trace in sample_traces(criterion.tracer, job)]
    monkeypatch.setattr("strop.engine.decode.batch.MAX_SEQUENCES", 3)
    assert [trace.as_example().ids.tolist() for trace in sample_traces(criterion.tracer, job)] == whole


def test_traces_do_not_depend_on_which_tool_answers_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces whose tools are slow join the batch later, which changes no bit."""
    reads_calls(monkeypatch)
    job = many_stops(*make_desk_job(tmp_path, 3))
    criterion: Any = job.criterion
    tracer = criterion.tracer
    fast = sample_traces(tracer, job)
    call_turn, batches = type(tracer.environment)._call_turn, []

    async def delayed(self: Any, used: Any, calls: Any, **options: Any) -> Any:
        batches.append(len(batches))
        await asyncio.sleep(0.03 * (len(batches) % 3))
        return await call_turn(self, used, calls, **options)

    monkeypatch.setattr(type(tracer.environment), "_call_turn", delayed)
    slow = sample_traces(tracer, job)
    assert len(batches) > 3
    for one, other in zip(fast, slow, strict=True):
        assert np.array_equal(one.as_example().ids, other.as_example().ids)
        assert np.array_equal(one.log_probs, other.log_probs)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_run_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    from strop.errors import Stopped
    from tests.training.test_preferences import _after

    reads_calls(monkeypatch)
    options = {"train.max_steps": 4, "train.batch_size": 2, "train.micro_batch": 1}

    def make(name: str) -> Job:
        return many_stops(*make_desk_job(tmp_path / name, 4, **options))

    unbroken = make("unbroken")
    fit(unbroken)
    first = make("broken")
    numbers = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop, "stop_signals", _after(stop_after, numbers))
        fit(first)
    torch.manual_seed(12345)
    second = make("broken")
    state.restore_checkpoint(state.newest_checkpoint(second.folder, pytest.fail), second.state)
    fit(second)
    for name, weight in second.state.weights.items():
        assert torch.equal(weight, unbroken.state.weights[name]), name
    names = ("loss", "turns", "tool_calls", "reward")
    steps = [
        [[event[name] for name in names] for event in read_events(job.folder.events) if event["event"] == "step"]
        for job in (second, unbroken)
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 4


def test_steps_and_evaluations_report_turns_and_calls(tmp_path: Path) -> None:
    job, _ = make_desk_job(tmp_path, 4, first_calls, held_out=2, **{"train.max_steps": 2})
    fit(job)
    seen = read_events(job.folder.events)
    step = next(event for event in seen if event["event"] == "step")
    names = {"turns", "tool_calls", "tool_errors", "truncated", "reward", "reward/Desk.calls", "reward/Desk.length"}
    assert (
        names <= set(step)
        and 1 <= step["turns"] <= 2
        and step["reward"] == pytest.approx(step["reward/Desk.calls"] + step["reward/Desk.length"])
    )
    shown = next(event for event in seen if event["event"] == "answers")
    assert shown["messages"][0]["role"] == "user" and shown["answer"]
    evaluated = next(event for event in seen if event["event"] == "eval")
    assert evaluated["loss"] == -evaluated["reward"] and {"turns", "tool_errors"} <= set(evaluated)


def test_longest_group_bounds_every_group(tmp_path: Path) -> None:
    job, criterion = make_desk_job(tmp_path, 2, first_calls)
    for item, group in zip(job.train, sample_groups(job), strict=False):
        longest: Any = criterion.longest(item)
        assert max(map(len, longest.examples)) == 900 >= max(map(len, group.examples))
        assert longest.supervised == 2 * 80 * 3 >= group.supervised
        assert len(longest.sampling_logprobs) == longest.supervised


# --- the command line --------------------------------------------------------------------------------------------


def test_the_guide_works_from_its_first_command_to_its_last(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of docs/environments.md run in order, with a tiny model."""
    monkeypatch.chdir(tmp_path)
    page = list(blocks(ROOT / "docs" / "environments.md"))
    [code] = [block.text for block in page if block.language == "python"]
    [rows] = [block.text for block in page if block.language == "jsonl"]
    Path("shop.py").write_text(code, encoding="utf-8")
    Path("rows.jsonl").write_text(rows * 4, encoding="utf-8")
    Path("held-out.jsonl").write_text(rows.replace("a tea", "one tea").replace("a cup", "one cup"), encoding="utf-8")
    outputs = []
    for block in page:
        for words in block.commands:
            words = [str(tiny_folder) if word == "demo" else word for word in words[1:]]
            words += [*QUICK[:4], "--train.group", "2"] if words[0] == "train" else []
            code_, out, err = run(*words, capsys=capsys)
            assert not code_, err
            outputs.append(out + err)
    checked, trained, evaluated = (" ".join(text.split()) for text in outputs)
    assert "environment shop.py:Shop: tools price; at most 4 turns" in checked and "sampled from" in checked
    assert "the form of Hermes: the chat template shows no tools" in checked and "⟧" in checked
    assert "turns" in trained and "mean reward" not in evaluated and "reward" in evaluated
    report = json.loads(Path("runs/shop/report.json").read_text(encoding="utf-8"))
    assert report["evaluation"]["metric"] == "mean_reward" and report["evaluation"]["rows"] == 2
    assert {"low", "high"} <= set(report["evaluation"]["difference"])
    assert "A sampled trace" in Path("runs/shop/report.html").read_text(encoding="utf-8")


def write_files(folder: Path) -> tuple[Path, Path]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"what is {n}?", "n": n}) + "\n" for n in range(6)), encoding="utf-8")
    (folder / "desk.py").write_text(ENVIRONMENT, encoding="utf-8")
    return rows, folder / "desk.py"


def train_words(model: Path, rows: Path, spec: str, out: Path) -> list[Any]:
    return [
        "train", "--model", model, "--data", rows, "--data.format", "prompt", "--train.objective", "grpo",
        "--train.environment", spec, "--train.group", "2", "--train.answer_tokens", "8", "--out", out, *QUICK,
        "--train.max_steps", "2",
    ]  # fmt: skip


@pytest.mark.parametrize(("spec", "options", "message"), [
    ("desk.py:Des", [], "no such function in the file"),
    ("desk.py", [], "not a file and a class"),
    ("desk.py:Desk", ["--train.teacher", "demo"], "cannot be combined with --train.environment"),
    ("desk.py:Desk", ["--data.max_length", "64"], "rows.jsonl:1"),
    ("desk.py:Desk", ["--train.objective", "dpo"], "objective dpo does not read"),
    ("desk.py:NoReward", [], "it has no reward, and there are no --train.rewards"),
    ("desk.py:Broken", [], "reset: row"),
])  # fmt: skip
def test_invalid_environments_are_refused_before_loading(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, options: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    rows, file = write_files(tmp_path)
    tool = "    def look(self) -> str:\n        '''Look.'''\n        return 'x'\n"
    more = f"class NoReward:\n    def reset(self): ...\n{tool}\nclass Broken:\n    def reset(self, colour): ...\n{tool}"
    file.write_text(ENVIRONMENT + more, encoding="utf-8")
    code, _, err = run(*train_words(tiny_folder, rows, spec, tmp_path / "run"), *options, capsys=capsys)
    assert code == 2 and message in " ".join(err.split()), err
    assert not (tmp_path / "run" / "lock.json").exists()


def test_turns_without_an_environment_are_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = write_files(tmp_path)
    words = ["train", "--model", tiny_folder, "--data", rows, "--train.objective", "grpo", "--train.turns", "3"]
    code, _, err = run(*words, "--train.rewards", "exact", capsys=capsys)
    assert code == 2 and "--train.turns: needs --train.environment" in err
    (tmp_path / "own.py").write_text("def own(completion, row, environment):\n    return 1\n", encoding="utf-8")
    words = [*words[:-2], "--data.format", "prompt", "--train.rewards", f"{tmp_path / 'own.py'}:own"]
    code, _, err = run(*words, capsys=capsys)
    assert code == 2 and "there is no environment" in err


def test_rows_with_tools_are_refused(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, file = write_files(tmp_path)
    tool = {"type": "function", "function": {"name": "f", "description": "x", "parameters": {"type": "object"}}}
    row = {"prompt": "hi", "tools": [tool]}
    rows.write_text(json.dumps(row) + "\n", encoding="utf-8")
    words = train_words(tiny_folder, rows, f"{file}:Desk", tmp_path / "run")
    code, _, err = run(*words, "--data.template", "chatml", capsys=capsys)
    assert code == 2 and "rows.jsonl:1" in err and "the environment has its own" in " ".join(err.split())


def test_changed_environment_is_noticed(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, file = write_files(tmp_path)
    out = tmp_path / "run"
    assert run(*train_words(tiny_folder, rows, f"{file}:Desk", out), capsys=capsys)[0] == 0
    file.write_text(ENVIRONMENT + "\n# changed\n", encoding="utf-8")
    code, _, err = run("eval", out, "--data", rows, capsys=capsys)
    assert code == 2 and "the file has changed since the run was trained" in " ".join(err.split())
    code, stdout, err = run("eval", out, "--data", rows, "--force", "--json", capsys=capsys)
    assert code == 0, err
    result = json.loads(stdout)
    assert result["metric"] == "mean_reward" and result["train_rows"] == 6
    assert {"mean_reward", "turns", "tool_calls", "reward/Desk.calls"} <= set(result["base"])
    code, _, err = run("eval", out, "--data", rows, "--force", "--regression-data", rows, capsys=capsys)
    assert code == 2 and "only traces in it are evaluated" in err
    for name in ("report.json", "report.html"):
        (out / name).unlink()
    code, _, err = run("resume", out, capsys=capsys)
    assert code == 2 and "--allow-changed environment" in err


def test_functions_are_tools_and_rewards_are_added(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = write_files(tmp_path)
    file = tmp_path / "tools.py"
    tool = "def look() -> str:\n    '''Look.'''\n    return 'x'\n"
    own = "def own(completion, row, messages, environment):\n    return row['n'] + len(messages)\n"
    file.write_text(tool + own, encoding="utf-8")
    words = train_words(tiny_folder, rows, f"{file}:look", tmp_path / "run")
    code, _, err = run(*words, "--train.rewards", f"{file}:own", capsys=capsys)
    assert code == 0, err
    steps = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    assert len(steps) == 2 and all(step["reward"] >= 2 for step in steps)


COUNTER = '''
class Counter:
    def reset(self, row):
        self.reward = 0.25

    def look(self) -> str:
        """Look."""
        return "x"
'''
HOOD = "def long(right_answer, answer):\n    return len(answer) >= 0 and right_answer == '1'\n"
FAILS = "def fails(right_answer, answer):\n    return right_answer == answer or 1 / 0\n"


def test_eval_scores_the_last_turn_of_traces_by_a_metric_of_answers(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = write_files(tmp_path)
    (tmp_path / "counter.py").write_text(COUNTER, encoding="utf-8")
    (tmp_path / "hood.py").write_text(HOOD, encoding="utf-8")
    out = tmp_path / "run"
    code, _, err = run(*train_words(tiny_folder, rows, f"{tmp_path / 'counter.py'}:Counter", out), capsys=capsys)
    assert code == 0, err
    held_out = tmp_path / "held-out.jsonl"
    dialogues = [[("user", f"how much is {n}?"), ("assistant", str(n))] for n in range(3)] + [[("user", "and?")]]
    with held_out.open("w", encoding="utf-8") as file:
        for dialogue in dialogues:
            messages = [{"role": role, "content": content} for role, content in dialogue]
            file.write(json.dumps({"messages": messages}) + "\n")
    words = ["eval", out, "--data", held_out, "--data.format", "auto", "--max-new-tokens", "8", "--json"]
    code, text, err = run(*words, "--metric", f"{tmp_path / 'hood.py'}:long", capsys=capsys)
    assert code == 0, err
    result = json.loads(text)
    assert (result["metric"], result["rows"], [row["line"] for row in result["left_out"]]) == ("long", 3, [4])
    assert result["tuned"]["long"] == result["base"]["long"] == pytest.approx(1 / 3)
    assert result["tuned"]["mean_reward"] == 0.25 and {"turns", "tool_calls"} <= set(result["tuned"])
    assert [row["tuned_hit"] for row in result["samples"]] == [False, True, False]
    code, text, err = run(*words, "--metric", "exact", capsys=capsys)
    assert code == 0 and json.loads(text)["metric"] == "exact", err
    (tmp_path / "hood.py").write_text(FAILS, encoding="utf-8")
    code, text, err = run(*words, "--metric", f"{tmp_path / 'hood.py'}:fails", capsys=capsys)
    result = json.loads(text)
    assert code == 0 and result["metric_errors"]["tuned"]["count"] == 3, err
    assert any("fails failed on 3 of 3 tuned answers" in note for note in result["notes"])
    code, text, err = run(*words, "--general", capsys=capsys)
    result = json.loads(text)
    assert code == 0 and result["metric"] == "mean_reward" and "difference" in result["general"], err
    code, _, err = run("eval", out, "--data", rows, "--metric", "exact", capsys=capsys)
    assert code == 2 and "no row ends with an answer to score" in err and "mean_reward" in err


def test_unsampled_model_is_shown_with_scripted_calls(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, file = write_files(tmp_path)
    monkeypatch.setattr("strop.evaluation.trace_preview.MAX_SHARE", 0.0)
    words = ["check", "--model", tiny_folder, "--data", rows, "--data.format", "prompt", "--train.objective", "grpo"]
    code, out, err = run(*words, "--train.environment", f"{file}:Desk", "--show", "1", capsys=capsys)
    text = (out + err).replace("·", " ")
    assert code == 0 and "with a scripted call of each tool" in " ".join(text.split()), err
    assert "⟦<tool_call>↵" in text and '{"name": "add", "arguments": {"a": 1, "b": 1}}' in text
    assert "<tool_response>↵\n2↵" in text
    assert '"description": "first"}, "b": {"type": "integer", "description": "second"}' in text  # long lines are whole


def test_unsupported_family_is_sampled_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    reads_calls(monkeypatch)
    folder = tmp_path / "model"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1200}
    sizes |= {"vocab_size": len(tokenizer("chatml")), "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    tokenizer("chatml").save_pretrained(folder)
    rows, file = write_files(tmp_path)
    words = train_words(folder, rows, f"{file}:Desk", tmp_path / "run")
    code, _, err = run(*words, capsys=capsys)
    assert code == 0, err
    steps = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "step"]
    assert len(steps) == 2 and all(event["off"] < 1e-4 for event in steps) and "transformers' generate" in err


def test_class_and_functions_are_given_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    from strop.api import flatten_options
    from strop.errors import InputError

    (tmp_path / "desk_of_test.py").write_text(ENVIRONMENT + "\ndef f(): ...\ndef g(): ...\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("desk_of_test")
    file = str(tmp_path / "desk_of_test.py")
    assert flatten_options({"environment": module.Desk}) == {"train.environment": f"{file}:Desk"}
    assert flatten_options({"environment": [module.f, module.g]}) == {"train.environment": f"{file}:f,g"}
    assert flatten_options({"environment": "a.py:B"}) == {"train.environment": "a.py:B"}

    class Local:
        pass

    with pytest.raises(InputError, match="not at the top of one Python file"):
        flatten_options({"environment": Local})
