"""Supervised tokens of random conversations, for six families of chat templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from strop.data.rendering.render import Renderer
from strop.data.row_errors import RenderError
from strop.data.types import Conversation, Example, Message
from strop.errors import ModelError
from tests.support import families

FAMILIES = sorted(families.TEMPLATES)
# white space by Unicode; Python includes four more control characters
BLANKS = "".join(sign for sign in map(chr, range(0x3001)) if sign.isspace() and not "\x1c" <= sign <= "\x1f")
RENDERERS: dict[str, Renderer] = {name: Renderer(families.tokenizer(name)) for name in FAMILIES}


def chat(*turns: tuple[str, str], **fields: Any) -> Conversation:
    return Conversation("f.jsonl", 1, tuple(Message(role, text) for role, text in turns), **fields)  # type: ignore[arg-type]


def decode(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def runs(example: Example) -> list[tuple[int, int]]:
    """Return the supervised runs of tokens as [start, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.weights > 0, [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def texts(family: str) -> st.SearchStrategy[str]:
    """Generate texts that are not blank, with the control tokens of the family."""
    control = list(families.tokenizer(family).get_added_vocab())
    piece = st.one_of(
        st.sampled_from(
            ["hello", " ", "\n", "The", "\n\n", " dog", "\t", "  ", "</", "|>", "[", "é", "日本", "🙂", "\x00"]
        ),
        st.sampled_from(control),
        st.text(max_size=8),
    )
    text = st.lists(piece, min_size=1, max_size=6).map("".join)
    text = text.map(lambda text: text.replace("▁", "_"))  # SentencePiece writes a blank as ▁
    return text.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str, Conversation]:
    family = draw(st.sampled_from(FAMILIES))
    text = texts(family)
    turns = [("system", draw(text))] if families.SYSTEM[family] and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(text)), ("assistant", draw(text))]
    return family, chat(*turns)


@settings(max_examples=100)
@given(conversations())
def test_supervised_tokens_are_answers_with_stop_tokens(case: tuple[str, Conversation]) -> None:
    family, conversation = case
    tokenizer, renderer = families.tokenizer(family), RENDERERS[family]
    assume(renderer.separate_reasoning(conversation) == conversation)  # as rows and prompts are before
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    examples = renderer.render(conversation)
    # a token may cover the end of a prompt and blanks that begin an answer: then turns are encoded separately
    assert len(examples) == 1 or (examples[0].encoded_separately and any(answer[0].isspace() for answer in answers))
    lead, stop = families.ANSWER[family]
    turns = [(example, begin, end) for example in examples for begin, end in runs(example)]
    supervised = [decode(tokenizer, example.ids[begin:end]) for example, begin, end in turns]
    if family in families.STRIPS:
        answers = [answer.strip() for answer in answers]
    if family in families.LSTRIPS:
        answers = [answer.lstrip(BLANKS) for answer in answers]
    if family == "mistral":  # as in Llama 2, the decoder drops the blank at the start
        lead = ""
    assert supervised == [lead + answer + stop for answer in answers]
    assert all(example.weights[0] == 0 and set(example.weights.tolist()) <= {0.0, 1.0} for example in examples)
    for (example, begin, end), i in zip(turns, range(len(answers)), strict=True):
        turn = [k for k, message in enumerate(conversation.messages) if message.role == "assistant"][i]
        prompt = renderer.prompt(conversation.messages[:turn])
        assert prompt.tolist() == example.ids[:begin].tolist()
        assert int(example.ids[end - 1]) in renderer.stop_ids


@settings(max_examples=60)
@given(conversations())
def test_control_tokens_come_only_from_the_template(case: tuple[str, Conversation]) -> None:
    family, conversation = case
    tokenizer, renderer = families.tokenizer(family), RENDERERS[family]
    plain = chat(*((message.role, "hello") for message in conversation.messages))
    special = set(tokenizer.all_special_ids) | {
        tokenizer.convert_tokens_to_ids(t) for t in renderer.chat.control.private
    }
    [expected] = renderer.render(plain)
    *_, example = renderer.render(conversation)  # the last has all turns
    assert [i for i in example.ids.tolist() if i in special] == [i for i in expected.ids.tolist() if i in special]


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_rows_are_tokenized_like_apply_chat_template(family: str) -> None:
    tokenizer, renderer = families.tokenizer(family), RENDERERS[family]
    turns = [("user", "What is the weather?"), ("assistant", "It is sunny."), ("user", "Yes"), ("assistant", "No")]
    if families.SYSTEM[family]:
        turns.insert(0, ("system", "Hello there"))
    messages = [{"role": role, "content": text} for role, text in turns]
    [example] = renderer.render(chat(*turns))
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert example.ids.tolist() == expected[: len(example)]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(chat(*turns).messages[:-1]).tolist() == prompt
    if tokenizer.bos_token:
        assert example.ids.tolist().count(tokenizer.bos_token_id) == 1 and example.ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_features_of_a_template_are_detected(family: str) -> None:
    renderer = RENDERERS[family]
    assert renderer.chat.traits.system is families.SYSTEM[family]
    assert renderer.chat.traits.calls is (family == "qwen3")
    assert [families.tokenizer(family).convert_ids_to_tokens(i) for i in renderer.stop_ids] == [
        families.ANSWER[family][1]
    ]
    assert len(renderer.template_hash) == 64


def test_system_message_without_template_support_is_refused_with_the_fix() -> None:
    with pytest.raises(RenderError) as caught:
        RENDERERS["gemma"].render(chat(("system", "Be brief"), ("user", "a"), ("assistant", "b")))
    assert caught.value.code == "system-unsupported"
    assert "first user message" in caught.value.fix and caught.value.where[0].line == 1


TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris <|im_end|>"}}}


def test_tool_calls_are_supervised_and_their_results_are_not() -> None:
    messages = (
        Message("user", "What is the weather in Paris?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", '{"sky": "sunny"}'),
        Message("assistant", "It is sunny."),
    )
    [example] = RENDERERS["qwen3"].render(Conversation("f", 1, messages, tools=(TOOL,)))
    tokenizer = families.tokenizer("qwen3")
    call, answer = (decode(tokenizer, example.ids[a:b]) for a, b in runs(example))
    assert '"city": "Paris <|im_end|>"' in call and call.endswith("</tool_call><|im_end|>")
    assert answer == "It is sunny.<|im_end|>"
    stops = example.ids.tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert stops == 5  # system, user, call, result, answer: not the one in the arguments


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3"])
def test_tools_without_template_support_are_refused(family: str) -> None:
    for fields in ({"tools": (TOOL,)}, {}):
        assistant = Message("assistant", "b", tool_calls=() if fields else (CALL,))
        with pytest.raises(RenderError) as caught:
            RENDERERS[family].render(Conversation("f", 1, (Message("user", "a"), assistant), **fields))  # type: ignore[arg-type]
        assert caught.value.code == "tools-unsupported"


def test_template_that_drops_earlier_reasoning_gives_one_example_a_turn() -> None:
    messages = (
        Message("user", "The quick?"),
        Message("assistant", "fox", reasoning="think of it"),
        Message("user", "And then?"),
        Message("assistant", "dog", reasoning="again"),
    )
    renderer, tokenizer = RENDERERS["qwen3"], families.tokenizer("qwen3")
    first, second = renderer.render(Conversation("f", 1, messages))
    for example, end in ((first, 1), (second, 3)):
        [(begin, stop)] = runs(example)
        assert example.ids[:begin].tolist() == renderer.prompt(messages[:end]).tolist()
        answer = f"<think>\n{messages[end].reasoning}\n</think>\n\n{messages[end].content}<|im_end|>"
        assert decode(tokenizer, example.ids[begin:stop]) == answer
    assert "think of it" not in decode(tokenizer, second.ids)
    # without reasoning nothing is rewritten
    assert len(renderer.render(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))) == 1


TURNS = (
    Message("system", "Be short."),
    Message("user", "The quick?"),
    Message("assistant", "fox", reasoning="think of it"),
    Message("user", "And then?"),
    Message("assistant", "", reasoning="call", tool_calls=({"function": {"name": "next", "arguments": {"n": 1}}},)),
    Message("tool", "42", name="next"),
    Message("assistant", "dog", reasoning="again"),
    Message("user", "dog?"),
    Message("assistant", "dog", reasoning="once more"),
)


@pytest.mark.parametrize("masked", [False, True])
def test_loss_all_trains_each_message_once_if_a_conversation_becomes_several_examples(masked: bool) -> None:
    tokenizer = families.tokenizer("qwen3")
    messages = (replace(TURNS[0], content="Be <|im_end|> short."), *TURNS[1:]) if masked else TURNS
    examples = Renderer(tokenizer, loss="all").render(Conversation("f", 1, messages, tools=(TOOL,)))
    trained = [decode(tokenizer, example.ids[begin:end]) for example in examples for begin, end in runs(example)]
    start = "\n<|im_start|>"
    assert trained[0].startswith("system") or "Be " in trained[0]
    assert trained[1:] == [
        f"{start}user\nAnd then?<|im_end|>{start}assistant\n<think>\ncall\n</think>\n\n<tool_call>\n"
        '{"name": "next", "arguments": {"n": 1}}\n</tool_call><|im_end|>',
        f"{start}user\n<tool_response>\n42\n</tool_response><|im_end|>{start}assistant\n"
        "<think>\nagain\n</think>\n\ndog<|im_end|>",
        f"{start}user\ndog?<|im_end|>{start}assistant\n<think>\nonce more\n</think>\n\ndog<|im_end|>",
    ]


def test_prompt_that_is_not_a_prefix_is_refused() -> None:
    tokenizer = families.tokenizer("chatml")
    template = families.CHATML.replace("assistant\n", "assistant\n<think>\n")
    renderer = with_template(tokenizer, template)
    with pytest.raises(RenderError) as caught:
        renderer.render(chat(("user", "a"), ("assistant", "b")))
    assert caught.value.code == "prompt-not-prefix"


def test_template_that_drops_a_message_is_refused() -> None:
    template = (
        "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    renderer = with_template(families.tokenizer("chatml"), template)
    messages = (Message("user", "a"), Message("tool", "42"), Message("assistant", "b"))
    with pytest.raises(RenderError) as caught:
        renderer.render(Conversation("f", 1, messages))
    assert caught.value.code == "text-lost" and caught.value.detail == "tool"


def with_template(tokenizer: Any, template: str, **options: Any) -> Renderer:
    saved = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        return Renderer(tokenizer, **options)
    finally:
        tokenizer.chat_template = saved


def test_prompt_and_answer_that_share_a_token_are_encoded_separately() -> None:
    renderer, tokenizer = RENDERERS["chatml"], families.tokenizer("chatml")
    turns = chat(("user", "a"), ("assistant", "\n\nb"), ("user", "c"), ("assistant", "d"))
    assert tokenizer.encode("\n\n\n") != tokenizer.encode("\n") + tokenizer.encode("\n\n")
    first, second = renderer.render(turns)
    for example, turn in ((first, 1), (second, 3)):
        [(begin, end)] = runs(example)
        assert (
            example.encoded_separately
            and example.ids[:begin].tolist() == renderer.prompt(turns.messages[:turn]).tolist()
        )
        assert decode(tokenizer, example.ids[begin:end]) == turns.messages[turn].content + "<|im_end|>"
    everything = Renderer(tokenizer, loss="all").render(turns)
    assert [runs(example) for example in everything] == [[(1, len(first))], [(14, end)]]
    assert decode(tokenizer, second.ids[14:begin]) == "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    [trimmed] = RENDERERS["llama3"].render(turns)  # its template strips texts
    assert not trimmed.encoded_separately


def test_characters_that_a_tokenizer_loses_are_detected() -> None:
    assert RENDERERS["mistral"].lost_characters("a ▁ 日本\n🙂") == {"▁"}
    assert RENDERERS["chatml"].lost_characters("a ▁ 日本\n🙂\x04") == set()


def test_message_weights_become_token_weights() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b", weight=0.0),
        Message("user", "c"),
        Message("assistant", "d", weight=0.5),
    )
    [example] = RENDERERS["chatml"].render(Conversation("f", 1, messages))
    assert len(runs(example)) == 1 and set(example.weights.tolist()) == {0.0, 0.5}
    untrained = tuple(Message(m.role, m.content, weight=0.0) for m in messages)
    with pytest.raises(RenderError) as caught:
        RENDERERS["chatml"].render(Conversation("f", 1, untrained))
    assert caught.value.code == "nothing-supervised"


def test_loss_all_supervises_all_tokens_and_refuses_weights() -> None:
    renderer = Renderer(families.tokenizer("llama3"), loss="all")
    [example] = renderer.render(chat(("user", "a"), ("assistant", "b")))
    assert example.weights.tolist() == [0.0, *[1.0] * (len(example) - 1)]
    turns = (Message("user", "a", weight=0.0), Message("assistant", "b", weight=0.5))
    with pytest.raises(RenderError) as caught:
        renderer.render(Conversation("f", 1, turns))
    assert caught.value.code == "other-weight" and "--data.loss assistant" in caught.value.fix
    [example] = RENDERERS["llama3"].render(Conversation("f", 1, turns))
    assert set(example.weights.tolist()) == {0.0, 0.5}


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_text_has_eos_and_bos_if_the_tokenizer_adds_it(family: str) -> None:
    tokenizer = families.tokenizer(family)
    text = f"The quick brown fox {tokenizer.eos_token} jumps"
    [example] = RENDERERS[family].render(Conversation("f", 1, (), text=text))
    ids = example.ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert (ids[0] == tokenizer.bos_token_id) is bool(tokenizer.bos_token)
    assert example.supervised == len(ids) - 1
    start = 1 if tokenizer.bos_token else 0
    assert decode(tokenizer, ids[start:-1]).strip() == text


def test_model_without_a_template_renders_text_and_refuses_chats() -> None:
    renderer = with_template(families.tokenizer("chatml"), "")
    assert renderer.stop_ids == (families.tokenizer("chatml").eos_token_id,)
    assert renderer.render(Conversation("f", 1, (), text="hello"))[0].supervised
    with pytest.raises(ModelError) as caught:
        renderer.render(chat(("user", "a"), ("assistant", "b")))
    assert "data.template" in caught.value.fix


def test_template_option_takes_a_name_or_a_file(tmp_path: Any) -> None:
    turns = chat(("system", "s"), ("user", "a"), ("assistant", "b"))
    [named] = Renderer(families.tokenizer("llama3"), template="chatml").render(turns)
    text = decode(families.tokenizer("llama3"), named.ids)
    assert text == (
        "<|begin_of_text|><|im_start|>system\ns<|end_of_text|>\n<|im_start|>user\na<|end_of_text|>\n<|im_start|>assistant\nb<|end_of_text|>"
    )  # without <|im_end|> the eos token is the stop token
    file = tmp_path / "own.jinja"
    file.write_text(families.CHATML)
    [from_file] = Renderer(families.tokenizer("chatml"), template=str(file)).render(turns)
    assert from_file.ids.tolist() == RENDERERS["chatml"].render(turns)[0].ids.tolist()
    with pytest.raises(ModelError, match="did you mean chatml"):
        Renderer(families.tokenizer("chatml"), template="chatlm")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (families.CHATML + "{# https://example.org/x #}", "web addresses"),
        ("{% if 'secret' in messages[-1].content %}x{% endif %}" + families.CHATML, "'secret'"),
        ("{% if messages[-1]['content'].startswith('secret') %}x{% endif %}" + families.CHATML, "'secret'"),
        (families.CHATML.replace("<|im_start|>{{", "{{ strftime_now('%Y') }}<|im_start|>{{"), "date"),
        (families.LLAMA3.replace("{{ bos_token }}", ""), "no bos token"),
    ],
)
def test_unusual_templates_are_reported(template: str, expected: str) -> None:
    tokenizer = families.tokenizer("llama3" if "eot_id" in template else "chatml")
    assert expected in "\n".join(with_template(tokenizer, template).warnings)


def test_templates_of_the_families_give_no_warnings() -> None:
    assert [RENDERERS[family].warnings for family in FAMILIES] == [()] * len(FAMILIES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'x' * 10000000000 }}",
        "{% if %}",
    ],
)
def test_unusable_templates_are_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strop.data.rendering.template_source.MAX_ITERATIONS", 100_000)
    with pytest.raises(ModelError):
        with_template(families.tokenizer("chatml"), template)
