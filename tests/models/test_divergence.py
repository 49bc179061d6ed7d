"""The KL of whole distributions between policy and reference, against torch.distributions on plain logits, and what a
model call makes of a support."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from fairlead.data.pack import by_response, token_batch
from fairlead.data.render import Tree
from fairlead.models.roles import Models
from fairlead.types import Support, TokenBatch
from tests.tiny import TREES, models, separate

PROMPTED = TREES[:2]
"""Trees with a prompt: every token of their responses counts."""


def _support(number: int) -> tuple[Support, list[set[int] | None]]:
    """Of every third token a few, of every fifth all but one, of the others the whole vocabulary: as tensors and as
    sets of what is left out or kept."""
    ids = torch.cat([torch.tensor(response) for tree in PROMPTED for response in tree.responses]).tolist()
    kept = [sorted({token, 2, 60 + at}) if at % 3 == 0 else [] for at, token in enumerate(ids)]
    banned = [61 if at % 5 == 1 else -1 for at in range(number)]
    tensors = torch.tensor([t for each in kept for t in each]), torch.tensor(list(map(len, kept))), torch.tensor(banned)
    return Support(*tensors), [set(each) if each else None for each in kept]


def _logits(made: Models, tree: Tree, temperature: float) -> Tensor:
    """Of the role in use, before each token of a lone response: by transformers' own attention."""
    network = made.active_network()
    network.set_attn_implementation("sdpa")
    ids = torch.tensor([[*tree.prompt, *tree.responses[0]]])
    logits = network(ids, attention_mask=torch.ones_like(ids)).logits[0, len(tree.prompt) - 1 : -1]
    network.set_attn_implementation("fairlead")
    return logits / temperature


def _batch(with_support: bool) -> tuple[TokenBatch, list[Tensor]]:
    """A batch of all trees, and for each response which tokens could be drawn [length, V]."""
    batch = token_batch(PROMPTED, packed=True, pad_id=0)
    number = int(batch.loss_mask.sum())
    lengths = [len(tree.responses[0]) for tree in separate(PROMPTED)]
    mask = torch.ones(number, 320, dtype=torch.bool)
    if with_support:
        support, sets = _support(number)
        for at, tokens in enumerate(sets):
            if tokens is not None:
                mask[at] = torch.tensor([token in tokens for token in range(320)])
            if support.banned[at] >= 0:
                mask[at, support.banned[at]] = False
        batch = replace(batch, support=support)
    return batch, list(mask.split(lengths))


@pytest.mark.parametrize("with_support", [False, True])
@pytest.mark.parametrize("options", [{"lora": True, "spread": 0.5}, {"reference": "moving"}], ids=["lora", "full"])
def test_the_divergence_is_the_kl_of_the_roles_distributions(with_support: bool, options: dict[str, object]) -> None:
    made = models(("policy", "reference"), dtype=torch.float64, **options)  # pyright: ignore[reportArgumentType]
    if "lora" not in options:
        with torch.no_grad():
            made.causal.get_output_embeddings().weight.mul_(3.0)
    batch, masks = _batch(with_support)
    found = made.divergence(batch, 0.7)
    assert not found.requires_grad and not bool(found[~batch.loss_mask].any())
    for tree, mask, got in zip(separate(PROMPTED), masks, by_response(found, batch), strict=True):
        logits: list[Tensor] = []
        for role in ("policy", "reference"):
            with torch.no_grad(), made.use(role):
                logits.append(_logits(made, tree, 0.7).masked_fill(~mask, -torch.inf))
        wanted = torch.stack(
            [
                kl_divergence(Categorical(logits=a[m]), Categorical(logits=b[m]))
                for a, b, m in zip(*logits, mask, strict=True)
            ]
        )
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)
    assert float(found.max()) > 1e-3


def test_a_model_call_takes_every_output_over_the_support() -> None:
    made = models(("policy",), dtype=torch.float64, spread=0.5)
    batch, masks = _batch(True)
    with torch.no_grad(), made.use("policy"):
        outputs = made(batch, frozenset({"logprobs", "entropy", "collision", "mean_logit"}), 0.7)
        names = ("logprobs", "entropy", "collision", "mean_logit")
        found = zip(*(by_response(getattr(outputs, name), batch) for name in names), strict=True)
        for tree, mask, got in zip(separate(PROMPTED), masks, found, strict=True):
            logits = _logits(made, tree, 0.7).masked_fill(~mask, -torch.inf)
            spread = Categorical(logits=logits)
            wanted = (
                spread.log_prob(torch.tensor(tree.responses[0])),
                torch.special.entr(spread.probs).sum(1),
                (spread.probs**2).sum(1).log(),
                torch.stack([row[m].mean() for row, m in zip(logits, mask, strict=True)]),
            )
            for ours, theirs in zip(got, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
