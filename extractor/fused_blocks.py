"""A model's blocks by the fused kernel of CPUs with AMX or AVX-512, in place of `block_sites`."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from classlens.extractor.blocks import Attend, Sites, full_attention
from classlens.extractor.reducers.protocol import Reducer
from classlens.extractor.reducers.ranks import RanksReducer
from classlens.kernels.class_scores_cpu import ClassScoring
from classlens.kernels.tiles import PANEL, Units
from classlens.kernels.vit_block_cpu import VitBlockCpu


class FusedBlocks:
    """`classlens.extractor.blocks.block_sites` of one model's blocks.

    Copies the weights, so the model's may not change afterwards.
    """

    def __init__(
        self, model: VisionTransformer, units: Units, ranks: RanksReducer | None = None
    ) -> None:
        """Packs the blocks of a model that is `fusable`, in bfloat16 or float32 on a CPU.

        Args:
            units: the registers that multiply.
            ranks: whose streams `scoring` scores.

        Raises:
            RuntimeError: no such registers; no compiler, or it fails.
        """
        self._fused = {}
        for block in model.blocks:
            parts = _parts(block)
            assert parts is not None
            self._fused[block] = VitBlockCpu(units, **parts)
        self.units: Units = units
        self.ranks = ranks

    def __call__(
        self,
        block: Block | ResPostBlock,
        x: Tensor,
        wanted: Set[str],
        attend: Attend = full_attention,
        scoring: ClassScoring | None = None,
    ) -> Sites:
        fused = self._fused[block]
        qkv = fused.qkv(x)
        query, key, value = qkv.transpose(1, 2).unbind(0)
        if attend is full_attention:
            heads = fused.attention(qkv)
        else:
            heads = attend(query, key, value).transpose(1, 2).flatten(2)
        inner = {"query": query, "key": key, "value": value, "key_attn": heads}
        sites = {name: site for name, site in inner.items() if name in wanted}
        scored = () if self.ranks is None or scoring is None else self.ranks.streams
        return sites | fused.after_attention(x, heads, wanted, scoring, scored)

    def scoring(self, labels: Tensor) -> Callable[..., Sites]:
        """The same for images of these labels, [N], with what `ranks` finds beside the sites, by
        array path: the streams are scored while they lie in the cache and need not be wanted."""
        ranks = self.ranks
        assert ranks is not None
        ranks.space.require_labels(labels)

        def sites_of(
            block: Block | ResPostBlock,
            x: Tensor,
            wanted: Set[str],
            attend: Attend = full_attention,
        ) -> Sites:
            streams, tokens = len(ranks.streams), x.shape[1]
            scoring = ClassScoring(
                ranks.space, labels, self.units, streams=streams, tokens=tokens, topk=ranks.topk
            )
            return self(block, x, wanted, attend, scoring) | ranks.named(scoring.scores)

        return sites_of


def scored_by_blocks(
    reducers: Sequence[Reducer], units: Units, *, renormed: bool
) -> RanksReducer | None:
    """The reducer whose streams `FusedBlocks` can score: by its units, and as the block adds them.

    renormed: see `classlens.extractor.blocks.renorms`.
    """
    ranks = (r for r in reducers if isinstance(r, RanksReducer) and r.impl == units)
    return None if renormed else next(ranks, None)


def fusable(model: VisionTransformer) -> bool:
    """Whether every block is LayerNorm, attention, LayerNorm, and an MLP of two layers with a GELU
    between them, all widths multiples of 32, with LayerScale or without."""
    return all(_parts(block) is not None for block in model.blocks)


def _parts(block: nn.Module) -> dict[str, Any] | None:
    """What `VitBlockCpu` is made of; None where it does not know such blocks."""
    if not isinstance(block, Block):
        return None
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention or attn.gate is not None or type(mlp) is not Mlp:
        return None
    norms = {"norm1": block.norm1, "norm2": block.norm2}
    linears = {"qkv": attn.qkv, "proj": attn.proj, "fc1": mlp.fc1, "fc2": mlp.fc2}
    scales = {"attn_scale": block.ls1, "mlp_scale": block.ls2}
    absent = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
    kinds_fit = (
        all(isinstance(n, nn.LayerNorm) and n.bias is not None for n in norms.values())
        and all(isinstance(linear, nn.Linear) for linear in linears.values())
        and all(isinstance(scale, nn.Identity | LayerScale) for scale in scales.values())
        and all(isinstance(module, nn.Identity) for module in absent)
        and isinstance(mlp.act, nn.GELU)
        and mlp.act.approximate == "none"
    )
    widths = [attn.head_dim, *(n for linear in linears.values() for n in linear.weight.shape)]
    if not kinds_fit or any(width % PANEL for width in widths):
        return None
    gammas = {name: getattr(scale, "gamma", None) for name, scale in scales.items()}
    return {"num_heads": attn.num_heads, **norms, **linears, **gammas}
