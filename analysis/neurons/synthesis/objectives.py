"""What an image is to raise: the mean over its patches of key coefficients (definitions §7).

The objective of an image is the mean, over the target's keys (b, j) and over patches i, of h_ij,
the output of fc1 in block b; or of GELU(h_ij), which the report found to give noise. In place of
the patches it can be the CLS token, or all tokens. The walk over the blocks stops behind the last
block that has a key.

*Diversity* (Olah et al. 2017, as in Lucid): of several images of one target, the mean cosine
between the Gram matrices of their features, over pairs of images. Features are the patches of
``mid`` with LayerNorm (no affine part), that is what the MLP of the key's block reads; the Gram
matrix is Σ_i x_i x_iᵀ over patches, [D, D]. Keys in several blocks: the mean over keys. It is never
formed, for ⟨G, G'⟩ = Σ_ik ⟨x_i, x'_k⟩².

Shape letters: N images, T tokens, P patches, D width, R images of a target, M targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from classlens.extractor.blocks import block_sites, embed

TOKENS = ("patches", "cls", "all")

Key = tuple[int, int]
"""Block and index of a neuron."""


@dataclass(frozen=True)
class Target:
    """What images are made for.

    label: the class, or the one that the neuron's value vector writes most. keys: whose mean is
    raised, the one of the largest alignment first. name: ``class3`` or ``neuron7-45``.
    """

    label: int
    keys: tuple[Key, ...]
    name: str

    @property
    def depth(self) -> int:
        """Number of blocks that its keys need."""
        return 1 + max(block for block, _ in self.keys)


class Objective(NamedTuple):
    """activation: mean key coefficient of each image, float32 [N]. similarity: [M]; 0 if R is 1."""

    activation: Tensor
    similarity: Tensor


def objective(
    model: VisionTransformer,
    images: Tensor,
    targets: Sequence[Target],
    *,
    images_per_target: int = 1,
    tokens: str = "patches",
    after_activation: bool = False,
    with_similarity: bool = False,
) -> Objective:
    """The terms of the objective.

    Args:
        images: normalised, [N, 3, H, W], those of a target one after another.
        targets: M = N / R of them, none deeper than the one before it, so that images leave the
            walk from the end.
        tokens: one of ``TOKENS``; ``cls`` is the first token of a model that has one.
    """
    prefix = model.num_prefix_tokens
    chosen = {"patches": slice(prefix, None), "cls": slice(0, 1), "all": slice(None)}[tokens]
    each = images_per_target
    depths = [target.depth for target in targets]
    assert depths == sorted(depths, reverse=True)
    assert len(images) == each * len(targets)
    activation_N = torch.zeros(len(images), device=images.device)
    similarity_M = torch.zeros(len(targets), device=images.device)
    x = embed(model, images)
    for index in range(depths[0]):
        left = sum(depth > index for depth in depths)
        block = model.blocks[index]
        assert isinstance(block, Block | ResPostBlock)
        sites = block_sites(block, x[: each * left], {"key_mlp", "mid"})
        x = sites["resid"]
        here = [
            (m, j, len(target.keys))
            for m, target in enumerate(targets[:left])
            for b, j in target.keys
            if b == index
        ]
        if not here:
            continue
        m, j, of = torch.tensor(here, device=images.device).T
        rows = (each * m[:, None] + torch.arange(each, device=images.device)).flatten()
        neurons, of_each = j.repeat_interleave(each), of.repeat_interleave(each)
        key_Nt = sites["key_mlp"][rows, chosen, neurons].float()
        if after_activation:
            assert isinstance(block.mlp, Mlp)
            key_Nt = block.mlp.act(key_Nt)
        activation_N = activation_N.index_add(0, rows, key_Nt.mean(1) / of_each)
        if with_similarity:
            mid = sites["mid"][:, prefix:].float()
            cosine_M = gram_similarity(mid.unflatten(0, (left, each)))
            similarity_M = similarity_M.index_add(0, m, cosine_M[m] / of)
    return Objective(activation_N, similarity_M)


def gram_similarity(features_MRPD: Tensor) -> Tensor:
    """Mean cosine between the Gram matrices of R ≥ 2 images of each target, [M]; see above."""
    R = features_MRPD.shape[1]
    x = F.layer_norm(features_MRPD, features_MRPD.shape[-1:])
    products_MRR = torch.einsum("mrpd,msqd->mrspq", x, x).square().sum((-2, -1))
    norm_MR = products_MRR.diagonal(dim1=1, dim2=2).sqrt()
    cosine_MRR = products_MRR / (norm_MR[:, :, None] * norm_MR[:, None, :])
    return (cosine_MRR.sum((1, 2)) - R) / (R * (R - 1))
