"""Draws answers in vLLM's own Python, which has no strop: a line of JSON asks, a line of JSON answers.

Asked first: the arguments of vllm.LLM. Then {adapter, number, prompts, seeds, most, stop}, and for each the answer to
each seed: [{ids, log_probs, stopped}]. Ends with its input. What vLLM prints goes to the error output.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM and what it starts print there

    def say(found: object) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    import vllm  # type: ignore[import-not-found, unused-ignore]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found, unused-ignore]

    model = vllm.LLM(**json.loads(sys.stdin.readline()))
    say({"version": vllm.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        usual = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        usual |= {"max_tokens": asked["most"], "stop_token_ids": asked["stop"]}
        prompts, options = [], []
        for ids, seeds in zip(asked["prompts"], asked["seeds"], strict=True):
            prompts += [{"prompt_token_ids": ids} for _ in seeds]
            options += [vllm.SamplingParams(**usual, seed=seed) for seed in seeds]
        adapter = LoRARequest(str(asked["number"]), asked["number"], asked["adapter"])
        found = [one.outputs[0] for one in model.generate(prompts, options, lora_request=adapter, use_tqdm=False)]
        say([answer_of(one) for one in found])


def answer_of(one: Any) -> dict[str, Any]:
    told = [about[token].logprob for token, about in zip(one.token_ids, one.logprobs, strict=True)]
    return {"ids": list(one.token_ids), "log_probs": told, "stopped": one.finish_reason == "stop"}


if __name__ == "__main__":
    main()
