"""A stand-in for vLLM with the calls that strop uses, on transformers and PEFT."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

_INIT = """
import gc, os
from types import SimpleNamespace

__version__ = "stand-in"
SamplingParams = lambda **options: SimpleNamespace(**options)


class LLM:
    def __init__(self, model, dtype, max_model_len, max_lora_rank, enable_lora, **more):
        global peft, torch  # imported here, because most processes only read which models vLLM knows
        gc.disable()  # saves a third of the time
        import peft, torch
        from transformers import AutoModelForCausalLM
        gc.freeze()
        print("something that vLLM prints")
        assert enable_lora and max_lora_rank in (8, 16)
        self.longest, self.seen = max_model_len, set()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def generate(self, prompts, options, lora_request, use_tqdm):
        assert lora_request.number not in self.seen, "an adapter of this number is known"
        self.seen.add(lora_request.number)
        fails = os.environ["STAND_IN_FAILS"]
        if os.path.exists(fails) and len(self.seen) == int(open(fails).read()):
            raise SystemExit("the GPU failed")
        model = peft.PeftModel.from_pretrained(self.model, lora_request.path).eval()
        with torch.no_grad():
            outputs = [self.complete(model, *request) for request in zip(prompts, options, strict=True)]
        self.model = model.unload()
        return outputs

    def complete(self, model, prompt, params):
        ids, generator = list(prompt["prompt_token_ids"]), torch.Generator().manual_seed(params.seed % 2**62)
        assert (params.temperature, params.top_p, params.top_k, params.ignore_eos) == (1.0, 1.0, 0, True)
        assert len(ids) + params.max_tokens <= self.longest
        tokens, logprobs, reason = [], [], "length"
        while len(tokens) < params.max_tokens:
            logs = model(torch.tensor([ids + tokens])).logits[0, -1].float().log_softmax(-1)
            token = int(torch.multinomial(logs.exp(), 1, generator=generator))
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(logs[token]))})
            if token in params.stop_token_ids:
                reason = "stop"
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason=reason)])
"""
_MODULES = {
    "vllm/__init__.py": _INIT,
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": """
from types import SimpleNamespace
LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
""",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/models/__init__.py": """
from types import SimpleNamespace
_KNOWN = {"LlamaForCausalLM": SimpleNamespace(load_model_cls=lambda: True)}
ModelRegistry = SimpleNamespace(get_supported_archs=lambda: list(_KNOWN), models=_KNOWN)
""",
    "vllm/model_executor/models/interfaces.py": "supports_lora = bool\n",
}


def vllm_python(folder: Path) -> Path:
    """Return a Python with the stand-in. The request whose number is in the file `folder/fails` ends its process."""
    for name, text in _MODULES.items():
        (folder / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "lib" / name).write_text(text, encoding="utf-8")
    program = folder / "python"
    names = f"PYTHONPATH={folder / 'lib'} STAND_IN_FAILS={folder / 'fails'}"
    program.write_text(f'#!/bin/sh\nexec env {names} {sys.executable} "$@"\n', encoding="utf-8")
    os.chmod(program, program.stat().st_mode | stat.S_IXUSR)
    return program
