"""Sample completions with vLLM, in a Python environment without strop. Requests and replies are lines of JSON.

The first request has the arguments of vllm.LLM, each later one {adapter, number, prompts, seeds, most, stop}. The reply
has {ids, log_probs, stopped} for each seed. vLLM's output goes to stderr.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM and its subprocesses print to stdout

    def send(reply: object) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    import vllm  # type: ignore[import-not-found, unused-ignore]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]

    model = vllm.LLM(**json.loads(sys.stdin.readline()))
    send({"version": vllm.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        shared = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        shared |= {"max_tokens": request["max_tokens"], "stop_token_ids": request["stop"]}
        prompts, params = [], []
        for ids, seeds in zip(request["prompts"], request["seeds"], strict=True):
            prompts += [{"prompt_token_ids": ids} for _ in seeds]
            params += [vllm.SamplingParams(**shared, seed=seed) for seed in seeds]
        adapter = LoRARequest(str(request["number"]), request["number"], request["adapter"])
        results = model.generate(prompts, params, lora_request=adapter, use_tqdm=False)
        send([as_reply(result.outputs[0]) for result in results])


def as_reply(output: Any) -> dict[str, Any]:
    logprobs = [by_token[token].logprob for token, by_token in zip(output.token_ids, output.logprobs, strict=True)]
    return {"ids": list(output.token_ids), "log_probs": logprobs, "stopped": output.finish_reason == "stop"}


if __name__ == "__main__":
    main()
