"""strop's server under load: 1, 4 and 16 clients at once, tokens/s and time to the first token, beside other servers.

    python benchmarks/serve.py MODEL --data rows.jsonl
        [--transformers "transformers serve {model} --host 127.0.0.1 --port {port} --device cpu --dtype float32"]
        [--llama "python -m llama_cpp.server --model m.gguf --host 127.0.0.1 --port {port}"]

Each server is a process of its own, warmed by some requests, and asked the same: the questions of --data, greedy, with
the same longest answer, streamed, each by a fresh request. Tokens are counted by one tokenizer from the answers' text.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import measured
import psutil
import requests

from strop.data.conversation import Message
from strop.evaluation.run import read_conversations
from strop.model.facts import locate
from strop.model.tokenizer import load_tokenizer

GREEDY = {"llama.cpp": {"repeat_penalty": 1.0}}  # llama_cpp.server's own 1.1 changes greedy answers
STROP = "{python} -m strop.cli serve {model} --host 127.0.0.1 --port {port} --dtype {dtype}"


@dataclass
class Answer:
    text: str
    first_s: float
    whole_s: float


def ask(url: str, body: dict[str, Any], messages: list[dict[str, str]]) -> Answer:
    began, first, text = time.perf_counter(), 0.0, ""
    with requests.post(
        f"{url}/v1/chat/completions", json={**body, "messages": messages}, stream=True, timeout=600
    ) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                first = first or time.perf_counter() - began
                text += piece
    whole = time.perf_counter() - began
    return Answer(text, first or whole, whole)


def load(url: str, body: dict[str, Any], asked: list[Any], clients: int, number: int) -> tuple[list[Answer], float]:
    """Answers to `number` requests of `clients` at once, and the seconds for all."""
    answers: list[Answer] = []
    faults: list[BaseException] = []
    turn, lock = count(), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                place = next(turn)
            if place >= number or faults:
                return
            try:
                answers.append(ask(url, body, asked[place % len(asked)]))
            except (requests.RequestException, AssertionError) as fault:
                faults.append(fault)

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise RuntimeError(f"{len(faults)} requests failed, first: {faults[0]}")
    return answers, time.perf_counter() - began


def measure(
    name: str, command: str, args: argparse.Namespace, asked: list[Any], tokenizer: Any
) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command.format(python=sys.executable, model=args.model, port=port, dtype=args.dtype))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        began = time.perf_counter()
        while True:
            try:
                listed = requests.get(f"{url}/v1/models", timeout=5).json()["data"]
                break
            except (requests.RequestException, ValueError, KeyError):
                assert process.poll() is None, f"{name} ended: {command}"
                time.sleep(0.3)
        start_s = time.perf_counter() - began
        model = args.model if name == "transformers serve" else listed[0]["id"]
        body = {"model": model, "max_tokens": args.max_tokens, "temperature": 0, "stream": True, **GREEDY.get(name, {})}
        load(url, body, asked, 4, args.warm)
        results = []
        numbers = args.requests if name == "strop serve" else args.peer_requests or args.requests
        for clients, number in zip(args.clients, numbers, strict=True):
            answers, seconds = load(url, body, asked, clients, number)
            tokens = sum(len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) for answer in answers)
            firsts = sorted(answer.first_s for answer in answers)
            whole = [answer.whole_s for answer in answers]
            results.append({
                "server": name, "clients": clients, "requests": len(answers), "seconds": round(seconds, 2),
                "tokens_per_s": round(tokens / seconds, 1), "requests_per_s": round(len(answers) / seconds, 2),
                "first_token_p50_s": round(statistics.median(firsts), 3),
                "first_token_p95_s": round(firsts[int(0.95 * (len(firsts) - 1))], 3),
                "answer_p50_s": round(statistics.median(whole), 3), "tokens": tokens, "start_s": round(start_s, 1),
                "rss_bytes": psutil.Process(process.pid).memory_info().rss,
            })  # fmt: skip
            print(json.dumps(results[-1]), flush=True)
        return results
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder: strop's server and the others serve the same weights")
    parser.add_argument("--data", required=True, help="rows whose questions are asked")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, nargs="+", default=[50, 100, 350], help="for each number of clients")
    parser.add_argument("--peer-requests", type=int, nargs="+", help="the same for the others, where they are slow")
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--transformers", help="command of `transformers serve`, with {model} and {port}")
    parser.add_argument("--llama", help="command of a llama.cpp server, with {port}")
    parser.add_argument("--skip-strop", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server under test ends too
    tokenizer = load_tokenizer(locate(args.model))
    asked = [question(row.messages) for row in read_conversations(args.data)]
    servers = {} if args.skip_strop else {"strop serve": STROP}
    servers |= {"transformers serve": args.transformers} if args.transformers else {}
    servers |= {"llama.cpp": args.llama} if args.llama else {}
    results = [one for name, command in servers.items() for one in measure(name, command, args, asked, tokenizer)]
    if args.out:
        measured.write(args.out, results, commands=servers)


def question(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    end = len(messages) - 1 if messages[-1].role == "assistant" else len(messages)
    return [{"role": message.role, "content": message.content} for message in messages[:end]]


if __name__ == "__main__":
    main()
