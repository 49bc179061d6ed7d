"""Text learned beside the responses of a round: the pretraining or SFT gradient of PPO-ptx (Ouyang et al. 2022,
equation 2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fairlead.algorithms.stage import Stage
from fairlead.algorithms.terms import nll
from fairlead.config import Section
from fairlead.data.pack import step_groups, text_pieces, token_fields
from fairlead.data.records import load_records
from fairlead.data.render import Tree
from fairlead.ops.sampling import permutation, stream_key
from fairlead.types import Demonstration, MixedBatch, Pass, Term, Text, TokenBatch


class MixedSettings(Section):
    path: str | tuple[str, ...]
    """File, folder or hub id of the text."""
    kind: Literal["text", "demonstration"] = "text"
    """Plain text, all of which is learned; or prompts with responses, of which the responses are."""
    coef: float = Field(default=1.0, gt=0)
    """Weight of its mean loss a token beside the policy's."""
    batch_size: int = Field(default=8, ge=1)
    """Texts of one optimizer step."""
    limit: int | None = Field(default=None, ge=1)
    """Read so many rows at most."""


def mixed_pass(settings: MixedSettings) -> Pass:
    term = Term("mixed", "mixed_token", nll, settings.coef)
    return Pass("policy", (term,), frozenset({"logprobs"}), uniform=True, batch=MixedBatch)


class MixedSource:
    """Walks over the text, each epoch in a keyed order; a step's batches depend on its number alone."""

    def __init__(self, stage: Stage, settings: MixedSettings) -> None:
        record = Text if settings.kind == "text" else Demonstration
        source = settings.path if isinstance(settings.path, str) else list(settings.path)
        records, _ = load_records(source, record, limit=settings.limit)
        trees, _ = stage.trees(records, "mixed")
        self._trees: list[Tree] = text_pieces(trees, stage.recipe.data.max_length) if record is Text else trees
        self._stage, self._size = stage, settings.batch_size

    def batches(self, step: int) -> list[TokenBatch]:
        count, chosen = len(self._trees), list[Tree]()
        at = step * self._size
        while len(chosen) < min(self._size, count):
            epoch, position = divmod(at, count)
            order = permutation(stream_key(self._stage.recipe.seed, "mixed", epoch), count)
            part = order[position : position + self._size - len(chosen)]
            chosen += [self._trees[i] for i in part]
            at += len(part)
        packed, sizes = self._stage.packed, [tree.num_tokens for tree in chosen]
        groups = step_groups(sizes, self._stage.budget.tokens, packed=packed, share=self._stage.ranks.share)
        return [self._batch([chosen[i] for i in group], packed) for group in groups]

    def _batch(self, trees: list[Tree], packed: bool) -> MixedBatch:
        fields = token_fields(trees, packed=packed, pad_id=self._stage.pad_id)
        fields["counts"] = {"mixed_token": fields["counts"]["token"]}
        return MixedBatch(**fields)
