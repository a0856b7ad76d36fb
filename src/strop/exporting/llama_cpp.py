"""Real llama.cpp, through llama-cpp-python where that is installed: what a GGUF file does, rather than what it says."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strop.data.rendering.render import Renderer
from strop.data.types import Example, Ids, Message
from strop.engine.decode.generate import Completion, generate
from strop.errors import InputError, ParityError, RunError
from strop.exporting.gguf_tokenizer import Vocabulary
from strop.exporting.merge import Tuned
from strop.exporting.parity import Limit, Parity, enough, measuring, normalized

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


ASKED, LONGEST_ANSWER = 4, 64  # prompts answered by both, and new tokens at most
# Of the 200, where llama.cpp is known not to be exact (Vocabulary.exact); rows and prompts may never differ.
STRINGS_APART = 10

# What rounding may cost against the adapter in fp32. Of a SmolLM2-135M with a random adapter: f16 6e-6, bf16 2.4e-4,
# q8_0 8.2e-3 and 95.3 %, q4_k_m 0.13 and 85.8 %; about three times that is allowed, q6_k and q5_k_m lie between.
LIMITS = {
    "f32": Limit(1e-4, 0.995),
    "f16": Limit(1e-3, 0.99),
    "bf16": Limit(2e-3, 0.985),
    "q8_0": Limit(0.03, 0.92),
    "q6_k": Limit(0.06, 0.88),
    "q5_k_m": Limit(0.12, 0.84),
    "q4_k_m": Limit(0.4, 0.75),
}


@dataclass
class Findings:
    """strings: of 200, tokenized alike. conversations: of 10, with the same prompt. answers: greedy, asked of both."""

    parity: Parity | None = None
    strings: int = 0
    strings_differ: list[str] = field(default_factory=list)
    conversations: int = 0
    answers: int = 0
    answers_equal: int = 0
    answers_stopped: int = 0
    reference_stopped: int = 0

    def as_json(self) -> dict[str, Any]:
        told = asdict(self)
        del told["parity"]
        return told


def check_text(llama: LlamaCpp, vocabulary: Vocabulary, renderer: Renderer, examples: Sequence[Example]) -> Findings:
    """Tokens, prompts and ends of turns. Raises ParityError with what differs first."""
    found = Findings()
    _check_special(llama, vocabulary, renderer)
    tokenizer = renderer.tokenizer
    for text in STRINGS if vocabulary.plain_text else ():
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        if llama.tokenize(text, control=False) != expected:
            found.strings_differ.append(text)
    found.strings = len(STRINGS) - len(found.strings_differ) if vocabulary.plain_text else 0
    if len(found.strings_differ) > (0 if vocabulary.exact else STRINGS_APART):
        text = found.strings_differ[0]
        raise _differs(
            f"{len(found.strings_differ)} of {len(STRINGS)} strings are tokenized differently, such as {text!r}"
        )
    for example in examples:
        text = tokenizer.decode(example.ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        if again == example.ids.tolist() and llama.tokenize(text, control=True) != again:
            raise _differs(f"row {example.file}:{example.line} is tokenized differently")
    for messages in conversations(renderer.supports_system) if renderer.template is not None else ():
        prompt = renderer.chat.prompt(messages).text
        told = llama.render([{"role": message.role, "content": message.content} for message in messages])
        if told != prompt:
            raise _differs(f"the chat template gives another prompt: {told!r}, trained with {prompt!r}")
        if llama.tokenize(prompt, control=True) != renderer.prompt(messages).tolist():
            raise _differs(f"a chat prompt is tokenized differently: {prompt!r}")
        found.conversations += 1
    return found


def _check_special(llama: LlamaCpp, vocabulary: Vocabulary, renderer: Renderer) -> None:
    special = llama.special
    expected: dict[str, int | bool] = {"eos": vocabulary.eos, "add_bos": vocabulary.add_bos}
    if vocabulary.bos is not None:
        expected["bos"] = vocabulary.bos
    for name, value in expected.items():
        if special[name] != value:
            raise _differs(f"{name} is {special[name]} in llama.cpp, {value} in the tokenizer")
    # A base of someone else's may name no end of turn, and llama.cpp guesses one then: what counts is where it stops.
    deaf = [token for token in renderer.stop_ids if not llama.ends(token)]
    if deaf:
        raise _differs(f"it does not stop at {renderer.tokenizer.convert_ids_to_tokens(deaf[0])}")


def _differs(what: str) -> ParityError:
    return ParityError(
        f"not the same model in llama.cpp: {what}", fix="nothing was kept; please report the base's name"
    )


@contextmanager
def checking(
    tuned: Tuned, renderer: Renderer, vocabulary: Vocabulary
) -> Iterator[Callable[[Path, str, Path | None], Findings]]:
    """Inside the block, what is given checks (file, type, adapter file) against the tuned model in fp32.

    Raises ParityError beyond the type's limit, or where llama.cpp reads text in another way.
    """
    asked = tuned.examples[:ASKED]
    prompts = [_prompt(example) for example in asked]
    context = max(len(example) for example in [*enough(tuned.examples), *asked]) + LONGEST_ANSWER
    answers: list[Completion] = []

    def reference() -> Any:
        model = tuned.model()
        stops, limit = renderer.end_ids, LONGEST_ANSWER
        answers.extend(generate(model, renderer.tokenizer, prompts, stop_ids=stops, max_new_tokens=limit))
        return model

    with measuring(reference, tuned.examples) as measure:

        def check(file: Path, kind: str, adapter: Path | None) -> Findings:
            with LlamaCpp(file, vocab_only=True) as llama:
                found = check_text(llama, vocabulary, renderer, tuned.examples)
            with LlamaCpp(file, adapter=adapter, context=context) as llama:
                given = [llama.greedy(prompt.tolist(), LONGEST_ANSWER) for prompt in prompts]
                found.parity = measure(lambda: llama, LIMITS[kind])
            texts = [renderer.tokenizer.decode(ids, skip_special_tokens=True) for ids in given]
            found.answers = len(prompts)
            found.answers_equal = sum(text == answer.text for text, answer in zip(texts, answers, strict=True))
            found.answers_stopped = sum(ids[-1] in renderer.end_ids for ids in given)
            found.reference_stopped = sum(answer.stopped for answer in answers)
            found.parity.check(str(file))
            if found.reference_stopped == len(prompts) and not found.answers_stopped:
                raise _differs(f"{len(prompts)} answers end in the tuned model, none in llama.cpp")
            return found

        yield check


def _prompt(example: Example) -> Ids:
    """The tokens before the first supervised one."""
    return example.ids[: int(np.flatnonzero(example.weights)[0])]


_PIECES = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say we've DON'T-ed it; it's o'clock",
    "3 33 333 3333 33333 3.14159 1,000,000 -42 1e-9 0x1F",
    "def f(x):\n    return x**2  # squared\n\n\nf(3)",
    '{"intent": "PlayMusic", "artist": "Björk", "year": 1993}',
    "SELECT * FROM t WHERE a<>'b' AND c>=10;",
    "naïve café, über Straße, señor, garçon",
    "Привет, как дела? Это пример.",
    "今天天气很好，我们去公园吧。",
    "こんにちは、元気ですか？カタカナ",
    "안녕하세요 반갑습니다",
    "مرحبا كيف حالك اليوم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Γειά σου Κόσμε",
    "😀 👍🏽 👨‍👩‍👧 🇫🇷 ❤️",
    "a\tb\t\tc\n\n\nd   e    f",
    "trailing blanks   ",
    "   leading",
    "https://example.com/a_b-c?d=e&f=%20#g",
    "user@example.com",
    "C:\\Users\\me\\file.txt",
    "snake_case camelCase PascalCase",
    "(((nested)))[[brackets]]{{braces}}",
    "!!!???...;;;:::---___",
    "“curly” ‘quotes’ – dash — dash … dots",
    "5€ £3 ¥100 ±2 × ÷ ≈ ∞",
    "# Title\n\n- one\n- two\n\n```py\nprint('x')\n```",
    "<html><body class='a'>x &amp; y</body></html>",
    "2024-02-29T23:59:60Z",
    "Mr. Smith's e-mail isn't re-opened.",
    "AAAAaaaa BBBBbbbb",
    "supercalifragilisticexpialidocious",
    "line one\r\nline two\r\n",
    "x = y + z; a += b * c / d % e",
    "~/.bashrc && echo $HOME | grep -v '^#'",
    "E = mc^2, a_1 <= b_2",
    "Ünïcödé ŵïth ďïáčřïťïčš",
    "end",
)
_FRAMES = ("{}", " {}", "{}\n\n {}", "({}), 12 {}", "\n{}!\t{}")
STRINGS = [frame.format(piece, piece) for piece in _PIECES for frame in _FRAMES]


def conversations(system: bool) -> list[list[Message]]:
    """Ten, each ending with a user turn; system prompts in some, where the template has them."""
    said = [
        ("Hello!",),
        ("What is 3 + 4?", "7", "And 5?"),
        ("Give me JSON.", '{"a": [1, 2]}', "Now YAML."),
        ("Line one.\nLine two.",),
        ("Übersetze: naïve café", "Klar.", "Danke, und weiter?", "Gern.", "Noch eins."),
        ("say \"quoted\" and 'single' {{ braces }}",),
        ("<b>bold</b> & more", "ok", "go on"),
        ("今天天气很好",),
        ("😀?", "👍", "ok"),
        ("def f():\n    return 1\n\nExplain.",),
    ]
    systems = ("Be brief.", None, "You answer\nin two lines.", None, None)
    made = []
    for number, turns in enumerate(said):
        first = systems[number % len(systems)] if system else None
        told = [] if first is None else [Message("system", first)]
        made.append([*told, *(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(turns))])
    return made
