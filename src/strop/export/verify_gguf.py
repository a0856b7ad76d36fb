"""Whether llama.cpp, given a GGUF file, tokenizes, prompts, predicts and stops as the tuned model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from strop.data.rendering.render import Renderer
from strop.data.types import Example, Ids
from strop.engine.decode.generate import Completion, generate
from strop.errors import ParityError
from strop.export.gguf_tokenizer import Vocabulary
from strop.export.llama_cpp import LlamaCpp
from strop.export.parity import Limit, Parity, enough, measuring
from strop.export.template_strings import STRINGS, conversations
from strop.export.tuned import Tuned

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
        stops, limit = renderer.ends, LONGEST_ANSWER
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
            found.answers_stopped = sum(ids[-1] in renderer.ends for ids in given)
            found.reference_stopped = sum(answer.stopped for answer in answers)
            found.parity.check(str(file))
            if found.reference_stopped == len(prompts) and not found.answers_stopped:
                raise _differs(f"{len(prompts)} answers end in the tuned model, none in llama.cpp")
            return found

        yield check


def _prompt(example: Example) -> Ids:
    """The tokens before the first supervised one."""
    return example.ids[: int(np.flatnonzero(example.weights)[0])]
