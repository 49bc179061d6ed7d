"""Sequence classifiers of transformers as rewards, against transformers' own text-classification pipeline."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CPU, tokenizer

from fairlead.data.render import Renderer
from fairlead.errors import ConfigError, ModelError
from fairlead.rollout.rewards import ClassifierReward, LabelReward, open_model, open_reward
from fairlead.types import Prompt, Rollout

TEXTS = ["the lamp flickers", "loose", "why does the lamp flicker: the fuse is loose, the lamp is loose"]
SAMPLES = [f"Question: why?\n\nAnswer: {text}" for text in TEXTS]
TRAINING = ["Question: why does the lamp flicker?\n\nAnswer: the fuse is loose."] * 20
SENTIMENTS = {0: "NEGATIVE", 1: "POSITIVE"}


@functools.cache
def _word_pieces() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(vocab_size=80, special_tokens=names, show_progress=False)
    )
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def _bert_tokenizer(longest: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_word_pieces(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
    )


def _roberta_tokenizer() -> Any:
    """Without a limit of its own: the model's positions are the limit."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(TRAINING, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )


def _save(folder: Path, config: Any, tokens: Any) -> str:
    """A classifier of random weights, large enough that texts differ."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


def _distilbert(folder: Path, longest: int = 64, **config: Any) -> str:
    from transformers import DistilBertConfig

    sizes = {"vocab_size": 80, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}
    return _save(folder, DistilBertConfig(**sizes, **config), _bert_tokenizer(longest))


def _roberta(folder: Path, **config: Any) -> str:
    from transformers import RobertaConfig

    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    made = RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=22, type_vocab_size=1, **config)
    return _save(folder, made, _roberta_tokenizer())


def _decoder(folder: Path, **config: Any) -> str:
    from transformers import LlamaConfig

    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    made = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, **config)
    return _save(folder, made, tokenizer())


def _pipeline(place: str, label: str, function: str | None = None, **options: Any) -> list[float]:
    from transformers import pipeline

    made: Any = pipeline("text-classification", place, top_k=None, device="cpu")
    found: Any = made(SAMPLES, truncation=True, function_to_apply=function, **options)
    return [next(each["score"] for each in of_text if each["label"] == label) for of_text in found]


def _open(source: Any) -> Any:
    return open_reward(source, Renderer(tokenizer(), template="question-answer", max_length=128), device=CPU)


def _score(source: Any) -> list[float]:
    rollouts = [Rollout(Prompt("why?"), (3,), (4, 1), (-1.0, -1.0), True, text) for text in TEXTS]
    return list(_open(source)(rollouts).values)


def _close(got: list[float], wanted: list[float]) -> bool:
    assert max(wanted) - min(wanted) > 1e-3
    return got == pytest.approx(wanted, abs=1e-5)


def test_a_label_of_distilbert_is_its_probability_or_its_logit(tmp_path: Path) -> None:
    place = _distilbert(tmp_path, id2label=SENTIMENTS)
    positive = _score({"path": place, "label": "POSITIVE"})
    assert _close(positive, _pipeline(place, "POSITIVE"))
    assert _close(_score({"path": place, "label": "NEGATIVE"}), [1 - value for value in positive])
    assert _close(_score({"path": place, "label": "POSITIVE", "use": "logit"}), _pipeline(place, "POSITIVE", "none"))
    assert _close(_score({"path": place, "label": "POSITIVE", "batch_size": 1}), positive)


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(tmp_path: Path) -> None:
    labels = {0: "toxic", 1: "rude", 2: "kind"}
    place = _roberta(tmp_path, id2label=labels, problem_type="multi_label_classification")
    for label in labels.values():
        assert _close(_score({"path": place, "label": label}), _pipeline(place, label, max_length=20))


def test_a_classifier_of_one_label_gives_its_logit_or_the_sigmoid(tmp_path: Path) -> None:
    place = _distilbert(tmp_path, num_labels=1)
    assert _close(_score(place), _pipeline(place, "LABEL_0", "none"))
    assert _close(_score({"path": place, "use": "probability"}), _pipeline(place, "LABEL_0"))


def test_a_regression_gives_its_number(tmp_path: Path) -> None:
    place = _distilbert(tmp_path, id2label={0: "helpful", 1: "harmless"}, problem_type="regression")
    assert _close(_score({"path": place, "label": "harmless"}), _pipeline(place, "harmless"))


def test_a_text_is_cut_at_the_tokenizers_limit_the_models_or_ones_own(tmp_path: Path) -> None:
    short = _distilbert(tmp_path / "short", longest=16, id2label=SENTIMENTS)
    whole = _distilbert(tmp_path / "whole", id2label=SENTIMENTS)
    source = {"path": short, "label": "POSITIVE"}
    assert _close(_score(source), _pipeline(short, "POSITIVE"))
    assert abs(_score(source)[2] - _score({"path": whole, "label": "POSITIVE"})[2]) > 1e-4
    assert _close(_score({"path": whole, "label": "POSITIVE", "max_length": 16}), _score(source))
    roberta = _roberta(tmp_path / "roberta", id2label=SENTIMENTS)
    assert len(_roberta_tokenizer()(SAMPLES[2]).input_ids) > 20  # 22 positions, of which the first two hold no token
    assert _close(_score({"path": roberta, "label": "POSITIVE"}), _pipeline(roberta, "POSITIVE", max_length=20))


def test_a_decoder_with_labels_is_read_as_the_pipeline_reads_it(tmp_path: Path) -> None:
    place = _decoder(tmp_path, id2label=SENTIMENTS)
    assert isinstance(_open({"path": place, "label": "POSITIVE"}), LabelReward)
    assert _close(_score({"path": place, "label": "POSITIVE"}), _pipeline(place, "POSITIVE"))


def test_a_decoder_of_one_label_is_read_at_its_end_of_sequence_unless_it_is_asked_as_a_classifier(
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForSequenceClassification

    place = _decoder(tmp_path, num_labels=1)
    assert isinstance(_open(place), ClassifierReward)
    model = AutoModelForSequenceClassification.from_pretrained(place)
    with torch.no_grad():  # the plain template: the prompt, then the response
        rows = [[*tokenizer()(f"why?{text}").input_ids, tokenizer().eos_token_id] for text in TEXTS]
        wanted = [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]
    assert _close(_score(place), wanted)
    assert _close(_score({"path": place, "use": "logit"}), _pipeline(place, "LABEL_0", "none"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"(?s)label does not say which of the labels is the score of .*: NEGATIVE, POSITIVE.*label=POSITIVE"),
        ({"label": "POSITVE"}, r"(?s)label=POSITVE is none of the labels of .*did you mean 'POSITIVE'"),
        ({"label": "POSITIVE", "combine": "mean"}, "combine has no effect on .*: it is a classifier"),
        ({"label": "POSITIVE", "disagreement_weight": 1}, "disagreement_weight has no effect on"),
    ],
)
def test_a_label_must_be_one_of_the_classifiers(tmp_path: Path, options: dict, said: str) -> None:
    place = _distilbert(tmp_path, id2label=SENTIMENTS)
    with pytest.raises(ConfigError, match=said):
        _score({"path": place} | options)


def test_a_classifier_is_no_reward_model_to_score_data_with(tmp_path: Path) -> None:
    place = _distilbert(tmp_path, id2label=SENTIMENTS)
    with pytest.raises(ModelError, match="is a distilbert classifier, which does not read at the last token"):
        open_model(place, device=CPU)
