"""What can be known of the vLLM engine without a GPU: its errors, the copy it loads, and that every call it makes fits
the signatures in the source of an installed vLLM."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import prepared
from tests.tiny import models, scatter, tokenizer

from fairlead.config import AdapterSection
from fairlead.data.render import Renderer
from fairlead.errors import ConfigError
from fairlead.models.roles import Models
from fairlead.rollout import vllm
from fairlead.rollout.engines import open_sampler

INSTALLED = importlib.util.find_spec("vllm")
IDS = torch.tensor([[3, 7, 5, 9, 40, 41, 2, 6]])


def _renderer() -> Renderer:
    return Renderer(tokenizer(), template="question-answer", max_length=200)


@pytest.mark.skipif(INSTALLED is not None, reason="vLLM is installed")
def test_without_vllm_the_error_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"vLLM is not installed\nhint: pip install 'fairlead\[vllm\]'"):
        open_sampler("vllm", models(("policy",)), _renderer())


SETTINGS: dict[str, dict[str, Any] | None] = {
    "all weights": None,
    "lora": {},
    "dora": {"method": "dora"},
    "head in full": {"train_also": ("lm_head",)},
    "lora on the head": {"targets": ("lm_head",)},
}
PAIRS = [(family, name) for family in ("llama", "gemma") for name in SETTINGS] + [
    ("gpt2", "all weights"),
    ("gpt2", "lora"),
]
"""Heads are tied in Gemma and GPT-2, whose layers are transposed."""


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_the_saved_copy_answers_as_the_policy(family: str, name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = SETTINGS[name]
    adapter = None if settings is None else AdapterSection(rank=2, **settings)
    made = Models(prepared(family), ("policy", "reference") if adapter else ("policy",), adapter=adapter)
    with torch.no_grad():
        before = made.causal(IDS, attention_mask=torch.ones_like(IDS)).logits
    scatter(made, 0.2)
    vllm.save_merged(made, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    made.causal.set_attn_implementation("sdpa")
    with torch.no_grad(), made.use("policy"):
        wanted = made.causal.eval()(IDS, attention_mask=torch.ones_like(IDS)).logits
        found = loaded(IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted - before).abs().max()) > 0.1


# --- against the source of an installed vLLM -----------------------------------------------------------------------


def _tree(*parts: str) -> ast.Module:
    assert INSTALLED is not None and INSTALLED.submodule_search_locations
    return ast.parse(Path(INSTALLED.submodule_search_locations[0], *parts).read_text("utf-8"))


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(tree: ast.Module, name: str) -> set[str]:
    return {
        node.target.id
        for node in _class(tree, name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _signature(tree: ast.Module, name: str, method: str) -> inspect.Signature:
    """Of a method, self left out."""
    found = next(n for n in _class(tree, name).body if isinstance(n, ast.FunctionDef) and n.name == method).args
    kinds = inspect.Parameter
    parts: list[inspect.Parameter] = []
    given = [*found.posonlyargs, *found.args][1:]
    for at, arg in enumerate(given):
        default = kinds.empty if at < len(given) - len(found.defaults) else None
        parts.append(kinds(arg.arg, kinds.POSITIONAL_OR_KEYWORD, default=default))
    if found.vararg:
        parts.append(kinds(found.vararg.arg, kinds.VAR_POSITIONAL))
    for arg, default in zip(found.kwonlyargs, found.kw_defaults, strict=True):
        parts.append(kinds(arg.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None))
    if found.kwarg:
        parts.append(kinds(found.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parts)


def _calls(name: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(Path(vllm.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called == name:
                yield node


def _bind(signature: inspect.Signature, call: ast.Call) -> inspect.BoundArguments:
    return signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords if keyword.arg})


@pytest.mark.skipif(INSTALLED is None, reason="vLLM is not installed")
def test_every_call_fits_the_signatures_of_the_installed_vllm() -> None:
    llm, arguments = _tree("entrypoints", "llm.py"), _fields(_tree("engine", "arg_utils.py"), "EngineArgs")
    (made,) = _calls("LLM")
    assert set(_bind(_signature(llm, "LLM", "__init__"), made).arguments.get("kwargs", {})) <= arguments
    (asked,) = (call for call in _calls("generate") if any(k.arg == "use_tqdm" for k in call.keywords))
    for name, call in (
        ("generate", asked),
        *((n, c) for n in ("collective_rpc", "reset_prefix_cache") for c in _calls(n)),
    ):
        _bind(_signature(llm, "LLM", name), call)
    (wanted,) = _calls("SamplingParams")
    assert {keyword.arg for keyword in wanted.keywords} <= _fields(_tree("sampling_params.py"), "SamplingParams")
    (prompt,) = _calls("TokensPrompt")
    assert {keyword.arg for keyword in prompt.keywords} <= _fields(_tree("inputs", "llm.py"), "TokensPrompt")


@pytest.mark.skipif(INSTALLED is None, reason="vLLM is not installed")
def test_the_worker_has_the_method_that_is_called_by_name_and_outputs_have_what_is_read() -> None:
    (call,) = _calls("collective_rpc")
    method, given = call.args[0], call.keywords[0].value
    assert isinstance(method, ast.Constant) and isinstance(given, ast.Dict)
    names = {key.value for key in given.keys if isinstance(key, ast.Constant)}
    for path in (("v1", "worker", "gpu_model_runner.py"), ("v1", "worker", "gpu", "model_runner.py")):
        signature = _signature(_tree(*path), "GPUModelRunner", str(method.value))
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        assert takes_any or names <= set(signature.parameters)
    _signature(_tree("v1", "worker", "gpu_worker.py"), "Worker", str(method.value))
    outputs = _tree("outputs.py")
    assert {"token_ids", "logprobs", "sampling_mask"} <= _fields(outputs, "CompletionOutput")
    assert "token_ids" in _fields(outputs, "SamplingMask")
    assert "logprob" in _fields(_tree("logprobs.py"), "Logprob")
