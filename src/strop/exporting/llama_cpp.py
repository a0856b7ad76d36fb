"""Real llama.cpp, through llama-cpp-python where that is installed: what a GGUF file does, rather than what it says."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.data.types import Example
from strop.errors import InputError, ParityError, RunError
from strop.exporting.parity import normalized

INSTALL = "pip install llama-cpp-python"


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def check_loads() -> None:
    """Raises InputError where llama-cpp-python is installed and does not load."""
    try:
        import llama_cpp  # noqa: F401 (to see whether it loads)
    except (ImportError, OSError, RuntimeError) as error:
        what = f"llama-cpp-python is installed and does not load: {str(error).splitlines()[0][:300]}"
        raise InputError(
            what, fix=f"install it anew ({INSTALL} --force-reinstall --no-cache-dir), or remove it"
        ) from None


class LlamaCpp:
    """A GGUF file in llama.cpp. vocab_only: without weights. Raises ParityError where llama.cpp cannot load it."""

    def __init__(
        self, file: Path, *, adapter: Path | None = None, context: int = 512, vocab_only: bool = False
    ) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        threads = max(1, torch.get_num_threads())
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it warns of a context that vocab_only does not have
                self._llama = llama_cpp.Llama(
                    str(file), vocab_only=vocab_only, lora_path=str(adapter) if adapter else None, n_ctx=context,
                    n_batch=context, logits_all=not vocab_only, n_threads=threads, n_threads_batch=threads,
                    verbose=False,
                )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            what = f"{adapter or file}: llama.cpp cannot load it: {error}"
            raise ParityError(what, fix="nothing was kept; please report the base's name") from None
        self._vocab: Any = self._llama._model.vocab
        self.metadata: dict[str, str] = self._llama.metadata

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    def tokenize(self, text: str, *, control: bool) -> list[int]:
        """Token ids; control: are control tokens in the text those tokens, or mere text?"""
        ids: list[int] = self._llama.tokenize(text.encode("utf-8"), add_bos=False, special=control)
        return ids

    def ends(self, token: int) -> bool:
        """Does llama.cpp stop at this token?"""
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    @property
    def special(self) -> dict[str, int | bool]:
        """bos and eos ids as llama.cpp understood them, and whether it puts bos before a text."""
        api, vocab = self._api, self._vocab
        return {
            "bos": int(api.llama_vocab_bos(vocab)), "eos": int(api.llama_vocab_eos(vocab)),
            "add_bos": bool(api.llama_vocab_get_add_bos(vocab)),
        }  # fmt: skip

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that llama-cpp-python makes of a chat, out of the template in the file."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def text(token: int) -> str:
            raw = self._api.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
            return str(raw.decode("utf-8"))

        template = self.metadata.get("tokenizer.chat_template", "")
        bos, eos = text(int(self.special["bos"])), text(int(self.special["eos"]))
        formatter: Any = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
        return str(formatter(messages=list(messages)).prompt)

    def log_probabilities(self, example: Example) -> Tensor:
        """(positions - 1, vocabulary) in fp32: what is predicted for each token but the first."""
        self._llama.reset()
        self._llama.eval(example.ids.tolist())
        logits = torch.from_numpy(np.array(self._llama.scores[: len(example) - 1], dtype=np.float32))
        return normalized(logits)

    def greedy(self, prompt: Sequence[int], limit: int) -> list[int]:
        """The most likely new tokens up to `limit`, the one that ended them included."""
        made: list[int] = []
        for token in self._llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0, reset=True):
            made.append(int(token))
            if self.ends(made[-1]) or len(made) == limit:
                break
        return made


def quantize(source: Path, out: Path, kind: str) -> None:
    """llama.cpp's own quantizer. kind: q4_k_m, q5_k_m or q6_k. Raises RunError where it fails."""
    import llama_cpp

    api: Any = llama_cpp
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    options.nthread = max(1, torch.get_num_threads())
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it would write a line a tensor
    failed = api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options))
    if failed:
        raise RunError(f"{out}: llama.cpp could not quantize to {kind} (code {failed})", fix="choose --type q8_0")
