"""Attribution of the class to image tokens through attention (paper §5), inside the pass.

For block b and the image's label, ℓ_b is the cross-entropy of softmax(E · LN_final(a_b[CLS]) + b),
a_b what attention adds. The relevance of patch j in head h is −∂ℓ_b/∂A_b[h, CLS, j]. a_b[CLS] is
linear in that row of A_b but for norms on the way, so the gradient is a closed form of the CLS
token's sites and the values.

Shape letters: N images, D width, H heads, T tokens, G patches, d width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from classlens.extractor.blocks import renorms
from classlens.extractor.errors import ModelError
from classlens.extractor.models import Subject
from classlens.extractor.reducers.protocol import Reduce, Targets
from classlens.extractor.schema import ArraySpec, Layout, attribution_arrays
from classlens.kernels.attribution import (
    class_loss_gradient,
    half_exponent,
    head_relevance,
    layer_norm_backward,
)
from classlens.kernels.class_space import ClassSpace


def require_attribution(subject: Subject, name: str) -> None:
    """Checks that the attribution is defined for a model.

    Raises:
        ModelError: it has no CLS token, or a norm on attention's way that is no LayerNorm.
    """
    if "cls" not in subject.prefix_kinds:
        raise ModelError(
            f"{name} has no CLS token, whose attention the attribution takes apart; leave out "
            "`--reduce attribution`, or choose a model with one."
        )
    for index, block in enumerate(subject.model.blocks):
        norms = [block.attn.norm, *([block.norm1] if isinstance(block, ResPostBlock) else [])]  # pyright: ignore
        for norm in norms:
            if not isinstance(norm, nn.Identity | nn.LayerNorm):
                raise ModelError(
                    f"Block {index} of {name} passes attention through a {type(norm).__name__}, "
                    "whose gradient is not known here; leave out `--reduce attribution`."
                )


@dataclass(frozen=True, eq=False)
class AttributionReducer:
    """Relevance of each patch in each block for the image's label.

    model: the one whose sites come in; its weights are read as they are then. space: on the model's
    device, in float32 (float64 for a float64 model). convention: ``vilas2023`` takes the softmax
    twice. per_head: also keep each head's.
    """

    model: VisionTransformer
    space: ClassSpace
    convention: str = "corrected"
    per_head: bool = False

    @property
    def sites(self) -> Set[str]:
        """What attention adds, the values, and what the norms on the way need."""
        wanted = {"attn", "value", "key_attn"}
        modules = [block.attn for block in self.model.blocks]
        if any(not isinstance(attn.norm, nn.Identity) for attn in modules):  # pyright: ignore
            wanted |= {"query", "key"}
        if any(attn.gate is not None for attn in modules):  # pyright: ignore
            wanted |= {"gate"}
        return frozenset(wanted)

    def arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        """The arrays it fills."""
        return attribution_arrays(layout)

    def for_batch(self, targets: Targets) -> Reduce:
        """Attributes one block after another of a batch.

        The function returned gives by array path: relevance [N, G] and, per head, [N, H, G], both
        in float32 and scaled by 2^-exponent so that float16 keeps them; exponent int32 [N].
        """

        def reduce(block: int, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            heads_NHG = self.head_relevance(block, sites, targets.labels)
            relevance_NG = heads_NHG.sum(dim=1)
            largest_N = torch.maximum(heads_NHG.abs().amax((1, 2)), relevance_NG.abs().amax(1))
            exponent_N = half_exponent(largest_N)
            reduced = {
                "attribution/relevance": torch.ldexp(relevance_NG, -exponent_N[:, None]),
                "attribution/exponent": exponent_N,
            }
            if self.per_head:
                scaled_NHG = torch.ldexp(heads_NHG, -exponent_N[:, None, None])
                reduced["attribution/head_relevance"] = scaled_NHG
            return reduced

        return reduce

    def head_relevance(self, index: int, sites: Mapping[str, Tensor], labels_N: Tensor) -> Tensor:
        """−∂ℓ_b/∂A_b[h, CLS, j] of block ``index``, [N, H, G]."""
        block = self.model.blocks[index]
        assert isinstance(block, Block | ResPostBlock)
        attn = block.attn
        assert isinstance(attn, Attention)
        gradient_ND = class_loss_gradient(
            sites["attn"][:, 0],
            self.space,
            labels_N,
            second_softmax=self.convention == "vilas2023",
        )
        if isinstance(block, ResPostBlock):
            projected_ND = attn.proj(sites["key_attn"][:, 0])
            gradient_ND = _before_norm(block.norm1, projected_ND, gradient_ND)
        else:
            if renorms(self.model, self.convention):
                added_ND = block.ls1(attn.proj(sites["key_attn"][:, 0]))
                gradient_ND = _before_norm(block.norm1, added_ND, gradient_ND)
            if not isinstance(block.ls1, nn.Identity):
                gradient_ND = gradient_ND * block.ls1.gamma
        gradient = gradient_ND @ attn.proj.weight.to(gradient_ND.dtype)
        if attn.gate is not None:
            gradient = gradient * sites["gate"][:, 0]
        if not isinstance(attn.norm, nn.Identity):
            heads = _cls_heads(sites["query"], sites["key"], sites["value"])
            gradient = _before_norm(attn.norm, heads, gradient)
        gradient_NHd = gradient.unflatten(1, (attn.num_heads, attn.head_dim))
        return head_relevance(gradient_NHd, sites["value"][:, :, self.model.num_prefix_tokens :])


def _before_norm(norm: nn.Module, x_ND: Tensor, gradient_ND: Tensor) -> Tensor:
    assert isinstance(norm, nn.LayerNorm)
    return layer_norm_backward(x_ND, gradient_ND, norm.weight, norm.eps)


def _cls_heads(query_NHTd: Tensor, key_NHTd: Tensor, value_NHTd: Tensor) -> Tensor:
    """The heads' output for the CLS token, concatenated, [N, H · d]."""
    cls_NH1d = query_NHTd[:, :, :1] * query_NHTd.shape[-1] ** -0.5
    row_NH1T = (cls_NH1d @ key_NHTd.transpose(-2, -1)).softmax(dim=-1)
    return (row_NH1T @ value_NHTd).flatten(1)
