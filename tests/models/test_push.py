"""Pushing says why it could not: nothing reaches the network in these tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairlead.errors import ModelError, RunError
from fairlead.models.push import push


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def pushed(folder: Path, repo_id: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, since the hub's client reads its environment once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "fairlead", "push", str(folder), repo_id],
        env={**kept, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_token_it_says_how_to_get_one(folder: Path, tmp_path: Path) -> None:
    done = pushed(folder, "owner/name", tmp_path)
    assert done.returncode == RunError.exit_code
    assert done.stderr == (f"error: {folder} was not pushed: there is no token\nhint: hf auth login, or set HF_TOKEN\n")


def test_offline_it_says_so(folder: Path, tmp_path: Path) -> None:
    done = pushed(folder, "owner/name", tmp_path, HF_HUB_OFFLINE="1", HF_TOKEN="hf_none")
    assert done.returncode == RunError.exit_code
    assert done.stderr == (f"error: {folder} was not pushed: HF_HUB_OFFLINE is set\nhint: unset it and push again\n")


def test_a_hub_out_of_reach_is_named(folder: Path, tmp_path: Path) -> None:
    """Port 9 of this machine answers nobody."""
    done = pushed(folder, "owner/name", tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_none")
    assert done.returncode == RunError.exit_code
    assert "the hub is out of reach (" in done.stderr
    assert done.stderr.endswith("hint: check the network\n")


def test_what_nobody_could_load_is_not_pushed(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ModelError, match=r"is an adapter whose base, .* is on this machine alone"):
        push(folder, "owner/name")
    with pytest.raises(ModelError, match="holds no model"):
        push(tmp_path.parent, "owner/name")
    with pytest.raises(ModelError, match="does not exist"):
        push("no-such/folder", "owner/name")
