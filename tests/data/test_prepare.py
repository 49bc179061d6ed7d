import errno
import gzip
import json
import os
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from fairlead.data.prepare import MANIFEST, OUTPUTS, prepare
from fairlead.data.sources import write_jsonl
from fairlead.data.splits import fold_of, keyed_hash, split_of
from fairlead.errors import ConfigError, DataError

HELDOUT = ("heldout_sft.jsonl", "heldout_preference.jsonl", "heldout_prompts.jsonl")


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().split("\n")[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def data_folder(name: str) -> Path:
    folder = Path(os.environ.get("FAIRLEAD_DATA", "")) / name
    if not os.environ.get("FAIRLEAD_DATA") or not folder.exists():
        pytest.skip(f"FAIRLEAD_DATA names no folder with {name}")
    return folder


# --- splits


def test_the_hash_is_blake2b_of_a_json_list() -> None:
    # printf '[0, "a"]' | b2sum -l 64
    assert keyed_hash(0, "a") == 0x59F78A8C3662F0A7
    assert keyed_hash(7, "split", "café") == 0xF13D0EB493DA59B3
    assert keyed_hash(0, "\ud83d") != keyed_hash(0, "a", "b") != keyed_hash(0, "ab")


def test_splits_are_drawn_in_proportion() -> None:
    shares = {"a": 0.5, "none": 0.0, "b": 0.3, "c": 0.2}
    drawn = Counter(split_of(f"prompt {number}", shares, seed=3) for number in range(10_000))
    # Standard deviations are 50, 46 and 40.
    assert abs(drawn["a"] - 5000) < 250
    assert abs(drawn["b"] - 3000) < 230
    assert abs(drawn["c"] - 2000) < 200
    assert drawn["none"] == 0


def test_a_key_has_one_split_and_another_seed_another_draw() -> None:
    shares = {"a": 0.5, "b": 0.5}
    keys = [f"prompt {number}" for number in range(64)]
    first = [split_of(key, shares, seed=0) for key in keys]
    assert first == [split_of(key, shares, seed=0) for key in keys]
    assert first != [split_of(key, shares, seed=1) for key in keys]


def test_folds_are_even_and_do_not_follow_the_splits() -> None:
    keys = [f"prompt {number}" for number in range(6000)]
    drawn = Counter((fold_of(key, 3, seed=0), split_of(key, {"a": 0.5, "b": 0.5}, seed=0)) for key in keys)
    assert len(drawn) == 6
    assert all(abs(number - 1000) < 150 for number in drawn.values())  # deviation 29


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="at least 0 and sum to 1"):
        split_of("key", shares, seed=0)
    with pytest.raises(ConfigError, match="folds must be at least 1"):
        fold_of("key", 0, seed=0)


# --- hh-rlhf


def hh_file(path: Path, *pairs: tuple[str, str, str]) -> Path:
    lines = [{"chosen": f"{p} {chosen}", "rejected": f"{p} {rejected}"} for p, chosen, rejected in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def question(*turns: str) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns)) + "\n\nAssistant:"


def many_hh(path: Path) -> Path:
    """A hundred conversations, each cut into two prompts, each prompt with two pairs."""
    prompts = [
        question(*turns)
        for number in range(100)
        for turns in ((f"q{number}",), (f"q{number}", "yes?", f"more {number}"))
    ]
    return hh_file(path, *((p, f"good {i}", f"bad {i}") for p in prompts for i in range(2)))


USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(("heldout", "prefix"), [(0.0, ""), (1.0, "heldout_")])
def test_hh_pairs_serve_every_stage(tmp_path: Path, heldout: float, prefix: str) -> None:
    path = hh_file(
        tmp_path / "hh.jsonl.gz",
        (question("Hi"), "Hello", "Go"),
        (question("Hi"), "Hello", "Away"),
        (question("Hi"), "", "Go"),
    )
    out = tmp_path / "out"
    manifest = prepare("hh-rlhf", path, out, heldout=heldout)
    assert rows(out, f"{prefix}sft.jsonl") == [{"prompt": USER, "response": "Hello"}]
    assert rows(out, f"{prefix}preference.jsonl") == [
        {"prompt": USER, "chosen": "Hello", "rejected": "Go"},
        {"prompt": USER, "chosen": "Hello", "rejected": "Away"},
    ]
    assert rows(out, f"{prefix}prompts.jsonl") == [{"prompt": USER}]
    pretrain = [] if prefix else [{"text": "Human: Hi\n\nAssistant: Hello"}]
    assert rows(out, "pretrain.jsonl") == pretrain
    others = {*OUTPUTS} - {"pretrain.jsonl", *(f"{prefix}{name[8:]}" for name in HELDOUT)}
    assert all((out / name).read_bytes() == b"" for name in others)

    merged = {f"{prefix}sft.jsonl": 1, f"{prefix}prompts.jsonl": 1}
    assert manifest["counts"] == {
        "read": 3,
        "kept": 2,
        "dropped": {"empty answer": 1},
        "notes": {},
        "splits": {"heldout" if prefix else "train": 2},
        "equal_rows_merged": merged if prefix else {"pretrain.jsonl": 1, **merged},
    }
    assert manifest == json.loads((out / MANIFEST).read_bytes())
    assert manifest["options"] == {"heldout": heldout, "pretrain_on_chosen": True}
    assert {name: output["rows"] for name, output in manifest["outputs"].items()} == {
        name: len(rows(out, name)) for name in OUTPUTS
    }


def first_turns(folder: Path, names: tuple[str, ...]) -> set[str]:
    return {row["prompt"][0]["content"] for name in names for row in rows(folder, name)}


def test_no_hh_conversation_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare("hh-rlhf", many_hh(tmp_path / "hh.jsonl.gz"), out)
    heldout = first_turns(out, HELDOUT)
    train = first_turns(out, ("sft.jsonl", "preference.jsonl", "prompts.jsonl"))
    assert not train & heldout
    assert len(train) + len(heldout) == 100
    assert 5 < len(heldout) < 26  # 15 expected, standard deviation 3.6
    texts = [row["text"] for row in rows(out, "pretrain.jsonl")]
    assert len(texts) == 4 * len(train)
    assert {text.split("\n")[0].removeprefix("Human: ") for text in texts} == train
    assert manifest["counts"]["splits"] == {"train": 4 * len(train), "heldout": 4 * len(heldout)}


def test_hh_files_of_a_folder_are_read_in_order_without_the_red_team(tmp_path: Path) -> None:
    root = tmp_path / "hh"
    hh_file(root / "b" / "test.jsonl.gz", (question("two"), "x", "y"))
    hh_file(root / "a" / "train.jsonl.gz", (question("one"), "x", "y"))
    hh_file(root / "red-team-attempts" / "red.jsonl.gz", ("", "", ""))
    manifest = prepare("hh-rlhf", root, tmp_path / "out", heldout=0.0)
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "out", "sft.jsonl")] == [
        "one",
        "two",
    ]
    assert [entry["path"] for entry in manifest["inputs"]] == [
        "hh/a/train.jsonl.gz",
        "hh/b/test.jsonl.gz",
    ]


# --- stack-exchange


def site(folder: Path, num_questions: int = 1) -> Path:
    """Each question has a negative, an accepted and two tied answers; one more has none."""
    posts: list[dict[str, object]] = []
    for number in range(10, 10 * num_questions + 10, 10):
        for id, kind, score in ((number, 1, 5), (number + 5, 1, 0)):
            posts.append({"Id": id, "PostTypeId": kind, "Score": score, "Title": f"T{id}"})
            posts[-1] |= {"Body": f"<p>Q{id}</p>", "AcceptedAnswerId": number + 2}
        for offset, score in ((1, -3), (2, 1), (3, 3), (4, 3)):
            posts.append({"Id": number + offset, "PostTypeId": 2, "ParentId": number, "Score": score})
            posts[-1] |= {"Body": f"<p>A{number + offset}</p>", "ContentLicense": "CC BY-SA 4.0"}
    lines = (" ".join(f"{k}={quoteattr(str(v))}" for k, v in post.items()) for post in posts)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"<row {line} />\n" for line in lines)
    (folder / "Posts.xml").write_text(f"<posts>\n{text}</posts>")
    return folder


def only(split: str) -> dict[str, Any]:
    return {name: float(name == split) for name in ("finetune", "reward", "rl", "evaluation")}


PROMPT = "T10\n\nQ10"
ANSWERS = [{"prompt": PROMPT, "response": f"A{id}"} for id in (11, 12, 13, 14)]
# Scores: A11 -1, A12 round(log2(2)) + 1 = 2, A13 and A14 log2(4) = 2, so A12, A13 and A14 tie.
PAIRS = [
    {
        "prompt": PROMPT,
        "chosen": f"A{id}",
        "rejected": "A11",
        "chosen_score": 2,
        "rejected_score": -1,
        "site": "beer",
        "question_id": 10,
        "chosen_id": id,
        "rejected_id": 11,
        "question_licence": None,
        "chosen_licence": "CC BY-SA 4.0",
        "rejected_licence": "CC BY-SA 4.0",
    }
    for id in (12, 13, 14)
]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (
            "finetune",
            {
                "sft.jsonl": ANSWERS,
                "pretrain.jsonl": [{"text": f"Question: {PROMPT}\n\nAnswer: A{id}"} for id in (11, 12, 13, 14)],
            },
        ),
        ("reward", {"preference.jsonl": PAIRS}),
        ("rl", {"prompts.jsonl": [{"prompt": PROMPT}]}),
        (
            "evaluation",
            {
                "heldout_sft.jsonl": ANSWERS,
                "heldout_preference.jsonl": PAIRS,
                "heldout_prompts.jsonl": [{"prompt": PROMPT}],
            },
        ),
    ],
)
def test_each_stack_exchange_split_feeds_its_files(
    tmp_path: Path, split: str, expected: dict[str, list[dict[str, Any]]]
) -> None:
    out = tmp_path / "out"
    manifest = prepare("stack-exchange", site(tmp_path / "beer"), out, **only(split))
    assert {name: rows(out, name) for name in OUTPUTS if rows(out, name)} == expected
    counts = manifest["counts"]
    assert (counts["read"], counts["kept"]) == (6, 5)
    assert counts["dropped"] == {"question with fewer than two answers": 1}
    assert counts["splits"] == {split: 1}
    pairs = {"read": 6, "kept": 3, "dropped": {"equal scores": 3}, "notes": {}}
    assert counts["pairs"] == (
        pairs if split in ("reward", "evaluation") else {"read": 0, "kept": 0, "dropped": {}, "notes": {}}
    )


def test_one_demonstration_is_the_accepted_answer_or_the_best(tmp_path: Path) -> None:
    folder = site(tmp_path / "beer", 2)
    posts = (folder / "Posts.xml").read_text().replace('AcceptedAnswerId="22"', "")
    (folder / "Posts.xml").write_text(posts)
    prepare("stack-exchange", folder, tmp_path / "out", sft="accepted_or_best", **only("finetune"))
    responses = [row["response"] for row in rows(tmp_path / "out", "sft.jsonl")]
    assert responses == ["A12", "A23"]
    assert len(rows(tmp_path / "out", "pretrain.jsonl")) == 8


def test_no_question_is_in_two_splits(tmp_path: Path) -> None:
    site(tmp_path / "dumps" / "beer", 150)
    site(tmp_path / "dumps" / "wine", 200)  # the same questions and fifty more
    out = tmp_path / "out"
    manifest = prepare("stack-exchange", tmp_path / "dumps", out, max_pairs=2)
    counts = manifest["counts"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) == 6 * 350
    assert counts["dropped"]["duplicate question"] == 150
    assert {output["sha256"] for output in manifest["inputs"]} and len(manifest["inputs"]) == 2

    prompts = {name: {row["prompt"] for row in rows(out, name)} for name in OUTPUTS[1:]}
    groups = [prompts[name] for name in ("sft.jsonl", "preference.jsonl", "prompts.jsonl")]
    groups.append(prompts["heldout_prompts.jsonl"])
    assert all(not one & other for one, other in combinations(groups, 2))
    assert sum(map(len, groups)) == sum(counts["splits"].values()) == 200
    assert prompts["heldout_sft.jsonl"] == prompts["heldout_preference.jsonl"] == groups[-1]
    texts = [row["text"] for row in rows(out, "pretrain.jsonl")]
    assert {text.removeprefix("Question: ").split("\n\nAnswer")[0] for text in texts} == groups[0]
    assert max(Counter(row["prompt"] for row in rows(out, "preference.jsonl")).values()) == 2


# --- the folder


def test_text_joins_what_is_pretrained_on(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_bytes(b"Once\r\nupon a time.\r\n")
    path = hh_file(tmp_path / "hh.jsonl.gz", (question("Hi"), "Hello", "Go"))
    manifest = prepare("hh-rlhf", path, tmp_path / "out", text=tmp_path / "books", heldout=0.0)
    assert rows(tmp_path / "out", "pretrain.jsonl") == [
        {"text": "Human: Hi\n\nAssistant: Hello"},
        {"text": "Once\nupon a time."},
    ]
    assert [entry["path"] for entry in manifest["inputs"]] == ["hh.jsonl.gz", "books/a.txt"]
    assert manifest["counts"]["text"] == {
        "read": 1,
        "kept": 1,
        "dropped": {},
        "notes": {"decoded as utf-8": 1, "documents": 1},
    }


def test_bytes_do_not_depend_on_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many_hh(tmp_path / "one" / "hh.jsonl.gz")
    prepare("hh-rlhf", path, tmp_path / "out")
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deep")
    monkeypatch.chdir(tmp_path / "two" / "deep")
    prepare("hh-rlhf", "hh.jsonl.gz", "out")
    assert contents(Path("out")) == contents(tmp_path / "out")


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    path = many_hh(tmp_path / "hh.jsonl.gz")
    first = prepare("hh-rlhf", path, tmp_path / "out")
    inode = (tmp_path / "out").stat().st_ino
    assert prepare("hh-rlhf", path, tmp_path / "out") == first
    assert (tmp_path / "out").stat().st_ino == inode


@pytest.mark.parametrize("change", ["seed", "option", "input", "output", "missing", "manifest"])
def test_any_difference_prepares_again(tmp_path: Path, change: str) -> None:
    path, out = many_hh(tmp_path / "hh.jsonl.gz"), tmp_path / "out"
    prepare("hh-rlhf", path, out)
    before = contents(out)
    if change == "input":
        hh_file(path, (question("Hi"), "Hello", "Go"))
    elif change == "output":
        (out / "sft.jsonl").write_text("{}")
    elif change == "missing":
        (out / "sft.jsonl").unlink()
    elif change == "manifest":
        (out / MANIFEST).write_text("[1")
    options: dict[str, Any] = {"seed": {"seed": 1}, "option": {"heldout": 0.3}}.get(change, {})
    prepare("hh-rlhf", path, out, **options)
    assert (contents(out) == before) == (change in ("output", "missing", "manifest"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hh.jsonl.gz", "out"]


@pytest.mark.parametrize("already", [False, True])
def test_a_failure_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already: bool) -> None:
    path, out = many_hh(tmp_path / "hh.jsonl.gz"), tmp_path / "out"
    if already:
        prepare("hh-rlhf", path, out)
    before = contents(out) if already else {}
    calls = iter(range(100))

    def full_after_three(_: int) -> None:
        if next(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_after_three)
    with pytest.raises(DataError, match="No space left"):
        prepare("hh-rlhf", path, out, seed=1)
    assert sorted(e.name for e in tmp_path.iterdir()) == ["hh.jsonl.gz"] + ["out"] * already
    assert (contents(out) if already else {}) == before


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = many_hh(tmp_path / "hh.jsonl.gz"), tmp_path / "out"
    prepare("hh-rlhf", path, out)
    before = contents(out)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DataError, match="cannot be written"):
        prepare("hh-rlhf", path, out, seed=1)
    assert contents(out) == before


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    path = many_hh(tmp_path / "hh.jsonl.gz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(DataError, match=r"holds other files: 'thesis\.tex'"):
        prepare("hh-rlhf", path, tmp_path / "mine")
    with pytest.raises(DataError, match="is a file"):
        prepare("hh-rlhf", path, path)
    assert contents(tmp_path / "mine") == {"thesis.tex": b"years"}


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = many_hh(tmp_path / "hh.jsonl.gz")
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"unknown kind of data 'hh'\nhint: known are hh-rlhf"):
        prepare("hh", path, out)
    with pytest.raises(ConfigError, match=r"no option 'heldouts'\nhint: did you mean heldout\?"):
        prepare("hh-rlhf", path, out, heldouts=0.1)
    with pytest.raises(ConfigError, match="at least 0 and sum to 1"):
        prepare("hh-rlhf", path, out, heldout=1.5)
    with pytest.raises(ConfigError, match="sft must be 'all' or 'accepted_or_best', got 'best'"):
        prepare("stack-exchange", path, out, sft="best")
    with pytest.raises(ConfigError, match="max_pairs must be at least 1, got 0"):
        prepare("stack-exchange", path, out, max_pairs=0)
    for kind in ("hh-rlhf", "stack-exchange"):
        with pytest.raises(DataError, match="does not exist"):
            prepare(kind, tmp_path / "nowhere", out)
    with pytest.raises(DataError, match="does not exist"):
        prepare("hh-rlhf", path, out, text=tmp_path / "nowhere")
    write_jsonl(tmp_path / "no.jsonl", [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"1 read, dropped \{'no turn markers': 1\}\nhint: is this"):
        prepare("hh-rlhf", tmp_path / "no.jsonl", out)
    assert not out.exists()


# --- published data


def test_the_published_hh_file_is_prepared_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare("hh-rlhf", data_folder("hh-rlhf"), out)
    counts = manifest["counts"]
    assert (counts["read"], counts["kept"]) == (1600, 1592)
    assert counts["dropped"] == {"empty answer": 4, "two turns of the same role running": 4}
    assert counts["notes"] == {"marker inside a turn": 35}
    assert sum(counts["splits"].values()) == 1592
    assert len(rows(out, "preference.jsonl")) + len(rows(out, "heldout_preference.jsonl")) == 1592
    heldout = first_turns(out, HELDOUT)
    train = first_turns(out, ("sft.jsonl", "preference.jsonl", "prompts.jsonl"))
    assert len(train) + len(heldout) == len(train | heldout) == 1526
    starts = tuple(f"Human: {turn}\n\nAssistant: " for turn in heldout)
    assert not any(row["text"].startswith(starts) for row in rows(out, "pretrain.jsonl"))


def test_the_published_dumps_are_prepared_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare("stack-exchange", data_folder("stackexchange"), out)
    counts = manifest["counts"]
    assert (counts["read"], counts["kept"]) == (2354 + 592 + 624 + 1986, 875 + 2550)
    assert counts["dropped"] == {
        "answer of a dropped question": 750,
        "neither question nor answer": 499,
        "question with fewer than two answers": 882,
    }
    assert sum(counts["splits"].values()) == 875
    prompts = {name: {row["prompt"] for row in rows(out, name)} for name in OUTPUTS[1:]}
    groups = [prompts[n] for n in ("sft.jsonl", "preference.jsonl", "prompts.jsonl", HELDOUT[2])]
    assert all(not one & other for one, other in combinations(groups, 2))
    newer = [row for row in rows(out, "preference.jsonl") if row["site"].startswith("datascience")]
    assert {row["chosen_licence"] for row in newer} == {"CC BY-SA 3.0", "CC BY-SA 4.0"}


def test_pretraining_text_can_leave_out_the_chosen_answers(tmp_path: Path) -> None:
    pairs = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}]
    write_jsonl(tmp_path / "hh.jsonl", pairs)
    prepare("hh-rlhf", tmp_path / "hh.jsonl", tmp_path / "out", heldout=0.0, pretrain_on_chosen=False)
    assert (tmp_path / "out" / "pretrain.jsonl").read_bytes() == b""
    assert (tmp_path / "out" / "sft.jsonl").read_bytes() != b""
