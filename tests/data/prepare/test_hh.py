import json
from pathlib import Path

import pytest
from tests.data.prepare.raw import data_folder, every_row_loads, hh_file, many_hh, outputs, question, rows

from fairlead.data.prepare import MANIFEST, prepare
from fairlead.data.sources import write_jsonl

HELDOUT = ("heldout_sft", "heldout_preference", "heldout_prompts")

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
    assert rows(out, f"{prefix}sft") == [{"prompt": USER, "response": "Hello"}]
    assert rows(out, f"{prefix}preference") == [
        {"prompt": USER, "chosen": "Hello", "rejected": "Go"},
        {"prompt": USER, "chosen": "Hello", "rejected": "Away"},
    ]
    assert rows(out, f"{prefix}prompts") == [{"prompt": USER}]
    pretrain = [] if prefix else [{"text": "Human: Hi\n\nAssistant: Hello"}]
    assert rows(out, "pretrain") == pretrain
    kept = {f"{prefix}sft", f"{prefix}preference", f"{prefix}prompts", *([] if prefix else ["pretrain"])}
    assert {file.name for file in out.iterdir()} == {MANIFEST, *(f"{name}.jsonl" for name in kept)}

    merged = {f"{prefix}sft": 1, f"{prefix}prompts": 1}
    assert manifest["counts"] == {
        "read": 3,
        "kept": 2,
        "dropped": {"empty answer": 1},
        "notes": {},
        "splits": {"heldout" if prefix else "train": 2},
        "equal_rows_merged": merged if prefix else {"pretrain": 1, **merged},
    }
    assert manifest == json.loads((out / MANIFEST).read_bytes())
    assert manifest["options"] == {"heldout": heldout, "pretrain_on_chosen": True}
    assert {name: output["rows"] for name, output in manifest["outputs"].items()} == {
        f"{name}.jsonl": len(rows(out, name)) for name in kept
    }


def test_no_hh_conversation_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare("hh-rlhf", many_hh(tmp_path / "hh.jsonl.gz"), out)
    heldout = first_turns(out, HELDOUT)
    train = first_turns(out, ("sft", "preference", "prompts"))
    assert not train & heldout
    assert len(train) + len(heldout) == 100
    assert 5 < len(heldout) < 26  # 15 expected, standard deviation 3.6
    texts = [row["text"] for row in rows(out, "pretrain")]
    assert len(texts) == 4 * len(train)
    assert {text.split("\n")[0].removeprefix("Human: ") for text in texts} == train
    assert manifest["counts"]["splits"] == {"train": 4 * len(train), "heldout": 4 * len(heldout)}


def test_hh_files_of_a_folder_are_read_in_order_without_the_red_team(tmp_path: Path) -> None:
    root = tmp_path / "hh"
    hh_file(root / "b" / "test.jsonl.gz", (question("two"), "x", "y"))
    hh_file(root / "a" / "train.jsonl.gz", (question("one"), "x", "y"))
    hh_file(root / "red-team-attempts" / "red.jsonl.gz", ("", "", ""))
    manifest = prepare("hh-rlhf", root, tmp_path / "out", heldout=0.0)
    assert [row["prompt"][0]["content"] for row in rows(tmp_path / "out", "sft")] == [
        "one",
        "two",
    ]
    assert [entry["path"] for entry in manifest["inputs"]] == [
        "hh/a/train.jsonl.gz",
        "hh/b/test.jsonl.gz",
    ]


def first_turns(folder: Path, names: tuple[str, ...]) -> set[str]:
    return {row["prompt"][0]["content"] for name in names for row in rows(folder, name)}


def test_pretraining_text_can_leave_out_the_chosen_answers(tmp_path: Path) -> None:
    pairs = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}]
    write_jsonl(tmp_path / "hh.jsonl", pairs)
    prepare("hh-rlhf", tmp_path / "hh.jsonl", tmp_path / "out", heldout=0.0, pretrain_on_chosen=False)
    assert outputs(tmp_path / "out") == {"preference": 1, "prompts": 1, "sft": 1}


def test_the_published_hh_file_is_prepared_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare("hh-rlhf", data_folder("hh-rlhf"), out)
    counts = manifest["counts"]
    assert (counts["read"], counts["kept"]) == (1600, 1592)
    assert counts["dropped"] == {"empty answer": 4, "two turns of the same role running": 4}
    assert counts["notes"] == {"marker inside a turn": 35}
    assert sum(counts["splits"].values()) == 1592
    assert len(rows(out, "preference")) + len(rows(out, "heldout_preference")) == 1592
    heldout = first_turns(out, HELDOUT)
    train = first_turns(out, ("sft", "preference", "prompts"))
    assert len(train) + len(heldout) == len(train | heldout) == 1526
    starts = tuple(f"Human: {turn}\n\nAssistant: " for turn in heldout)
    assert not any(row["text"].startswith(starts) for row in rows(out, "pretrain"))
    assert every_row_loads(out)
