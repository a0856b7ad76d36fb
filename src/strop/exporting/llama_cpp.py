"""Run GGUF files in llama.cpp, through llama-cpp-python, and compare them with the tuned model."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.data.rendering.render import Renderer
from strop.data.types import Example, Message
from strop.engine.decode.generate import Completion, generate
from strop.errors import InputError, ParityError, RunError
from strop.exporting.gguf_tokenizer import Vocabulary
from strop.exporting.merge import TunedModel
from strop.exporting.parity import Limit, Parity, log_softmax_, measure_against, select_rows

INSTALL = "pip install llama-cpp-python"
NUM_PROMPTS, MAX_NEW_TOKENS = 4, 64  # for the comparison of greedy completions
# Maximum number of SAMPLE_STRINGS that are tokenized differently if llama.cpp's tokenizer is known to be inexact.
MAX_DIFFERENT_STRINGS = 10

# Limits of the comparison with the adapter in fp32. Measured mean KL (and agreement) on SmolLM2-135M with a random
# adapter: f16 6e-6, bf16 2.4e-4, q8_0 8.2e-3 (95.3 %), q4_k_m 0.13 (85.8 %). The limits for q8_0 and q4_k_m allow about
# three times that; those for q6_k and q5_k_m are interpolated.
LIMITS = {
    "f32": Limit(1e-4, 0.995), "f16": Limit(1e-3, 0.99), "bf16": Limit(2e-3, 0.985), "q8_0": Limit(0.03, 0.92),
    "q6_k": Limit(0.06, 0.88), "q5_k_m": Limit(0.12, 0.84), "q4_k_m": Limit(0.4, 0.75),
}  # fmt: skip


def is_installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def check_import() -> None:
    """Raise InputError if llama-cpp-python is installed but cannot be imported."""
    try:
        import llama_cpp  # noqa: F401 (only to see whether it can be imported)
    except (ImportError, OSError, RuntimeError) as error:
        what = f"llama-cpp-python is installed but cannot be imported: {str(error).splitlines()[0][:300]}"
        fix = f"reinstall it ({INSTALL} --force-reinstall --no-cache-dir), or remove it"
        raise InputError(what, fix=fix) from None


class LlamaCpp:
    """A GGUF file, or only its tokenizer, in llama.cpp. Raises ParityError if llama.cpp cannot load it."""

    def __init__(
        self, file: Path, *, adapter: Path | None = None, context: int = 512, vocab_only: bool = False
    ) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        threads = max(1, torch.get_num_threads())
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # with vocab_only, it warns that there is no context
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
        """Return token ids. control: parse the names of control tokens in the text as control tokens."""
        ids: list[int] = self._llama.tokenize(text.encode("utf-8"), add_bos=False, special=control)
        return ids

    def stops_at(self, token: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    @property
    def special_tokens(self) -> dict[str, int | bool]:
        """The ids of bos and eos, and whether llama.cpp adds bos before a text."""
        api, vocab = self._api, self._vocab
        return {
            "bos": int(api.llama_vocab_bos(vocab)), "eos": int(api.llama_vocab_eos(vocab)),
            "add_bos": bool(api.llama_vocab_get_add_bos(vocab)),
        }  # fmt: skip

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Render a chat prompt with the template in the file, as llama-cpp-python does."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def token_text(name: str) -> str:
            token = int(self.special_tokens[name])
            raw = self._api.llama_vocab_get_text(self._vocab, token) if token >= 0 else b""
            return str(raw.decode("utf-8"))

        template = self.metadata.get("tokenizer.chat_template", "")
        formatter: Any = Jinja2ChatFormatter(template, eos_token=token_text("eos"), bos_token=token_text("bos"))
        return str(formatter(messages=list(messages)).prompt)

    def log_probabilities(self, example: Example) -> Tensor:
        """Return the log-probabilities of all next tokens at each position: (tokens - 1, vocabulary), fp32."""
        self._llama.reset()
        self._llama.eval(example.ids.tolist())
        logits = torch.from_numpy(np.array(self._llama.scores[: len(example) - 1], dtype=np.float32))
        return log_softmax_(logits)

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """Generate greedily. The result includes the stop token."""
        ids: list[int] = []
        for token in self._llama.generate(list(prompt), temp=0.0, repeat_penalty=1.0, reset=True):
            ids.append(int(token))
            if self.stops_at(ids[-1]) or len(ids) == max_new_tokens:
                break
        return ids


def quantize(source: Path, out: Path, kind: str) -> None:
    """Quantize a GGUF file with llama.cpp. kind: q4_k_m, q5_k_m or q6_k. Raises RunError if that fails."""
    import llama_cpp

    api: Any = llama_cpp
    options = api.llama_model_quantize_default_params()
    options.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    options.nthread = max(1, torch.get_num_threads())
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it logs a line per tensor
    error_code = api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options))
    if error_code:
        raise RunError(f"{out}: llama.cpp could not quantize to {kind} (code {error_code})", fix="choose --type q8_0")


@dataclass
class FileCheck:
    """Comparison of a GGUF file in llama.cpp with the tuned model."""

    parity: Parity | None = None
    strings: int = 0  # number of SAMPLE_STRINGS that are tokenized identically
    strings_differ: list[str] = field(default_factory=list)  # the others
    conversations: int = 0  # number of sample conversations with identical prompts
    answers: int = 0  # number of prompts that both models answered greedily
    answers_equal: int = 0
    answers_stopped: int = 0  # answers of llama.cpp that end with a stop token
    reference_stopped: int = 0  # answers of the tuned model that end with a stop token

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "parity"}


def check_text(llama: LlamaCpp, vocabulary: Vocabulary, renderer: Renderer, examples: Sequence[Example]) -> FileCheck:
    """Compare special tokens, tokenization and chat prompts. Raises ParityError on the first difference."""
    check = FileCheck()
    _check_special_tokens(llama, vocabulary, renderer)
    tokenizer = renderer.tokenizer
    if vocabulary.plain_text:
        check.strings_differ = [
            text
            for text in SAMPLE_STRINGS
            if llama.tokenize(text, control=False) != tokenizer(text, add_special_tokens=False)["input_ids"]
        ]
        check.strings = len(SAMPLE_STRINGS) - len(check.strings_differ)
    if len(check.strings_differ) > (0 if vocabulary.exact else MAX_DIFFERENT_STRINGS):
        count, text = len(check.strings_differ), check.strings_differ[0]
        raise _parity_error(f"{count} of {len(SAMPLE_STRINGS)} strings are tokenized differently, such as {text!r}")
    for example in examples:
        ids = example.ids.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_reversible = tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        if is_reversible and llama.tokenize(text, control=True) != ids:
            raise _parity_error(f"row {example.file}:{example.line} is tokenized differently")
    for messages in make_sample_conversations(renderer.chat.traits.system) if renderer.template is not None else ():
        expected = renderer.chat.prompt(messages).text
        prompt = llama.render([{"role": message.role, "content": message.content} for message in messages])
        if prompt != expected:
            raise _parity_error(f"the chat template gives another prompt: {prompt!r}, trained with {expected!r}")
        if llama.tokenize(expected, control=True) != renderer.prompt(messages).tolist():
            raise _parity_error(f"a chat prompt is tokenized differently: {expected!r}")
        check.conversations += 1
    return check


def _check_special_tokens(llama: LlamaCpp, vocabulary: Vocabulary, renderer: Renderer) -> None:
    for name in ("eos", "add_bos") if vocabulary.bos is None else ("eos", "add_bos", "bos"):
        actual, expected = llama.special_tokens[name], getattr(vocabulary, name)
        if actual != expected:
            raise _parity_error(f"{name} is {actual} in llama.cpp, {expected} in the tokenizer")
    for token in renderer.stop_ids:
        if not llama.stops_at(token):
            raise _parity_error(f"it does not stop at {renderer.tokenizer.convert_ids_to_tokens(token)}")


def _parity_error(what: str) -> ParityError:
    fix = "nothing was kept; please report the base's name"
    return ParityError(f"not the same model in llama.cpp: {what}", fix=fix)


@contextlib.contextmanager
def open_checker(
    tuned: TunedModel, renderer: Renderer, vocabulary: Vocabulary
) -> Iterator[Callable[[Path, str, Path | None], FileCheck]]:
    """Yield a function (file, type, adapter file) that compares a file in llama.cpp with the tuned model in fp32.

    The function raises ParityError if the difference exceeds the type's limit, or if tokens or prompts differ.
    """
    rows = tuned.examples[:NUM_PROMPTS]
    # The prompt of a row is the tokens before the first supervised one.
    prompts = [example.ids[: int(np.flatnonzero(example.weights)[0])] for example in rows]
    context = max(len(example) for example in [*select_rows(tuned.examples)[0], *rows]) + MAX_NEW_TOKENS
    expected: list[Completion] = []

    def load_reference() -> Any:
        model = tuned.load()
        stops = renderer.end_ids
        expected.extend(generate(model, renderer.tokenizer, prompts, stop_ids=stops, max_new_tokens=MAX_NEW_TOKENS))
        return model

    with measure_against(load_reference, tuned.examples) as measure:

        def check_file(file: Path, kind: str, adapter: Path | None) -> FileCheck:
            with LlamaCpp(file, vocab_only=True) as llama:
                check = check_text(llama, vocabulary, renderer, tuned.examples)
            with LlamaCpp(file, adapter=adapter, context=context) as llama:
                answers = [llama.generate(prompt.tolist(), MAX_NEW_TOKENS) for prompt in prompts]
                check.parity = measure(lambda: llama, LIMITS[kind])
            texts = [renderer.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
            check.answers = len(prompts)
            check.answers_equal = sum(text == answer.text for text, answer in zip(texts, expected, strict=True))
            check.answers_stopped = sum(ids[-1] in renderer.end_ids for ids in answers)
            check.reference_stopped = sum(answer.stopped for answer in expected)
            check.parity.check(str(file))
            if check.reference_stopped == len(prompts) and not check.answers_stopped:
                raise _parity_error(f"{len(prompts)} answers end in the tuned model, none in llama.cpp")
            return check

        yield check_file


# Strings that tokenizers often split differently.
_PIECES = (
    "The quick brown fox jumps over the lazy dog.", "I'm sure they'll say we've DON'T-ed it; it's o'clock",
    "3 33 333 3333 33333 3.14159 1,000,000 -42 1e-9 0x1F", "def f(x):\n    return x**2  # squared\n\n\nf(3)",
    '{"intent": "PlayMusic", "artist": "Björk", "year": 1993}', "SELECT * FROM t WHERE a<>'b' AND c>=10;",
    "naïve café, über Straße, señor, garçon", "Привет, как дела? Это пример.",
    "今天天气很好，我们去公园吧。", "こんにちは、元気ですか？カタカナ",
    "안녕하세요 반갑습니다", "مرحبا كيف حالك اليوم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Γειά σου Κόσμε",
    "😀 👍🏽 👨‍👩‍👧 🇫🇷 ❤️", "a\tb\t\tc\n\n\nd   e    f", "trailing blanks   ", "   leading",
    "https://example.com/a_b-c?d=e&f=%20#g", "user@example.com", "C:\\Users\\me\\file.txt",
    "snake_case camelCase PascalCase", "(((nested)))[[brackets]]{{braces}}", "!!!???...;;;:::---___",
    "“curly” ‘quotes’ – dash — dash … dots", "5€ £3 ¥100 ±2 × ÷ ≈ ∞",
    "# Title\n\n- one\n- two\n\n```py\nprint('x')\n```", "<html><body class='a'>x &amp; y</body></html>",
    "2024-02-29T23:59:60Z", "Mr. Smith's e-mail isn't re-opened.", "AAAAaaaa BBBBbbbb",
    "supercalifragilisticexpialidocious", "line one\r\nline two\r\n", "x = y + z; a += b * c / d % e",
    "~/.bashrc && echo $HOME | grep -v '^#'", "E = mc^2, a_1 <= b_2", "Ünïcödé ŵïth ďïáčřïťïčš", "end",
)  # fmt: skip
_FRAMES = ("{}", " {}", "{}\n\n {}", "({}), 12 {}", "\n{}!\t{}")
SAMPLE_STRINGS = [frame.format(piece, piece) for piece in _PIECES for frame in _FRAMES]


def make_sample_conversations(with_system: bool) -> list[list[Message]]:
    """Return ten conversations that end with a user message. with_system: some start with a system prompt."""
    texts = [
        ("Hello!",), ("What is 3 + 4?", "7", "And 5?"), ("Give me JSON.", '{"a": [1, 2]}', "Now YAML."),
        ("Line one.\nLine two.",), ("Übersetze: naïve café", "Klar.", "Danke, und weiter?", "Gern.", "Noch eins."),
        ("say \"quoted\" and 'single' {{ braces }}",), ("<b>bold</b> & more", "ok", "go on"), ("今天天气很好",),
        ("😀?", "👍", "ok"), ("def f():\n    return 1\n\nExplain.",),
    ]  # fmt: skip
    systems = ("Be brief.", None, "You answer\nin two lines.", None, None)
    conversations = []
    for number, turns in enumerate(texts):
        system = systems[number % len(systems)] if with_system else None
        messages = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(turns)]
        conversations.append(messages if system is None else [Message("system", system), *messages])
    return conversations
