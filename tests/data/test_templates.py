"""Every template, named or the tokenizer's own: its text, what is learned of it, and where it ends."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data import chat_templates as forms

from fairlead.data.render import Renderer, Tree
from fairlead.data.templates import TEMPLATES
from fairlead.errors import DataError
from fairlead.types import Demonstration, Message, Preference, Prompt

NAMED = sorted(TEMPLATES)
CHATS: dict[str, tuple[str, Callable[[str], str]]] = {
    "chatml": (forms.CHATML, lambda text: f"{text}<|im_end|>"),
    "llama-3": (forms.LLAMA_3, lambda text: f"{text.strip()}<|eot_id|>"),
    "zephyr": (forms.ZEPHYR, lambda text: f"{text}</s>"),
    "mistral": (forms.MISTRAL, lambda text: f" {text}</s>"),
    "phi-3": (forms.PHI_3, lambda text: f"{text}<|end|>"),
}
"""A chat template -> what it makes of an answer, its end included."""
LEARNED: dict[str, Callable[[str], str]] = {
    "plain": lambda text: f"{text}</s>",
    "question-answer": lambda text: f" {text}</s>",
    "hh": lambda text: f" {text}</s>",
    "hash": lambda text: f" {text}</s>",
    "alpaca": lambda text: f"{text}</s>",
    "chatml": lambda text: f"{text}<|im_end|>",
    "llama-3": lambda text: f"{text.strip()}<|eot_id|>",
}

words = st.text(st.sampled_from("ab cd.\n'éß漢🙂:#"), min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4)


def turns(pairs: list[tuple[str, str]]) -> list[Message]:
    return [
        Message(role=role, content=text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def renderer(template: str, tokenizer: Any, **options: Any) -> Renderer:
    return Renderer(tokenizer, template=template, max_length=2000, **options)


def only_tree(render: Renderer, record: Any) -> Tree:
    (tree,), _, _ = render.trees([record])
    return tree


def text_of(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def learned(tree: Tree) -> list[int]:
    mask = tree.prompt_mask or (False,) * len(tree.prompt)
    return [number for number, counts in zip(tree.prompt, mask, strict=True) if counts] + list(tree.responses[0])


# --- mask = decode -------------------------------------------------------------------------------------------------


def check_assistants_turns_are_learned(
    template: str, tokenizer: Any, pairs: list[tuple[str, str]], said: Callable[[str], str]
) -> None:
    said_turns = turns(pairs)
    record = Demonstration(said_turns[:-1], said_turns[-1]["content"])
    tree = only_tree(renderer(template, tokenizer, loss_on="assistant"), record)
    assert text_of(tokenizer, learned(tree)) == "".join(said(answer) for _, answer in pairs)
    # the same ids, whatever is learned of them
    plain = only_tree(renderer(template, tokenizer), record)
    assert (plain.prompt, plain.responses, plain.prompt_mask) == (tree.prompt, tree.responses, ())
    everything = only_tree(renderer(template, tokenizer, loss_on="all"), record)
    assert everything == Tree(tree.prompt, tree.responses, (True,) * len(tree.prompt))
    # an earlier answer has the ids the model itself wrote
    first = only_tree(renderer(template, tokenizer), Demonstration(said_turns[:1], pairs[0][1]))
    row = tree.prompt + tree.responses[0]
    assert row[: len(first.prompt) + len(first.responses[0])] == first.prompt + first.responses[0]


@pytest.mark.parametrize("template", NAMED)
@settings(deadline=None, max_examples=40)
@given(pairs=conversations)
def test_what_is_learned_decodes_to_the_assistants_texts_and_ends(template: str, pairs: list[tuple[str, str]]) -> None:
    check_assistants_turns_are_learned(template, forms.byte_level(), pairs, LEARNED[template])


@pytest.mark.parametrize("name", CHATS)
@settings(deadline=None, max_examples=40)
@given(pairs=conversations)
def test_of_a_chat_template_without_markers_too(name: str, pairs: list[tuple[str, str]]) -> None:
    template, said = CHATS[name]
    tokenizer = forms.byte_level(template)
    check_assistants_turns_are_learned("chat", tokenizer, pairs, said)
    # the row is the template's text to the letter
    tree = only_tree(renderer("chat", tokenizer), Demonstration(turns(pairs)[:-1], pairs[-1][1]))
    whole = tokenizer.apply_chat_template(turns(pairs), tokenize=False)
    assert whole.startswith(text_of(tokenizer, tree.prompt + tree.responses[0]))
    assert whole.removeprefix(text_of(tokenizer, tree.prompt + tree.responses[0])).strip() in ("", "</s>")


@pytest.mark.parametrize("as_llama", [False, True])
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(*[st.text("ab cd.", min_size=1, max_size=8)] * 2), min_size=1, max_size=3))
def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_into_the_middle_of_a_row(
    as_llama: bool, pairs: list[tuple[str, str]]
) -> None:
    tokenizer = SPACED[as_llama]
    said = turns(pairs)
    tree = only_tree(renderer("hh", tokenizer), Demonstration(said[:-1], said[-1]["content"]))
    wanted = "\n\n".join(f"Human: {asked}\n\nAssistant: {answer}</s>" for asked, answer in pairs)
    assert text_of(tokenizer, tree.prompt + tree.responses[0]) == wanted


SPACED = {as_llama: forms.spaced(as_llama=as_llama) for as_llama in (False, True)}


def test_an_assistants_turn_that_does_not_count_is_context_alone() -> None:
    said = turns([("Q", "first"), ("R", "second"), ("S", "third")])
    said[1]["counts"] = False
    tokenizer = forms.byte_level(forms.CHATML)
    for template in ("chat", "chatml", "hh"):
        tree = only_tree(renderer(template, tokenizer, loss_on="assistant"), Demonstration(said[:-1], "third"))
        decoded = text_of(tokenizer, learned(tree))
        assert "first" not in decoded
        assert "second" in decoded
        assert "third" in decoded


def test_a_response_that_does_not_count_drops_its_record_and_is_counted() -> None:
    silent = Message(role="assistant", content="A", counts=False)
    records = [Demonstration("Q", silent), Demonstration("Q", "B")]
    _, kept, counts = renderer("hh", forms.byte_level()).trees(records)
    assert (kept, dict(counts.dropped)) == ([1], {"the response is marked as not to be learned": 1})


# --- templates that rewrite what was said --------------------------------------------------------------------------

HISTORY = turns([("Q", "first"), ("R", "second")])


def test_a_template_that_rewrites_earlier_answers_is_refused_where_they_are_to_be_learned() -> None:
    tokenizer = forms.byte_level(forms.QWEN_3)
    with pytest.raises(DataError, match=r"loss_on=assistant, but the chat template rewrites earlier turns"):
        renderer("chat", tokenizer, loss_on="assistant").trees([Demonstration(HISTORY[:-1], "second")])


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_such_a_template_serves_where_they_are_not_told_apart(loss_on: str) -> None:
    tokenizer = forms.byte_level(forms.QWEN_3)
    reply = Message(role="assistant", content="second", reasoning_content="hm")
    tree = only_tree(renderer("chat", tokenizer, loss_on=loss_on), Demonstration(HISTORY[:-1], reply))
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
    assert text_of(tokenizer, tree.prompt) == prompt + "<|im_start|>assistant\n"
    assert text_of(tokenizer, tree.responses[0]) == "<think>\nhm\n</think>\n\nsecond<|im_end|>"


def test_such_a_template_with_generation_markers_is_asked_for_them() -> None:
    tokenizer = forms.byte_level(forms.QWEN_3_MARKED)
    tree = only_tree(renderer("chat", tokenizer, loss_on="assistant"), Demonstration(HISTORY[:-1], "second"))
    assert text_of(tokenizer, learned(tree)) == "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>"


# --- ends and beginnings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "chat", "end"),
    [
        ("chat", forms.CHATML, "<|im_end|>"),
        ("chat", forms.LLAMA_3, "<|eot_id|>"),
        ("chat", forms.ZEPHYR, "</s>"),
        ("chat", forms.MISTRAL, "</s>"),
        ("chat", forms.PHI_3, "<|end|>"),
        ("chat", forms.QWEN_3, "<|im_end|>"),
        ("chatml", None, "<|im_end|>"),
        ("llama-3", None, "<|eot_id|>"),
        ("alpaca", None, "</s>"),
    ],
)
def test_a_response_ends_in_the_templates_own_end_token_once(template: str, chat: str | None, end: str) -> None:
    tokenizer = forms.byte_level(chat)
    render = renderer(template, tokenizer)
    number = tokenizer.convert_tokens_to_ids(end)
    assert render.eos == number
    for text in ("B", f"B{end}", f"B{end}{end}", "B</s>"):
        (response,) = only_tree(render, Demonstration("Q", text)).responses
        assert response[-1] == number
        assert not {number, tokenizer.eos_token_id} & set(response[:-1])
    assert render.decode(response) == render.decode(response[:-1])
    assert "B" in render.decode(response)


@pytest.mark.parametrize("has_habit", [False, True])
@pytest.mark.parametrize("chat", [forms.LLAMA_3, forms.MISTRAL])
def test_a_beginning_that_the_chat_template_writes_stands_once(chat: str, has_habit: bool) -> None:
    tokenizer = forms.byte_level(chat, has_habit=has_habit)
    tree = only_tree(renderer("chat", tokenizer), Demonstration("Q", "B"))
    assert tree.prompt.count(tokenizer.bos_token_id) == 1
    assert tree.prompt[0] == tokenizer.bos_token_id


def test_a_beginning_that_the_chat_template_does_not_write_is_not_there_and_named_templates_get_the_habits() -> None:
    tokenizer = forms.byte_level(forms.ZEPHYR, has_habit=True)
    assert text_of(tokenizer, only_tree(renderer("chat", tokenizer), Demonstration("Q", "B")).prompt).startswith(
        "<|user"
    )
    assert text_of(tokenizer, only_tree(renderer("hh", tokenizer), Demonstration("Q", "B")).prompt).startswith(
        "<s>Human"
    )


# --- the exact text ------------------------------------------------------------------------------------------------

ASKED: list[Message] = [
    Message(role="system", content="S"),
    Message(role="user", content="Q"),
    Message(role="assistant", content="A"),
    Message(role="tool", content="T"),
    Message(role="user", content="R"),
]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("plain", "SQATR|B"),
        ("question-answer", "System: S\n\nQuestion: Q\n\nAnswer: A\n\nTool: T\n\nQuestion: R\n\nAnswer:| B"),
        ("hh", "System: S\n\nHuman: Q\n\nAssistant: A\n\nTool: T\n\nHuman: R\n\nAssistant:| B"),
        ("hash", "### System: S### Human: Q### Assistant: A### Tool: T### Human: R### Assistant:| B"),
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
            "<|im_start|>tool\nT<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n|B",
        ),
        (
            "llama-3",
            "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
            "<|start_header_id|>ipython<|end_header_id|>\n\nT<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "R<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n|B",
        ),
        (
            "alpaca",
            "S\n\n### Instruction:\nQ\n\n### Response:A\n\n### Tool:\nT\n\n### Instruction:\nR\n\n### Response:|B",
        ),
    ],
)
def test_the_exact_text_of_a_named_template(template: str, wanted: str) -> None:
    render = renderer(template, forms.byte_level())
    prompt, _, response = wanted.rpartition("|")
    assert render.prompt_text(ASKED) == prompt
    assert render.response_text(ASKED, "B") == response


def test_alpaca_without_a_system_turn_begins_with_its_own() -> None:
    """tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT["prompt_no_input"]."""
    assert renderer("alpaca", forms.byte_level()).prompt_text("Name a fruit.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a fruit.\n\n### Response:"
    )


def test_a_template_whose_tokens_the_tokenizer_has_not_says_how_to_add_them() -> None:
    tokenizer = forms.byte_level()
    tokenizer_without = type(tokenizer)(tokenizer_object=_characters(), eos_token="</s>")
    with pytest.raises(
        DataError, match=r"no token <\|im_end\|> and no <\|im_start\|>\nhint: add them with model\.add_tokens"
    ):
        renderer("chatml", tokenizer_without)


def _characters() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"</s>": 0, "a": 1}, unk_token="a"))


def test_a_role_that_no_template_has_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(DataError, match=r"role 'narrator'\nhint: roles are assistant, system, tool, user"):
        renderer("hh", forms.byte_level()).prompts([Prompt([Message(role="narrator", content="x")])])


# --- tools and reasoning -------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
CALL = Message(role="assistant", content="", reasoning_content="sum", tool_calls=CALLS)


def test_named_templates_write_tools_reasoning_and_calls_as_text() -> None:
    render = renderer("hh", forms.byte_level())
    asked = Prompt("Q", tools=(TOOL,))
    assert render.response_text(asked, CALL) == (
        ' <think>\nsum\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    )
    prompt = render.prompt_text(asked)
    assert prompt.startswith("System: # Tools\n")
    assert '\n<tools>\n{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n' in prompt
    assert prompt.endswith("\n\nHuman: Q\n\nAssistant:")


def test_tools_join_a_system_turn_that_is_there() -> None:
    asked = Prompt([Message(role="system", content="Be kind."), Message(role="user", content="Q")], tools=(TOOL,))
    assert renderer("hh", forms.byte_level()).prompt_text(asked).startswith("System: Be kind.\n\n# Tools\n")


def test_a_chat_template_is_given_tools_and_calls() -> None:
    tokenizer = forms.byte_level(forms.CHATML)
    call = Message(role="assistant", content="", tool_calls=CALLS)
    tree = only_tree(renderer("chat", tokenizer), Demonstration("Q", call, tools=(TOOL,)))
    assert '"name": "add"' in text_of(tokenizer, tree.prompt)
    assert text_of(tokenizer, tree.responses[0]) == (
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    ((_, ids),), _ = renderer("chat", tokenizer).prompts([Prompt("Q", tools=(TOOL,))])
    assert ids == tree.prompt


@pytest.mark.parametrize(
    ("chat", "record", "what"),
    [
        (forms.ZEPHYR, Demonstration("Q", "B", tools=(TOOL,)), "the tools"),
        (forms.ZEPHYR, Preference("Q", "B", "C", tools=(TOOL,)), "the tools"),
        (forms.ZEPHYR, Demonstration("Q", CALL), "the tool calls of a response"),
        (forms.CHATML, Demonstration("Q", CALL), "the reasoning of a response"),
    ],
)
def test_a_chat_template_that_leaves_something_out_is_an_error_and_not_a_loss(
    chat: str, record: Any, what: str
) -> None:
    with pytest.raises(DataError, match=f"the chat template leaves out {what}\nhint: name a template that writes"):
        renderer("chat", forms.byte_level(chat)).trees([record])


# --- the page ------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "rendering.md"
SHOWN = turns([("Is tea hot?", "Yes."), ("Always?", "No.")])


@pytest.mark.parametrize("template", NAMED)
def test_the_page_on_rendering_shows_each_template_and_what_is_learned_of_it(template: str) -> None:
    (example,) = re.findall(rf"^```text {template}\n(.*?)\n```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    tokenizer = forms.byte_level()
    tree = only_tree(renderer(template, tokenizer, loss_on="assistant"), Demonstration(SHOWN[:-1], "No."))
    stretches: list[tuple[bool, list[int]]] = []
    mask = (*tree.prompt_mask, *[True] * len(tree.responses[0]))
    for number, counts in zip(tree.prompt + tree.responses[0], mask, strict=True):
        if not stretches or stretches[-1][0] != counts:
            stretches.append((counts, []))
        stretches[-1][1].append(number)
    texts = [(counts, text_of(tokenizer, some)) for counts, some in stretches]
    assert example == "".join(f"⟦{text}⟧" if counts else text for counts, text in texts)
