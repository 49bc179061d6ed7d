"""Nothing that was handed in is unpickled, evaluated or trusted with code of its own."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fairlead
from fairlead.config import ModelSection
from fairlead.errors import ModelError
from fairlead.models.load import load_base, load_tokenizer, tokenizer_for
from fairlead.models.merge.tensors import Tensors
from fairlead.models.pretrained import read_config
from tests.tiny import CPU, base

SOURCES = sorted(Path(fairlead.__file__).parent.rglob("*.py"))
FORBIDDEN = {
    *("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
}


def _names(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported and functions that are called, by their dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def _dangers(text: str) -> list[str]:
    tree = ast.parse(text)
    found = [name for name in _names(tree) if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            wanted = dict.fromkeys(("trust_remote_code", "allow_pickle", "shell"), "False")
            found += [f"{name}={given[name]}" for name in wanted if given.get(name, "False") != "False"]
            loads = called.endswith(".from_pretrained") and not called.startswith("Peft")
            if loads and given.get("trust_remote_code") != "False":
                found.append(f"{called} without trust_remote_code=False")
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
    return found


def test_the_package_unpickles_and_evaluates_nothing_and_trusts_no_code() -> None:
    assert {path.name: found for path in SOURCES if (found := _dangers(path.read_text("utf-8")))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "os.system('x')",
        "numpy.load(x, allow_pickle=True)",
        "torch.load(x)",
        "yaml.load(x)",
        "AutoConfig.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=asked)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert _dangers(text)


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def _folder(path: Path) -> Path:
    made = base("llama")
    made.model.save_pretrained(path)
    made.tokenizer.save_pretrained(path)
    return path


def test_a_bin_file_that_would_run_code_is_refused_by_training_and_merging(tmp_path: Path) -> None:
    folder, trace = _folder(tmp_path / "model"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Attack(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds a pickle"):
        load_base(ModelSection(path=str(folder)), load_tokenizer(str(folder)), None, seed=0, device=CPU)
    with pytest.raises(ModelError, match="cannot be read"):
        Tensors(folder).read("model.embed_tokens.weight")
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # the file would have


def test_a_bin_file_of_tensors_alone_is_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model")
    weights = base("llama").model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = load_base(ModelSection(path=str(folder)), load_tokenizer(str(folder)), None, seed=0, device=CPU)
    assert torch.equal(loaded.model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def test_code_beside_a_model_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, trace = _folder(tmp_path / "model"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    with pytest.raises(ModelError, match="code of its own"):
        read_config(str(folder))
    with pytest.raises(ModelError, match="code of its own"):
        tokenizer_for(ModelSection(path=str(folder)), [])
    assert not trace.exists()
