"""Activations of chosen key neurons at the patches of a batch of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from classlens.extractor.blocks import walk

if TYPE_CHECKING:
    from classlens.extractor.scorer import Scorer


@torch.inference_mode()
def key_activations(scorer: Scorer, pixels: Tensor, neurons_NLK: Tensor) -> Tensor:
    """``key_mlp`` of K neurons of each block at the image tokens, float32 [N, L, K, G] on the CPU.

    Args:
        pixels: uint8 [N, H, W, 3], after resize and crop.
        neurons_NLK: int64, of each image and block.
    """
    prefix = scorer.model.num_prefix_tokens
    blocks = walk(scorer.model, scorer.images(pixels), scorer.convention, {"key_mlp"})
    found = []
    for block, sites in blocks:
        patches_NGF = sites["key_mlp"][:, prefix:]
        index_NK = neurons_NLK[:, block].to(scorer.device)
        index_NGK = index_NK[:, None].expand(-1, patches_NGF.shape[1], -1)
        found.append(patches_NGF.gather(2, index_NGK).transpose(1, 2).float().cpu())
    return torch.stack(found, dim=1)
