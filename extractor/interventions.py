"""Interventions: attention knockout and token removal (paper §4.2).

A knockout changes rows of the attention matrix A of image tokens, in the blocks it is asked for;
the rows of the prefix tokens (CLS, distillation, registers) stay as they are, and so do the columns
of all but CLS. No attention matrix is materialised: each knockout is attention once more with other
operands.

Token removal keeps the prefix tokens and a part of the image tokens, from the position embedding
on. The other tokens keep their places, but no token attends to them, in any block; what remains
gets what it would get if they were not there. What is computed at their places means nothing.

Shape letters: N images, H heads, T tokens = P prefix tokens + G image tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from classlens.extractor.blocks import Attend, full_attention
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.models import Subject
from classlens.extractor.plan import Unit
from classlens.extractor.schema import REMOVALS


def self_only(query: Tensor, key: Tensor, value: Tensor, *, prefix: int) -> Tensor:
    """Row t of A is one-hot at t for every image token t: its output is V_t."""
    return _after_prefix(query, key, value, value[:, :, prefix:])


def no_cls(query: Tensor, key: Tensor, value: Tensor, *, prefix: int) -> Tensor:
    """A[t, CLS] = 0 for every image token t, not renormalised: out_t − A[t, CLS]·V_CLS.

    CLS, which is token 0, stays among the keys, and its value is zero: so nothing is subtracted,
    and nothing cancels.
    """
    others = F.pad(value[:, :, 1:], (0, 0, 1, 0))
    return _after_prefix(query, key, value, full_attention(query[:, :, prefix:], key, others))


def no_cls_renormalised(query: Tensor, key: Tensor, value: Tensor, *, prefix: int) -> Tensor:
    """A[t, CLS] = 0 for every image token t, the rest of the row scaled to sum to 1."""
    images = full_attention(query[:, :, prefix:], key[:, :, 1:], value[:, :, 1:])
    return _after_prefix(query, key, value, images)


def attend_to_kept(query: Tensor, key: Tensor, value: Tensor, *, kept: Tensor) -> Tensor:
    """A[·, t] = 0 for every token t that is not kept, rows scaled to sum to 1.

    Args:
        kept: bool [N, 1, 1, T], at least one an image.
    """
    # Where a token overflows, a weight of zero does not hide it.
    key, value = (part.masked_fill(~kept.mT, 0) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=kept)


def _after_prefix(query: Tensor, key: Tensor, value: Tensor, images: Tensor) -> Tensor:
    """Outputs of the prefix tokens, which attend as ever, and then those of the image tokens."""
    prefix = query.shape[2] - images.shape[2]
    if not prefix:
        return images
    return torch.cat([full_attention(query[:, :, :prefix], key, value), images], dim=2)


KNOCKOUTS_BY_NAME = {
    "self-only": self_only,
    "no-cls": no_cls,
    "no-cls-renormalised": no_cls_renormalised,
}


@dataclass(frozen=True)
class Intervention:
    """What takes the place of the model's own attention.

    kind: see ``INTERVENTIONS``. blocks: those it concerns. depth: number of blocks L. prefix:
    number of prefix tokens P.
    """

    kind: str
    blocks: frozenset[int]
    depth: int
    prefix: int

    def attends(self, kept: Tensor | None) -> list[Attend]:
        """How each block attends in a batch.

        Args:
            kept: bool [N, G], the image tokens that stay; for token removal, else None.
        """
        if self.kind in REMOVALS:
            assert kept is not None, "token removal is told which tokens stay"
            keys = F.pad(kept, (self.prefix, 0), value=True)[:, None, None]
            return [partial(attend_to_kept, kept=keys)] * self.depth
        knocked_out = partial(KNOCKOUTS_BY_NAME[self.kind], prefix=self.prefix)
        return [knocked_out if b in self.blocks else full_attention for b in range(self.depth)]


@dataclass(frozen=True)
class TokenRemoval:
    """Which image tokens of an image stay.

    keeps_class: the class-labelled ones, else the others. class_fraction: a patch is class-labelled
    when the mask covers at least this share of it. may_empty: whether an image may lose all its
    image tokens, because the model predicts from prefix tokens.
    """

    keeps_class: bool
    class_fraction: float
    may_empty: bool

    def kept(self, mask_fraction: np.ndarray) -> np.ndarray:
        """bool [G], for the covered share of each patch, uint8 [G]."""
        covered = mask_fraction.astype(np.float32) / np.float32(255)
        is_class = covered >= self.class_fraction
        return is_class if self.keeps_class else ~is_class


def make_intervention(config: ExtractConfig, subject: Subject) -> Intervention | None:
    """The configured intervention on this model; None where there is none.

    Raises:
        ModelError: it is about CLS, and the model has no CLS token.
        UsageError: the model has no such block.
    """
    kind, depth = config.intervene, subject.blocks
    if kind is None:
        return None
    if kind.startswith("no-cls") and "cls" not in subject.prefix_kinds:
        raise ModelError(
            f"{config.model} has no CLS token that --intervene {kind} could hide; choose a model "
            "with one, or self-only."
        )
    blocks = range(depth) if config.intervene_blocks is None else config.intervene_blocks
    if unknown := [block for block in blocks if block >= depth]:
        raise UsageError(
            f"--blocks names block {unknown[0]}, {config.model} has the blocks 0 to {depth - 1}."
        )
    return Intervention(kind, frozenset(blocks), depth, len(subject.prefix_kinds))


def token_removal(config: ExtractConfig, subject: Subject) -> TokenRemoval | None:
    """Which image tokens the configured intervention keeps; None where it removes none."""
    if config.intervene not in REMOVALS:
        return None
    return TokenRemoval(
        keeps_class=config.intervene == "drop-context",
        class_fraction=config.class_fraction,
        may_empty=subject.model.global_pool == "token",
    )


def require_masks(config: ExtractConfig, units: Sequence[Unit]) -> None:
    """Token removal goes by segmentation masks.

    Raises:
        UsageError: a shard has none.
    """
    without = [unit.path for unit in units if not unit.masks]
    if config.intervene in REMOVALS and without:
        raise UsageError(
            f"--intervene {config.intervene} goes by segmentation masks, and {without[0]} has "
            "none; give shards with mask.png members."
        )
