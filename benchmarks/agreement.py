"""Compare the greedy answers of two servers, sending one request at a time to each.

python benchmarks/agreement.py http://127.0.0.1:8000#mine http://127.0.0.1:8001#mine --data test.jsonl
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import requests

from serve import question
from strop.evaluation.run import read_conversations


def answers(server: str, chats: list[list[dict[str, str]]], max_tokens: int) -> list[str]:
    url, _, model = server.partition("#")

    def ask(messages: list[dict[str, str]]) -> str:
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, chats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs=2, metavar="URL#MODEL")
    parser.add_argument("--data", required=True)
    parser.add_argument("--max-tokens", type=int, default=80)
    args = parser.parse_args()
    chats = [question(row.messages) for row in read_conversations(args.data)]
    here, there = (answers(server, chats, args.max_tokens) for server in args.servers)
    apart = [(one, other) for one, other in zip(here, there, strict=True) if one != other]
    print(json.dumps({"rows": len(chats), "equal": len(chats) - len(apart), "apart": apart[:5]}))


if __name__ == "__main__":
    main()
