"""Every way in which roles share weights: gradients are those of models of their own, training one role leaves the
bytes of the others, and the reference stays what it was."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fairlead.config import AdapterSection, ModelSection, QuantizeSection
from fairlead.data.pack import token_batch
from fairlead.data.render import Tree
from fairlead.errors import ModelError
from fairlead.models.adapters import StartAdapter
from fairlead.models.export import save_model
from fairlead.models.forms import RewardWeights
from fairlead.models.load import Base, load_base, prepare
from fairlead.models.roles import Models
from tests.tiny import CPU, TREES, base, gradients, relative_error, scatter, tokenizer

SECTION = AdapterSection(rank=4)
REWARD = AdapterSection(rank=2, targets="attention")
LOGPROBS, VALUES, SCORES = frozenset({"logprobs"}), frozenset({"values"}), frozenset({"scores"})
ROLES = ("policy", "reference", "value")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an SFT adapter and a reward adapter on it, all with random weights."""
    folder = tmp_path_factory.mktemp("saved")
    start = base()
    start.model.config._attn_implementation = "sdpa"
    start.model.save_pretrained(folder / "base")
    start.tokenizer.save_pretrained(folder / "base")
    for name, role, section in (("sft", "policy", SECTION), ("reward", "reward", REWARD)):
        made = Models(load(folder / "base"), (role,), adapter=section)
        scatter(made, seed=3)
        save_model(made, folder / name, template="plain")
    return folder


def load(folder: Path, adapter: AdapterSection | None = None, quantize: bool = False) -> Base:
    found = load_base(ModelSection(path=str(folder), adapter=adapter), tokenizer(), None, seed=0, device=CPU)
    return replace(found, model=_nf4(Path(found.origin or "")).model) if quantize else found


def _nf4(folder: Path) -> Base:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    return prepare(model, tokenizer(), None, CPU)


def four_roles(saved: Path, *, quantize: bool = False, **options: Any) -> Models:
    """Policy and value continue the SFT adapter, the reference is it, the reward is another; values made random."""
    made = Models(
        load(saved / "sft", SECTION, quantize),
        ROLES,
        adapter=SECTION,
        value_trunk="adapter",
        reward=StartAdapter.read(saved / "reward"),
        **options,
    )
    scatter(made)
    return made


def _batch() -> Any:
    return token_batch(TREES, packed=True, pad_id=0)


def _outputs(made: Models, role: str) -> Tensor:
    needs = {"value": VALUES, "reward": SCORES}.get(role, LOGPROBS)
    with torch.no_grad(), made.use(role):
        outputs = made(_batch(), needs)
    return getattr(outputs, next(iter(needs)))


def _backward(made: Models, role: str) -> None:
    with made.use(role):
        if role == "value":
            (made(_batch(), VALUES).values ** 2).sum().backward()
        else:
            made(_batch(), LOGPROBS).logprobs.sum().backward()


def _step(made: Models, role: str) -> set[str]:
    """The parameters, of all there are, whose bytes a step of one role changes."""
    everything = dict(made.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in everything.items()}
    optimizer = torch.optim.SGD(list(made.trainable.values()), lr=0.1)
    _backward(made, role)
    optimizer.step()
    return {name for name, parameter in everything.items() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("quantize", [False, True])
def test_four_roles_on_one_base_have_the_gradients_of_models_of_their_own(saved: Path, quantize: bool) -> None:
    together = four_roles(saved, quantize=quantize)
    for role in ("policy", "value"):  # as in one step of PPO, the frozen roles in between
        _outputs(together, "reference")
        _backward(together, role)
        _outputs(together, "reward")
    found = gradients(together)
    assert found.keys() == together.trainable.keys()
    for role, other in (("policy", "value"), ("value", "policy")):
        alone = Models(load(saved / "sft", SECTION, quantize), ("policy", "value"), adapter=SECTION)
        ours = {name: p for name, p in together.trainable.items() if f".{other}." not in name}
        names = {name.replace(".value.", ".policy.") if ".lora_" in name else name: name for name in ours}
        with torch.no_grad():
            for name, parameter in alone.trainable.items():
                if name in names:
                    parameter.copy_(ours[names[name]])
        if role == "policy":
            _backward(alone, "policy")
        else:
            with alone.use("policy"):
                (alone(_batch(), VALUES).values ** 2).sum().backward()
        wanted = {names[name]: gradient for name, gradient in gradients(alone).items()}
        assert relative_error({name: found[name] for name in wanted}, wanted) < 1e-6


@pytest.mark.parametrize("role", ["policy", "value"])
def test_training_one_role_leaves_every_byte_of_the_others_and_of_the_base(saved: Path, role: str) -> None:
    made = four_roles(saved)
    others = {name: _outputs(made, name) for name in made.roles if name != role}
    changed = _step(made, role)
    own = {name for name in made.trainable if f".{role}." in name}
    assert changed == own
    for name, before in others.items():
        torch.testing.assert_close(_outputs(made, name), before, atol=0, rtol=0)


def test_checkpointing_changes_no_gradient_of_any_role(saved: Path) -> None:
    plain, recomputed = four_roles(saved), four_roles(saved, gradient_checkpointing=True)
    for made in (plain, recomputed):
        for role in ("policy", "value"):
            _backward(made, role)
    assert relative_error(gradients(recomputed), gradients(plain)) < 1e-6


def test_a_policy_without_a_start_has_the_base_as_its_reference_and_a_separate_one_a_copy_of_it(saved: Path) -> None:
    for section, separate in ((SECTION, False), (SECTION, True), (None, False)):
        made = Models(load(saved / "base"), ("policy", "reference"), adapter=section, separate=separate)
        assert (made.reference is None) is (section is not None and not separate)
        start = _outputs(made, "policy")
        torch.testing.assert_close(_outputs(made, "reference"), start, atol=0, rtol=0)
        scatter(made)
        assert float((_outputs(made, "policy") - start).abs().max()) > 1e-2
        torch.testing.assert_close(_outputs(made, "reference"), start, atol=0, rtol=0)


@pytest.mark.parametrize("separate", [False, True])
def test_a_continued_policy_has_the_adapter_it_started_from_as_its_reference(saved: Path, separate: bool) -> None:
    made = Models(load(saved / "sft", SECTION), ("policy", "reference"), adapter=SECTION, separate=separate)
    start = _outputs(Models(load(saved / "sft"), ("policy",)), "policy")  # merged on load
    torch.testing.assert_close(_outputs(made, "policy"), start, atol=1e-5, rtol=0)
    scatter(made)
    torch.testing.assert_close(_outputs(made, "reference"), start, atol=1e-5, rtol=0)
    assert all(".policy." in name for name in made.trainable)


@pytest.mark.parametrize("number", [None, 1])
def test_a_reference_that_is_asked_before_training_alone_needs_no_copy_and_is_refused_later(number: int | None) -> None:
    made = Models(base(), ("policy", "reference"), reference="first", num_layers_unfrozen=number)
    assert made.reference is None
    torch.testing.assert_close(_outputs(made, "reference"), _outputs(made, "policy"), atol=0, rtol=0)
    _step(made, "policy")
    with pytest.raises(ModelError, match="no longer its own reference"):
        _outputs(made, "reference")


def test_parameters_of_a_base_in_4_bits_are_counted_as_what_they_stand_for(saved: Path) -> None:
    plain, packed = (four_roles(saved, quantize=quantize).parameter_counts() for quantize in (False, True))
    assert packed == plain


def test_an_adapter_trained_on_a_base_of_another_precision_is_said_to_be(saved: Path) -> None:
    found = replace(load(saved / "sft", SECTION), quantize=QuantizeSection(bits=4))
    notes = Models(found, ("policy", "reference"), adapter=SECTION).notes
    assert notes[1].endswith("trained on the base unquantised and used on it in 4 bits")


def test_layers_unfrozen_share_what_is_frozen_with_the_reference() -> None:
    made = Models(base(num_layers=3), ("policy", "reference", "value"), num_layers_unfrozen=1)
    trained = {name for name in made.trainable if not name.startswith("heads.")}
    assert trained and all(".layers.2." in name for name in trained)
    ours, theirs = dict(made.network.named_parameters()), dict(made.reference.named_parameters())
    assert {name for name in ours if ours[name] is not theirs[name]} == {n.removeprefix("network.") for n in trained}
    start, reference = _outputs(made, "policy"), _outputs(made, "reference")
    torch.testing.assert_close(reference, start, atol=0, rtol=0)
    scatter(made)
    torch.testing.assert_close(_outputs(made, "reference"), start, atol=0, rtol=0)
    _backward(made, "policy")
    whole = Models(base(num_layers=3), ("policy",))
    with torch.no_grad():
        for name, parameter in whole.trainable.items():
            parameter.copy_(ours[name.removeprefix("network.")])
    _backward(whole, "policy")
    wanted = {name: gradient for name, gradient in gradients(whole).items() if name in trained}
    assert relative_error({name: gradients(made)[name] for name in wanted}, wanted) < 1e-6


@pytest.mark.parametrize("trunk", ["layers", "model"])
def test_a_value_with_layers_or_a_model_of_its_own_starts_as_the_policys_and_is_trained_apart(trunk: str) -> None:
    options: dict[str, Any] = {"value_trunk": trunk, "num_value_layers": 1}
    made = Models(base(num_layers=2), ROLES, **options)
    plain = Models(base(num_layers=2), ROLES)
    for each in (made, plain):
        with torch.no_grad():
            each.heads["value"].get_parameter("linear.weight").fill_(0.1)
    with torch.no_grad(), plain.use("policy"):
        wanted = plain(_batch(), VALUES).values
    torch.testing.assert_close(_outputs(made, "value"), wanted, atol=0, rtol=0)
    policy = _outputs(made, "policy")
    changed = _step(made, "value")
    own = [name for name in changed if name.startswith(("value.", "heads.value"))]
    if trunk == "model":
        assert len(own) == len(changed)
        torch.testing.assert_close(_outputs(made, "policy"), policy, atol=0, rtol=0)
    else:  # the layers below are the policy's
        assert {name for name in changed if ".layers.1." in name} == {n for n in own if ".layers.1." in n}
        assert any(".layers.0." in name for name in changed)
    assert not any("lm_head" in name for name in made.trainable if name.startswith("value."))


def test_a_value_that_starts_as_the_reward_gives_its_scores_before_training(saved: Path) -> None:
    made = Models(
        load(saved / "sft", SECTION),
        ROLES,
        adapter=SECTION,
        value_trunk="adapter",
        value_start="reward",
        reward=StartAdapter.read(saved / "reward"),
    )
    rows = [Tree((3, 4, 5), ((6, 7, 8),)), Tree((9,), ((4, 4),))]
    longer = [Tree((*tree.prompt, *tree.responses[0]), ((1,),)) for tree in rows]
    with torch.no_grad(), made.use("reward"):
        scores = made(token_batch(rows, packed=False, pad_id=0), SCORES).scores
    batch = token_batch(longer, packed=False, pad_id=0)
    with torch.no_grad(), made.use("value"):
        values = made(batch, VALUES).values[batch.loss_mask]
    torch.testing.assert_close(values, scores, atol=1e-6, rtol=0)
    assert not any(".reward." in name for name in made.trainable)
    assert any(".value." in name for name in made.trainable)


def _whole_reward(folder: Path, **fields: Any) -> Path:
    made = Models(base(**fields), ("reward",))
    scatter(made, seed=5)
    save_model(made, folder, template="plain")
    return folder


@pytest.mark.parametrize("adapter", [None, SECTION])
@pytest.mark.parametrize("slope", [1.0, 0.25])
def test_a_value_starts_as_a_reward_with_weights_of_its_own(
    adapter: AdapterSection | None, slope: float, saved: Path, tmp_path: Path
) -> None:
    folder = _whole_reward(tmp_path / "reward")
    weights = RewardWeights(folder, slope)
    form: dict[str, Any] = {"value_trunk": "model", "value_start": "reward", "value_weights": weights}
    made = Models(load(saved / "base"), ROLES, adapter=adapter, **form)
    rows = [Tree((3, 4, 5), ((6, 7, 8),)), Tree((9,), ((4, 4),))]
    judged = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        ids = [torch.tensor([[*tree.prompt, *tree.responses[0]]]) for tree in rows]
        scores = torch.cat([judged(each, torch.ones_like(each)).logits[0] for each in ids])
    longer = [Tree((*tree.prompt, *tree.responses[0]), ((1,),)) for tree in rows]
    batch = token_batch(longer, packed=False, pad_id=0)
    with torch.no_grad(), made.use("value"):
        values = made(batch, VALUES).values[batch.loss_mask]
    torch.testing.assert_close(values, slope * scores, atol=1e-6, rtol=1e-5)
    assert any(name.startswith("value.") for name in made.trainable)
    assert made.notes[-1] == f"value: a model of its own that begins as the reward {folder}"


def test_a_value_does_not_start_as_a_reward_of_another_form_or_tokenizer(saved: Path, tmp_path: Path) -> None:
    wide, other = _whole_reward(tmp_path / "wide", intermediate_size=96), _whole_reward(tmp_path / "other")
    words = AutoTokenizer.from_pretrained(other)
    words.add_tokens(["<another>"])
    words.save_pretrained(other)
    for folder, message in ((wide, "a model of another form"), (other, "their tokenizers differ")):
        form: dict[str, Any] = {"value_start": "reward", "value_weights": RewardWeights(folder)}
        with pytest.raises(ModelError, match=message):
            Models(load(saved / "base"), ROLES, value_trunk="model", **form)
        with pytest.raises(ModelError, match="needs a model of its own"):
            Models(load(saved / "base"), ROLES, value_trunk="layers", **form)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "value adapter": ({"value_trunk": "adapter"}, r"needs model\.adapter"),
    "value layers": ({"value_trunk": "layers", "adapter": SECTION}, "needs a policy whose weights are trained"),
    "value start": ({"value_start": "reward", "adapter": SECTION}, "needs a shared reward"),
    "too many layers": ({"num_layers_unfrozen": 3}, "the model has 2 layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_that_do_not_go_together_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        Models(base(), ROLES, **options)


def test_a_reward_without_its_score_head_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match="lacks its score head"):
        Models(load(saved / "base"), ROLES, adapter=SECTION, reward=StartAdapter.read(saved / "sft"))


def test_each_form_is_said_for_the_manifest(saved: Path) -> None:
    make: Callable[..., Models] = lambda folder, **options: Models(  # noqa: E731
        load(saved / folder, options.get("adapter")), ("policy", "reference"), **options
    )
    digest = hashlib.sha256((saved / "sft" / "adapter_model.safetensors").read_bytes()).hexdigest()
    place = saved / "base"
    assert make("base").notes == ("reference: a frozen copy of all weights",)
    assert make("base", adapter=SECTION).notes == (f"reference: {place} with adapters off",)
    assert make("base", num_layers_unfrozen=1).notes == (
        "reference: a frozen copy of the last 1 layers over the shared trunk",
    )
    assert make("sft", adapter=SECTION).notes == (
        f"policy: continues the adapter {saved / 'sft'} on its base {place}; nothing is merged",
        f"reference: the frozen adapter {saved / 'sft'}, sha256 {digest}",
    )


def test_roles_without_an_adapter_import_no_peft() -> None:
    code = """
import sys
from tests.tiny import models
made = models(("policy", "reference", "value"))
with made.use("reference"):
    assert made.active_network() is not made.causal
assert "peft" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
