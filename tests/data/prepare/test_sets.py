"""The published sets: small ones written here, and the real ones, whose figures were counted by other programs."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tests.data.prepare.raw import data_folder, every_row_loads, outputs, rows

from fairlead.data.prepare import KINDS, describe_kinds, prepare
from fairlead.data.sources import write_jsonl
from fairlead.errors import ConfigError, DataError


def silent(text: str) -> None:
    """Nobody listens."""


def prompts(folder: Path, *names: str) -> set[str]:
    return {json.dumps(row["prompt"]) for name in names for row in rows(folder, name)}


# --- what every set shares


def problems(path: Path, numbers: range) -> Path:
    write_jsonl(path, [{"question": f"What is {n} + 1?", "answer": f"It is\n#### {n + 1}"} for n in numbers])
    return path


def test_the_publishers_test_part_is_held_out_and_not_trained_on(tmp_path: Path) -> None:
    problems(tmp_path / "gsm8k" / "train.jsonl", range(6))
    problems(tmp_path / "gsm8k" / "test.jsonl", range(4, 8))
    counts = prepare("gsm8k", tmp_path / "gsm8k", tmp_path / "out", say=silent)["counts"]
    assert rows(tmp_path / "out", "prompts") == [
        {"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(4)
    ]
    assert outputs(tmp_path / "out") == {"heldout_prompts": 4, "heldout_sft": 4, "prompts": 4, "sft": 4}
    assert (counts["read"], counts["kept"], counts["dropped"]) == (10, 8, {"also held out": 2})
    assert counts["left_out_as_held_out"] == {"prompts": 2, "sft": 2}


def test_without_a_test_part_a_share_of_the_prompts_is_held_out(tmp_path: Path) -> None:
    path = problems(tmp_path / "train.jsonl", range(1000))
    manifest = prepare("gsm8k", path, tmp_path / "out", say=silent)
    assert manifest["options"]["heldout"] is None
    splits = manifest["counts"]["splits"]
    assert 22 < splits["heldout"] < 78  # 50 expected, standard deviation 7
    assert splits["train"] + splits["heldout"] == 1000
    assert not prompts(tmp_path / "out", "sft", "prompts") & prompts(tmp_path / "out", "heldout_sft")


def test_a_share_that_is_asked_for_ignores_the_publishers_parts(tmp_path: Path) -> None:
    problems(tmp_path / "gsm8k" / "train.jsonl", range(200))
    problems(tmp_path / "gsm8k" / "test.jsonl", range(200, 300))
    splits = prepare("gsm8k", tmp_path / "gsm8k", tmp_path / "out", heldout=0.5, say=silent)["counts"]["splits"]
    assert 110 < splits["heldout"] < 190  # 150 expected, standard deviation 9
    assert splits["train"] + splits["heldout"] == 300


def test_a_set_of_parts_must_be_whole(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    table = pyarrow.table({"instruction": ["Say hi."], "input": [""], "output": ["Hi."], "text": ["..."]})
    parquet.write_table(table, folder / "train-00000-of-00002-a09b.parquet")
    with pytest.raises(DataError, match=r"data holds 1 of the 2 parts of train-\*"):
        prepare("alpaca", folder, tmp_path / "out", say=silent)
    parquet.write_table(table, folder / "train-00001-of-00002-77f1.parquet")
    counts = prepare("alpaca", folder, tmp_path / "out", heldout=0.0, say=silent)["counts"]
    assert (counts["read"], counts["dropped"]) == (2, {"duplicate": 1})
    assert rows(tmp_path / "out", "sft") == [{"prompt": "Say hi.", "response": "Hi."}]


def test_each_kind_names_its_source_its_licence_and_its_options() -> None:
    described = {kind["name"]: kind for kind in describe_kinds()}
    assert described.keys() == KINDS.keys()
    assert described["imdb"]["hub"] == "stanfordnlp/imdb"
    assert {name for name, kind in described.items() if kind["research_only"]} == {"imdb", "alpaca", "alpaca-eval"}
    assert all(kind["licence"] for kind in described.values())
    assert [option["name"] for option in described["ultrafeedback"]["options"]] == ["heldout", "min_margin"]
    assert described["ultrafeedback"]["options"][1]["help"].startswith("Pairs whose scores differ by less")


def test_an_option_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = problems(tmp_path / "train.jsonl", range(3))
    with pytest.raises(ConfigError, match=r"heldout: .*got -1"):
        prepare("gsm8k", path, tmp_path / "out", heldout=-1)
    with pytest.raises(ConfigError, match=r"calculations: .*boolean.*got 'maybe'"):
        prepare("gsm8k", path, tmp_path / "out", calculations="maybe")
    with pytest.raises(ConfigError, match=r"prompt_words: .*got 0"):
        prepare("imdb", path, tmp_path / "out", prompt_words=0)


# --- gsm8k


def test_the_final_number_stands_beside_the_prompt(tmp_path: Path) -> None:
    answers = ["7 * 2 = <<7*2=14>>14\n#### 14", "He has $<<1000+80=1080>>1,080\n#### 1,080 ", "none", "#### \n"]
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [{"question": f"q{n}", "answer": answer} for n, answer in enumerate(answers)])
    counts = prepare("gsm8k", path, tmp_path / "out", heldout=0.0, calculations=False, say=silent)["counts"]
    assert rows(tmp_path / "out", "prompts") == [{"prompt": "q0", "answer": "14"}, {"prompt": "q1", "answer": "1080"}]
    assert rows(tmp_path / "out", "sft") == [
        {"prompt": "q0", "response": "7 * 2 = 14\n#### 14"},
        {"prompt": "q1", "response": "He has $1,080\n#### 1,080 "},
    ]
    assert counts["dropped"] == {"no final answer after ####": 2}


def test_gsm8k_as_published(tmp_path: Path) -> None:
    folder, out = data_folder("gsm8k"), tmp_path / "out"
    said: list[str] = []
    manifest = prepare("gsm8k", folder, out, say=said.append)
    # wc -l gives 4000 and 500; example_model_solutions.jsonl is none of the set
    assert outputs(out) == {"heldout_prompts": 500, "heldout_sft": 500, "prompts": 4000, "sft": 4000}
    assert manifest["counts"]["dropped"] == {}
    assert every_row_loads(out)
    assert [entry["path"] for entry in manifest["inputs"]] == ["gsm8k/test.jsonl", "gsm8k/train.jsonl"]
    assert [entry["published"] for entry in manifest["inputs"]] == [False, False]  # cut to a part
    assert len(said) == 2 and "is not the published file" in said[0]
    published = (json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").split("\n") if line)
    wanted = [row["answer"].split("#### ")[1].replace(",", "") for row in published]
    assert [row["answer"] for row in rows(out, "prompts")] == wanted
    assert all(re.fullmatch(r"-?[\d.]+", number) for number in wanted)


# --- reviews


def archive(path: Path, reviews: dict[str, str]) -> Path:
    source = path.parent / "reviews"
    for name, text in reviews.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, "utf-8")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, "aclImdb")
    return path


REVIEWS = {
    "train/pos/0_9.txt": "A film<br /><br />for all of us.",
    "train/neg/1_2.txt": "Wait\x85 no \x96 not this.",
    "train/neg/2_2.txt": "Wait\x85 no \x96 not this.",
    "train/unsup/3_0.txt": "Nobody has said.",
    "test/pos/0_8.txt": "A film\nfor all but me.",
}


def test_reviews_are_mended_and_labelled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    counts = prepare("imdb", archive(tmp_path / "aclImdb_v1.tar.gz", REVIEWS), out, say=silent)["counts"]
    assert {row["response"]: row["label"] for row in rows(out, "labelled")} == {
        "A film\n\nfor all of us.": True,
        "Wait… no \u2013 not this.": False,
    }
    assert {row["text"] for row in rows(out, "pretrain")} == {
        "A film\n\nfor all of us.",
        "Wait… no \u2013 not this.",
        "Nobody has said.",
    }
    assert rows(out, "heldout_labelled") == [{"prompt": "", "response": "A film\nfor all but me.", "label": True}]
    assert rows(out, "heldout_prompts") == [{"prompt": "A film\nfor all"}]
    assert rows(out, "heldout_sft") == [{"prompt": "A film\nfor all", "response": " but me."}]
    assert {row["prompt"] for row in rows(out, "prompts")} == {"Wait… no \u2013 not", "A film\n\nfor all"}
    assert (counts["read"], counts["dropped"]) == (5, {"duplicate": 1})
    assert counts["notes"] == {
        "<br /> made line ends": 1,
        "control characters read as Windows-1252": 1,
        "without a label, text alone": 1,
    }


def test_a_prompt_is_the_first_words_and_none_that_is_held_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tar = archive(tmp_path / "aclImdb_v1.tar.gz", REVIEWS)
    counts = prepare("imdb", tar, out, prompt_words=2, say=silent)["counts"]
    assert rows(out, "heldout_prompts") == [{"prompt": "A film"}]
    assert rows(out, "prompts") == [{"prompt": "Wait… no"}]
    assert counts["left_out_as_held_out"] == {"prompts": 1, "sft": 1}
    assert len(rows(out, "labelled")) == 2


def test_the_first_and_the_last_words_of_a_review_are_labelled(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reviews = {"train/pos/0_9.txt": "one two  three four five", "train/neg/1_2.txt": "short", "test/pos/2_8.txt": "a b"}
    tar = archive(tmp_path / "aclImdb_v1.tar.gz", reviews)
    prepare("imdb", tar, out, passage_words=2, say=silent)
    assert {(row["response"], row["label"]) for row in rows(out, "labelled")} == {
        ("one two", True),
        ("four five", True),
        ("short", False),
    }
    assert rows(out, "heldout_labelled") == [{"prompt": "", "response": "a b", "label": True}]


def test_the_hubs_parquet_gives_what_the_archive_gives(tmp_path: Path) -> None:
    labels = {"pos": 1, "neg": 0, "unsup": -1}
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "unsupervised": []}
    for name, text in REVIEWS.items():
        split, label, _ = name.split("/")
        parts["unsupervised" if label == "unsup" else split].append({"text": text, "label": labels[label]})
    for name, part in parts.items():
        (tmp_path / "hub").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / "hub" / f"{name}-00000-of-00001.parquet")
    prepare("imdb", tmp_path / "hub", tmp_path / "one", say=silent)
    prepare("imdb", archive(tmp_path / "aclImdb_v1.tar.gz", REVIEWS), tmp_path / "two", say=silent)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")
    for name in outputs(tmp_path / "one"):
        assert sorted(map(json.dumps, rows(tmp_path / "one", name))) == sorted(
            map(json.dumps, rows(tmp_path / "two", name))
        )


def test_imdb_as_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = data_folder("imdb") / "aclImdb_v1.tar.gz"
    counts = prepare("imdb", path, out, say=silent)["counts"]
    reviews: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    with tarfile.open(path) as tar:
        for member in tar:
            if match := re.fullmatch(r"aclImdb/(train|test)/(pos|neg|unsup)/[^/]*\.txt", member.name):
                file = tar.extractfile(member)
                assert file is not None
                reviews[match[1]].append((match[2], mended(file.read().decode("utf-8"))))
    assert {name: len(part) for name, part in reviews.items()} == {"train": 4100, "test": 2000}
    texts = {name: {text for _, text in part} for name, part in reviews.items()}
    assert not texts["train"] & texts["test"]
    assert counts["read"] == 6100
    assert counts["dropped"] == {"duplicate": 4100 + 2000 - 4090 - 1998} == {"duplicate": 12}
    assert {row["text"] for row in rows(out, "pretrain")} == texts["train"]
    assert {row["text"] for row in rows(out, "heldout_pretrain")} == texts["test"]
    labelled = {(row["response"], row["label"]) for row in rows(out, "labelled")}
    assert labelled == {(text, label == "pos") for label, text in reviews["train"] if label != "unsup"}
    first = {name: {first_words(text) for label, text in part if label != "unsup"} for name, part in reviews.items()}
    assert {row["prompt"] for row in rows(out, "heldout_prompts")} == first["test"]
    assert {row["prompt"] for row in rows(out, "prompts")} == first["train"] - first["test"]
    assert "\x85" not in (out / "pretrain.jsonl").read_text("utf-8")
    assert every_row_loads(out)
    assert "<br" not in (out / "pretrain.jsonl").read_text("utf-8")


def mended(text: str) -> str:
    """The same by another way: byte by byte, tag by tag."""
    windows = {chr(code): bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
    text = "".join(windows.get(character, character) for character in text)
    return "\n".join(line.strip(" \t") for line in text.split("<br />")).strip()


def first_words(text: str) -> str:
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text[: ends[3]] if len(ends) > 3 else text


def test_rt_polarity_as_published(tmp_path: Path) -> None:
    folder, out = data_folder("rt-polarity"), tmp_path / "out"
    counts = prepare("rt-polarity", folder, out, say=silent)["counts"]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (8000, 8000, {})
    # iconv -f WINDOWS-1252 reads them; grep -c -P '[\x80-\xff]' counts 72 and 73 lines
    assert counts["notes"] == {"lines decoded as cp1252": 145}
    both = rows(out, "labelled") + rows(out, "heldout_labelled")
    for label in ("pos", "neg"):
        lines = (folder / f"rt-polarity.{label}").read_bytes().decode("cp1252").split("\n")[:-1]
        assert Counter(row["response"] for row in both if row["label"] == (label == "pos")) == Counter(
            line.strip() for line in lines
        )
    assert 330 < counts["splits"]["heldout"] < 470  # 400 expected, standard deviation 19
    assert not prompts(out, "prompts", "sft") & prompts(out, "heldout_prompts", "heldout_sft")
    assert every_row_loads(out)


# --- pairs


def test_ties_equal_and_empty_answers_are_no_pairs(tmp_path: Path) -> None:
    def row(chosen: str, rejected: str, better: float, worse: float) -> dict[str, Any]:
        return {
            "prompt": f"p {chosen} {better}",
            "chosen": [{"role": "user", "content": f"p {chosen} {better}"}, {"role": "assistant", "content": chosen}],
            "rejected": [
                {"role": "user", "content": f"p {chosen} {better}"},
                {"role": "assistant", "content": rejected},
            ],
            "score_chosen": better,
            "score_rejected": worse,
        }

    given = [row("a", "b", 8, 3), row("a", "b", 4, 3.5), row("c", "d", 5, 5), row("e", "e", 6, 5), row("f", "", 7, 1)]
    (tmp_path / "data").mkdir()
    table = pyarrow.Table.from_pylist(given)
    parquet.write_table(table, tmp_path / "data" / "train_prefs-00000-of-00001.parquet")
    parquet.write_table(table, tmp_path / "data" / "train_sft-00000-of-00001.parquet")  # the same prompts again
    out = tmp_path / "out"
    counts = prepare("ultrafeedback", tmp_path / "data", out, heldout=0.0, min_margin=1.0, say=silent)["counts"]
    (only,) = rows(out, "preference")
    assert (only["chosen"], only["rejected"], only["margin"]) == ("a", "b", 5.0)
    assert counts["read"] == 5
    assert counts["dropped"] == {
        "chosen equal to rejected": 1,
        "empty answer": 1,
        "margin below min_margin": 1,
        "tie": 1,
    }


def test_ultrafeedback_as_published(tmp_path: Path) -> None:
    folder, out = data_folder("ultrafeedback"), tmp_path / "out"
    counts = prepare("ultrafeedback", folder, out, say=silent)["counts"]
    # By jq: of 700 + 80 rows 3 have equal answers (2 of them tied too), 1 an empty one, 88 others a tie
    assert (counts["read"], counts["kept"]) == (780, 688)
    assert counts["dropped"] == {"chosen equal to rejected": 3, "empty answer": 1, "tie": 88}
    assert outputs(out) == {
        **dict.fromkeys(("preference", "prompts", "sft"), 624),
        **dict.fromkeys(("heldout_preference", "heldout_prompts", "heldout_sft"), 64),
    }
    assert counts["notes"]["special token written as text"] == 3
    assert every_row_loads(out)


def test_stack_exchange_paired_serves_a_stage_a_folder(tmp_path: Path) -> None:
    for folder in ("finetune", "reward", "rl", "evaluation"):
        given = [
            {"qid": number, "question": f"{folder} {number}", "response_j": f"good {number}", "response_k": "bad"}
            for number in range(3)
        ]
        (tmp_path / "data" / folder).mkdir(parents=True)
        table = pyarrow.Table.from_pylist([row | {"metadata": ["https://a.example/q/1"]} for row in given])
        parquet.write_table(table, tmp_path / "data" / folder / "train-00000-of-00001.parquet")
    out = tmp_path / "out"
    counts = prepare("stack-exchange-paired", tmp_path, out, say=silent)["counts"]
    assert outputs(out) == {
        **{"heldout_preference": 3, "heldout_prompts": 3, "heldout_sft": 3},
        **{"preference": 3, "prompts": 3, "sft": 3},
    }
    origin = {"qid": 1, "metadata": ["https://a.example/q/1"]}
    assert rows(out, "sft")[1] == {"prompt": "finetune 1", "response": "good 1", **origin}
    assert rows(out, "preference")[1] == {"prompt": "reward 1", "chosen": "good 1", "rejected": "bad", **origin}
    assert rows(out, "prompts")[1] == {"prompt": "rl 1", **origin}
    assert counts["splits"] == {"heldout": 3, "train": 9}


def test_the_paired_fixture_is_prepared_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    counts = prepare("stack-exchange-paired", data_folder("torchtune"), out, heldout=0.0, say=silent)["counts"]
    # 25 rows of 8 questions with 16 different better answers
    assert (counts["read"], counts["kept"]) == (25, 25)
    assert outputs(out) == {"preference": 25, "prompts": 8, "sft": 16}
    assert every_row_loads(out)


def test_alpaca_eval_as_published(tmp_path: Path) -> None:
    folder, out = data_folder("alpaca_eval"), tmp_path / "out"
    counts = prepare("alpaca-eval", folder, out, say=silent)["counts"]
    judged = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text("utf-8"))]
    preferences = [row["preference"] for row in judged]
    assert counts["read"] == len(judged) == 469 + 469 + 330 + 150
    assert counts["dropped"]["not judged"] == preferences.count(None) == 2
    assert counts["dropped"]["tie"] == sum(p in (0, 1.5) for p in preferences) == 12
    assert counts["kept"] + sum(counts["dropped"].values()) == len(judged)
    assert not prompts(out, "preference", "sft") & prompts(out, "heldout_preference", "heldout_sft")
    assert every_row_loads(out)


# --- demonstrations


def test_alpaca_as_published(tmp_path: Path) -> None:
    folder, out = data_folder("alpaca"), tmp_path / "out"
    counts = prepare("alpaca", folder, out, say=silent)["counts"]
    assert (counts["read"], counts["kept"], counts["dropped"]) == (104 + 884 + 2359, 3347, {})
    published = [row for file in folder.glob("alpaca_data*.json") for row in json.loads(file.read_text("utf-8"))]
    answers = Counter(row["response"] for name in ("sft", "heldout_sft") for row in rows(out, name))
    assert answers == Counter(row["output"] for row in published)
    assert not prompts(out, "sft", "prompts") & prompts(out, "heldout_sft", "heldout_prompts")
    assert every_row_loads(out)
    assert 120 < counts["splits"]["heldout"] < 215  # 167 expected, standard deviation 12.6


# --- text


def test_text_is_cut_into_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"Paragraph {number}." for number in range(400)), "utf-8")
    out = tmp_path / "out"
    manifest = prepare("text", tmp_path / "a.txt", out, max_characters=30, heldout=0.1, say=silent)
    both = rows(out, "pretrain") + rows(out, "heldout_pretrain")
    assert all(len(row["text"]) <= 30 for row in both)
    assert sorted("\n\n".join(row["text"] for row in both).split("\n\n")) == sorted(
        f"Paragraph {number}." for number in range(400)
    )
    assert manifest["counts"]["splits"]["heldout"] == len(rows(out, "heldout_pretrain")) > 5


@pytest.mark.parametrize("name", ["gutenberg", "tinyshakespeare", "wikitext-2", "tinystories", "wikipedia"])
def test_published_text_is_kept_whole(tmp_path: Path, name: str) -> None:
    folder, out = data_folder("text") / name, tmp_path / "out"
    prepare("text", folder, out, heldout=0.0, say=silent)
    kept = "".join(character for row in rows(out, "pretrain") for character in row["text"] if not character.isspace())
    share = len(kept.encode()) / sum(visible(file) for file in folder.glob("*.txt"))
    # The Gutenberg licence is 19 kB of each of 7 books of 2.99 MB; equal paragraphs are not merged, documents are.
    assert 0.93 < share <= 1.0 if name == "gutenberg" else 0.999 < share <= 1.0


def visible(file: Path) -> int:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    return len("".join(text.split()).encode())


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("gsm8k", {"question": 3, "answer": "#### 1"}),
        ("alpaca", {"instruction": "a", "input": "b"}),
        ("ultrafeedback", {"prompt": "a", "chosen": "b"}),
    ],
)
def test_a_row_that_is_none_of_the_set_is_named(tmp_path: Path, kind: str, given: dict[str, Any]) -> None:
    names: dict[str, Callable[[str], str]] = {"alpaca": lambda name: f"alpaca_data_{name}.json"}
    path = tmp_path / names.get(kind, lambda name: f"{name}.jsonl")("train")
    path.write_text(json.dumps(given) + "\n")
    with pytest.raises(DataError, match=rf"{path.name}:1"):
        prepare(kind, path, tmp_path / "out", say=silent)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
