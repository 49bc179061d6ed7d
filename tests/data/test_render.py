"""One token a character, so that every expected id can be counted by hand."""

from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from fairlead.data.pack import token_batch
from fairlead.data.render import Renderer, Tree
from fairlead.errors import DataError
from fairlead.types import Demonstration, Labelled, Message, Preference, Prompt, Ranking, Text

PAD, EOS, BOS = 0, 1, 2
SPECIAL = ["<pad>", "<eos>", "<bos>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS: list[Message] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "R"},
]


def ids(text: str) -> tuple[int, ...]:
    return tuple(len(SPECIAL) + CHARACTERS.index(character) for character in text)


def tokenizer(*, habit: bool = False, chat: str | None = None, **special: str | None) -> Any:
    """Special tokens written out in a text become themselves; ``habit``: a beginning token is put before a text."""
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if habit:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"} | special
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    made.chat_template = chat
    return made


def renderer(template: str = "plain", max_length: int = 100, **options: Any) -> Renderer:
    limits = {name: options.pop(name) for name in ("max_prompt_length", "loss_on") if name in options}
    return Renderer(tokenizer(**options), template=template, max_length=max_length, **limits)


def only_tree(render: Renderer, record: Any) -> Tree:
    (tree,), kept, counts = render.trees([record])
    assert (kept, counts.kept) == ([0], 1)
    return tree


# --- templates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "one", "several", "response"),
    [
        ("plain", "Q", "SQAR", "B"),
        (
            "question-answer",
            "Question: Q\n\nAnswer:",
            "System: S\n\nQuestion: Q\n\nAnswer: A\n\nQuestion: R\n\nAnswer:",
            " B",
        ),
        ("hh", "Human: Q\n\nAssistant:", "System: S\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:", " B"),
        (
            "chat",
            "[user]Q<eos>\n[assistant]",
            "[system]S<eos>\n[user]Q<eos>\n[assistant]A<eos>\n[user]R<eos>\n[assistant]",
            "B",
        ),
    ],
)
def test_the_exact_text_of_each_template(template: str, one: str, several: str, response: str) -> None:
    render = renderer(template, chat=CHAT)
    assert render.prompt_text("Q") == render.prompt_text([{"role": "user", "content": "Q"}]) == one
    assert render.prompt_text(TURNS) == several
    assert render.response_text("Q", "B") == render.response_text(TURNS, "B") == response


@pytest.mark.parametrize("template", ["plain", "question-answer", "hh", "chat"])
def test_the_tree_holds_the_tokens_of_the_templates_text_and_one_end(template: str) -> None:
    render = renderer(template, chat=CHAT)
    tree = only_tree(render, Demonstration("Q", "B"))
    texts = {
        "plain": (ids("Q"), ids("B")),
        "question-answer": (ids("Question: Q\n\nAnswer:"), ids(" B")),
        "hh": (ids("Human: Q\n\nAssistant:"), ids(" B")),
        "chat": ((*ids("[user]Q"), EOS, *ids("\n[assistant]")), ids("B")),
    }
    prompt, response = texts[template]
    assert tree == Tree(prompt, ((*response, EOS),))


def test_auto_is_the_tokenizers_own_template_where_it_has_one() -> None:
    assert renderer("auto", chat=CHAT).template == "chat"
    assert renderer("auto").template == "plain"


def test_a_template_that_cannot_be_used_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no template 'vicuna'\nhint: there are: chat, alpaca, chatml, hash, hh, "):
        renderer("vicuna")
    with pytest.raises(DataError, match=r"loss_on='prompt' is none of response, assistant, all"):
        renderer(loss_on="prompt")
    with pytest.raises(DataError, match=r"data\.template=chat, but the tokenizer has no chat template"):
        renderer("chat")
    with pytest.raises(DataError, match="the tokenizer has no end-of-sequence token"):
        renderer(eos_token=None)


def test_a_chat_template_that_changes_the_prompt_once_it_is_answered_is_an_error() -> None:
    fickle = "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="renders a prompt differently once the response follows it"):
        renderer("chat", chat=fickle).trees([Demonstration("Q", "B")])


def test_a_chat_template_that_refuses_the_turns_is_an_error_of_the_data() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    with pytest.raises(
        DataError, match=r"refuses the turns system, user, assistant, user: no system turns\nhint: name"
    ):
        renderer("chat", chat=strict).prompts([Prompt(TURNS)])


# --- the prompt is a prefix ----------------------------------------------------------------------------------------


def merging_tokenizer() -> Any:
    """Joins `a` and `b` to one token wherever they meet."""
    inner = Tokenizer(BPE({"<eos>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def test_the_prompts_tokens_begin_the_row_also_where_the_text_would_merge_with_the_response() -> None:
    made = merging_tokenizer()
    assert made("ba").input_ids == [2, 1]
    assert made("bab").input_ids == [2, 3]  # the prompt's ids are no prefix of these
    render = Renderer(made, template="plain", max_length=10)
    tree = only_tree(render, Preference("ba", "b", "bb"))
    assert tree == Tree((2, 1), ((2, 0), (2, 2, 0)))
    assert token_batch([tree], packed=True, pad_id=0).input_ids[0, :2].tolist() == [2, 1]


@pytest.mark.parametrize("habit", [False, True])
@pytest.mark.parametrize("template", ["plain", "question-answer", "hh", "chat"])
def test_training_and_sampling_give_a_prompt_the_same_tokens(template: str, habit: bool) -> None:
    render = renderer(template, chat=CHAT, habit=habit)
    for prompt in ("Why?", TURNS):
        tree = only_tree(render, Demonstration(prompt, "Because."))
        ((kept, sampled),), _ = render.prompts([Prompt(prompt)])
        assert kept.prompt == prompt
        assert sampled == tree.prompt


# --- ends and beginnings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("response", ["B", "B<eos>", "B<eos><eos>"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_end_token_stands_once_and_is_learned(template: str, response: str) -> None:
    tree = only_tree(renderer(template, chat=CHAT), Demonstration("Q", response))
    assert tree.responses == ((*ids("B"), EOS),)
    batch = token_batch([tree], packed=True, pad_id=PAD)
    assert batch.input_ids[batch.loss_mask].tolist() == [*ids("B"), EOS]
    assert batch.counts["token"] == 2.0


def test_an_end_token_inside_a_response_is_left_where_it_is() -> None:
    tree = only_tree(renderer(), Demonstration("Q", "A<eos>B"))
    assert tree.responses == ((*ids("A"), EOS, *ids("B"), EOS),)


def test_a_chat_template_without_ends_gets_one() -> None:
    bare = CHAT.replace("{{ eos_token }}\n", "")
    tree = only_tree(renderer("chat", chat=bare), Demonstration("Q", "B"))
    assert tree == Tree(ids("[user]Q[assistant]"), ((*ids("B"), EOS),))


def test_a_response_that_was_cut_has_no_end_token() -> None:
    render = renderer(max_length=5)
    trees, _, counts = render.trees([Demonstration("QQ", "abc"), Demonstration("QQ", "ab")])
    assert [tree.responses for tree in trees] == [(ids("abc"),), ((*ids("ab"), EOS),)]
    assert (counts.kept, counts.cut) == (2, 1)


@pytest.mark.parametrize(("habit", "start"), [(False, ()), (True, (BOS,))])
def test_the_beginning_token_stands_once_where_the_tokenizer_has_the_habit(habit: bool, start: tuple[int, ...]) -> None:
    render = renderer(habit=habit)
    assert only_tree(render, Demonstration("Q", "B")) == Tree((*start, *ids("Q")), ((*ids("B"), EOS),))
    assert render.prompts([Prompt("Q")])[0][0][1] == (*start, *ids("Q"))
    assert only_tree(render, Text("T")) == Tree((), ((*start, *ids("T"), EOS),))


def test_a_text_that_begins_with_the_beginning_token_gets_no_second_one() -> None:
    render = renderer(habit=True)
    assert only_tree(render, Demonstration("<bos>Q", "B")).prompt == (BOS, *ids("Q"))
    assert render.prompts([Prompt("<bos>Q")])[0][0][1] == (BOS, *ids("Q"))


@pytest.mark.parametrize("habit", [False, True])
def test_a_template_that_writes_the_beginning_token_itself_gets_no_second_one(habit: bool) -> None:
    tree = only_tree(renderer("chat", chat="{{ bos_token }}" + CHAT, habit=habit), Demonstration("Q", "B"))
    assert tree == Tree((BOS, *ids("[user]Q"), EOS, *ids("\n[assistant]")), ((*ids("B"), EOS),))


def test_a_tokenizer_without_a_beginning_token_needs_none() -> None:
    assert only_tree(renderer(bos_token=None), Demonstration("Q", "B")) == Tree(ids("Q"), ((*ids("B"), EOS),))


def test_decoding_leaves_special_tokens_and_outer_spaces_out() -> None:
    assert renderer().decode([BOS, *ids(" a b\n"), EOS, PAD]) == "a b"


# --- limits --------------------------------------------------------------------------------------------------------


def test_prompts_longer_than_the_limit_are_dropped_and_counted() -> None:
    records = [Demonstration("Q" * length, "B") for length in (3, 4, 5, 6)]
    trees, kept, counts = renderer(max_prompt_length=4).trees(records)
    assert [len(tree.prompt) for tree in trees] == [3, 4]
    assert (kept, counts.kept, counts.cut) == ([0, 1], 2, 0)
    assert dict(counts.dropped) == {"prompt longer than 4 tokens": 2}
    prompts, counts = renderer(max_prompt_length=4).prompts([Prompt(record.prompt) for record in records])
    assert [len(row) for _, row in prompts] == [3, 4]
    assert dict(counts.dropped) == {"prompt longer than 4 tokens": 2}


@pytest.mark.parametrize("limit", [None, 5, 50])
def test_a_prompt_always_leaves_room_for_one_token(limit: int | None) -> None:
    trees, kept, counts = renderer(max_length=5, max_prompt_length=limit).trees(
        [Demonstration("Q" * 4, "B"), Demonstration("Q" * 5, "B")]
    )
    assert (kept, trees) == ([0], [Tree(ids("QQQQ"), (ids("B"),))])
    assert dict(counts.dropped) == {"prompt longer than 4 tokens": 1}


def test_the_beginning_token_counts_as_a_token_of_the_prompt() -> None:
    _, counts = renderer(max_prompt_length=4, habit=True).prompts([Prompt("QQQ"), Prompt("QQQQ")])
    assert dict(counts.dropped) == {"prompt longer than 4 tokens": 1}


def test_a_prompt_without_tokens_is_dropped_and_counted() -> None:
    trees, kept, counts = renderer().trees([Demonstration("", "B"), Demonstration("Q", "B")])
    assert (len(trees), kept, dict(counts.dropped)) == (1, [1], {"the prompt has no tokens": 1})


def test_each_side_of_a_pair_is_cut_and_the_pair_counted_once() -> None:
    trees, _, counts = renderer(max_length=4).trees([Preference("Q", "abcd", "xyz"), Preference("Q", "ab", "x")])
    assert trees == [Tree(ids("Q"), (ids("abc"), ids("xyz"))), Tree(ids("Q"), ((*ids("ab"), EOS), (*ids("x"), EOS)))]
    assert (counts.kept, counts.cut) == (2, 1)


def test_a_pair_whose_sides_are_cut_to_the_same_tokens_is_dropped_and_counted() -> None:
    records = [Preference("Q", "same beginning, good end", "same beginning, bad end"), Preference("Q", "a", "b")]
    trees, kept, counts = renderer(max_length=10).trees(records)
    assert (kept, len(trees), counts.kept, counts.cut) == ([1], 1, 1, 0)
    assert dict(counts.dropped) == {"both sides cut to the same tokens": 1}


def test_the_longer_side_of_a_pair_may_continue_the_shorter_one() -> None:
    """`ab` with its end and `abc` without differ."""
    trees, _, _ = renderer(max_length=4).trees([Preference("Q", "ab", "abc")])
    assert trees == [Tree(ids("Q"), ((*ids("ab"), EOS), ids("abc")))]


def test_plain_text_is_not_cut_and_every_token_is_a_response() -> None:
    trees, kept, counts = renderer(max_length=2).trees([Text("long text"), Text("x")])
    assert trees == [Tree((), ((*ids("long text"), EOS),)), Tree((), ((*ids("x"), EOS),))]
    assert (kept, counts.kept, counts.cut) == ([0, 1], 2, 0)


# --- rankings and labels -------------------------------------------------------------------------------------------


def test_a_ranking_is_a_tree_with_all_its_responses_in_their_order() -> None:
    tree = only_tree(renderer(), Ranking("Q", ("ab", "c", "d")))
    assert tree == Tree(ids("Q"), ((*ids("ab"), EOS), (*ids("c"), EOS), (*ids("d"), EOS)))


def test_a_ranking_of_which_two_responses_are_cut_to_the_same_tokens_is_dropped_but_equal_ones_are_not() -> None:
    records = [Ranking("Q", ("abc", "x", "abd")), Ranking("Q", ("x", "x", "y"))]
    _, kept, counts = renderer(max_length=3).trees(records)
    assert (kept, dict(counts.dropped)) == ([1], {"two responses cut to the same tokens": 1})


@pytest.mark.parametrize("template", ["plain", "hh"])
@pytest.mark.parametrize(("habit", "start"), [(False, EOS), (True, BOS)])
def test_a_labelled_text_without_a_prompt_follows_a_start_token_alone(template: str, habit: bool, start: int) -> None:
    tree = only_tree(renderer(template, habit=habit), Labelled("", "good film", True))
    assert tree == Tree((start,), ((*ids("good film"), EOS),))
    assert token_batch([tree], packed=True, pad_id=PAD).counts == {"token": 10.0, "sequence": 1.0}


def test_a_labelled_response_to_a_prompt_is_rendered_as_any_other() -> None:
    record = Labelled("Q", "B", False)
    assert only_tree(renderer("hh"), record) == only_tree(renderer("hh"), Demonstration("Q", "B"))


def test_what_is_learned_of_a_prompt_is_said_of_demonstrations_alone() -> None:
    for record in (Preference(TURNS, "B", "C"), Ranking(TURNS, ("B", "C")), Labelled(TURNS, "B", True)):
        assert only_tree(renderer("hh", loss_on="all"), record).prompt_mask == ()


def test_an_earlier_answer_ends_as_the_model_would_have_ended_it_but_its_end_is_no_text() -> None:
    render = renderer("hh", loss_on="assistant", max_length=200)
    tree = only_tree(render, Demonstration(TURNS, "B"))
    assert tree.prompt == (
        *ids("System: S\n\nHuman: Q\n\nAssistant: A"), EOS, *ids("\n\nHuman: R\n\nAssistant:")
    )  # fmt: skip
    start = len("System: S\n\nHuman: Q\n\nAssistant:")
    assert [i for i, counts in enumerate(tree.prompt_mask) if counts] == [start, start + 1, start + 2]
    batch = token_batch([tree], packed=True, pad_id=PAD)
    assert batch.input_ids[batch.loss_mask].tolist() == [*ids(" A"), EOS, *ids(" B"), EOS]


def test_nothing_left_is_an_error_that_says_what_was_dropped() -> None:
    with pytest.raises(DataError) as caught:
        renderer(max_length=9, max_prompt_length=1).trees([Demonstration("QQ", "B"), Demonstration("", "B")])
    assert "no record is left to learn from at max_length=9, max_prompt_length=1" in str(caught.value)
    assert "{'prompt longer than 1 tokens': 1, 'the prompt has no tokens': 1}" in str(caught.value)
    assert "hint: raise data.max_length" in str(caught.value)
    with pytest.raises(DataError, match="no record is left"):
        renderer(max_prompt_length=1).prompts([Prompt("QQ")])
    with pytest.raises(DataError, match="no record is left"):
        renderer(max_length=3).trees([Preference("Q", "abc", "abd")])


def test_the_number_of_tokens_counts_a_shared_prompt_once() -> None:
    assert Tree((5, 6, 7), ((8,), (9, 10))).num_tokens == 6
