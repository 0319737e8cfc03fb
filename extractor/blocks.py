"""The sites of a block, and the walk over the blocks.

A *site* is a named activation of a block. Pre-norm block b maps x_b to x'_b = x_b + a_b and
x_{b+1} = x'_b + m_b:

- ``resid`` x_{b+1}, ``mid`` x'_b, ``attn`` a_b, ``mlp`` m_b, each [N, T, D], after LayerScale
  (pre-norm) or after the post-norm (``ResPostBlock``), that is: what the sublayer really adds;
- ``key_mlp`` the output of fc1 before the activation, [N, T, F];
- ``key_attn`` the concatenated heads that enter ``attn.proj``, [N, T, D];
- ``query``, ``key``, ``value`` of attention as they meet the scaled dot product, [N, H, T, D / H];
- ``gate`` what multiplies the concatenated heads, [N, T, D], of gated attention only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set

from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from classlens.extractor.schema import STREAMS

Sites = dict[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key, value [N, H, T, D / H] -> what the heads make of them, of the same shape."""


def full_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q·Kᵀ / √d)·V, the model's own attention."""
    return F.scaled_dot_product_attention(query, key, value)


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """x_0: tokens with position embedding, [N, T, D], from normalised images [N, 3, H, W]."""
    x = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(model.patch_drop(x))


def block_sites(
    block: Block | ResPostBlock,
    x: Tensor,
    wanted: Set[str] = frozenset(STREAMS),
    attend: Attend = full_attention,
) -> Sites:
    """The wanted sites of one block for its input x_b, [N, T, D], and always ``resid``."""
    if isinstance(block, ResPostBlock):
        attn, inner = attention(block.attn, x, attend)
        attn = block.drop_path1(block.norm1(attn))
        mid = x + attn
        mlp, key_mlp = mlp_output(block.mlp, mid)
        mlp = block.drop_path2(block.norm2(mlp))
    else:
        attn, inner = attention(block.attn, block.norm1(x), attend)
        attn = block.drop_path1(block.ls1(attn))
        mid = x + attn
        mlp, key_mlp = mlp_output(block.mlp, block.norm2(mid))
        mlp = block.drop_path2(block.ls2(mlp))
    sites = {"resid": mid + mlp, "mid": mid, "attn": attn, "mlp": mlp, **inner, **key_mlp}
    return {name: value for name, value in sites.items() if name in wanted or name == "resid"}


def attention(module: nn.Module, x: Tensor, attend: Attend) -> tuple[Tensor, Sites]:
    """The output of an attention module for its input [N, T, D], and the sites inside it."""
    assert isinstance(module, Attention)
    N, T, _ = x.shape
    qkv = module.qkv(x).reshape(N, T, 3, module.num_heads, module.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = module.q_norm(query), module.k_norm(key)
    heads = attend(query, key, value).transpose(1, 2).reshape(N, T, module.attn_dim)
    heads = module.norm(heads)
    inner = {"query": query, "key": key, "value": value}
    if module.gate is not None:
        inner["gate"] = module.gate(x).sigmoid()
        heads = heads * inner["gate"]
    inner["key_attn"] = heads
    return module.proj_drop(module.proj(heads)), inner


def mlp_output(module: nn.Module, x: Tensor) -> tuple[Tensor, Sites]:
    """The output of an MLP for its input [N, T, D]; and ``key_mlp``, of a plain fc1-fc2 MLP."""
    if not isinstance(module, Mlp):
        return module(x), {}
    key_mlp = module.fc1(x)
    hidden = module.norm(module.drop1(module.act(key_mlp)))
    return module.drop2(module.fc2(hidden)), {"key_mlp": key_mlp}


def renorms(model: VisionTransformer, convention: str) -> bool:
    """Whether sublayer outputs of pre-norm blocks pass their block's norm, see `walk`."""
    return convention == "vilas2023" and model.global_pool == "avg"


def walk(
    model: VisionTransformer,
    images: Tensor,
    convention: str,
    wanted: Set[str] = frozenset(STREAMS),
    sites_of: Callable[..., Sites] = block_sites,
    attends: Sequence[Attend] | None = None,
) -> Iterator[tuple[int, Sites]]:
    """Block by block, the sites of a batch; a block's activations die with the block.

    Args:
        images: normalised, [N, 3, H, W].
        convention: ``vilas2023`` passes ``attn`` and ``mlp`` of GAP models through the block's
            ``norm1`` and ``norm2`` (post-norm blocks, like the paper's GAP model, have done so
            already); ``corrected`` leaves them as added.
        wanted: names of sites; ``resid`` is always there.
        sites_of: `block_sites`, or a compiled one.
        attends: one a block; the model's own attention when None.
    """
    renorm = renorms(model, convention)
    x = embed(model, images)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block | ResPostBlock)
        sites = sites_of(block, x, wanted, full_attention if attends is None else attends[index])
        x = sites["resid"]
        if renorm and isinstance(block, Block):
            for site, norm in (("attn", block.norm1), ("mlp", block.norm2)):
                if site in sites:
                    sites[site] = norm(sites[site])
        yield index, sites
