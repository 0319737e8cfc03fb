"""Relevance of an image's patches for its label, by the attribution and by its baselines.

Every method gives [N, G], larger for what counts more. Chefer's relevance and rollout need whole
attention matrices, so they run the model with `attend` functions that keep them, in float32.

Shape letters: N images, L blocks, H heads, T tokens, G patches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zarr
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from classlens.extractor.blocks import walk
from classlens.extractor.models import predict
from classlens.extractor.pictures import Pictures
from classlens.extractor.prepare import Prepared
from classlens.extractor.reducers.attribution import AttributionReducer
from classlens.extractor.scorer import Scorer

Relevance = Callable[[Pictures], Tensor]
"""Pictures of N images -> relevance [N, G]."""


def make_methods(
    prepared: Prepared,
    scorer: Scorer,
    names: Sequence[str],
    *,
    store: Path | None,
    convention: str = "corrected",
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Relevance]:
    """The methods of these names.

    Args:
        scorer: the model, on its device and in its dtype, without reducers.
        store: where the class-embedding relevance is read; None computes it.
        convention: of the class-embedding relevance, where it is computed.
        blocks: whose class-embedding relevance is summed; all when None.
        seed: of ``random``.
    """
    model = scorer.model
    if scorer.dtype != torch.float32 and {"chefer", "rollout"} & set(names):
        model = copy.deepcopy(model).float()  # gradients by autograd would underflow

    def images(pictures: Pictures) -> Tensor:
        return scorer.images(pictures.pixels).float()

    def labels(pictures: Pictures) -> Tensor:
        return pictures.targets.labels.to(scorer.device)

    def class_embedding(pictures: Pictures) -> Tensor:
        if store is not None:
            return stored_relevance(store, pictures.targets.images.numpy(), blocks)
        return class_embedding_relevance(prepared, scorer, pictures, convention, blocks)

    made: dict[str, Relevance] = {
        "class-embedding": class_embedding,
        "chefer": lambda pictures: chefer_relevance(
            model, images(pictures), labels(pictures), scorer.embeddings
        ),
        "rollout": lambda pictures: rollout_relevance(model, images(pictures)),
        "random": lambda pictures: random_relevance(
            pictures.targets.images, prepared.layout.patches, seed
        ),
    }
    return {name: made[name] for name in names}


def stored_relevance(store: Path, images: np.ndarray, blocks: Sequence[int] | None) -> Tensor:
    """Class-embedding relevance of ascending places on the image axis, summed over blocks."""
    span = slice(int(images[0]), int(images[-1]) + 1)
    relevance_NLG, exponent_NL = (
        np.asarray(zarr.open_array(str(store / path), mode="r")[span])[images - images[0]]
        for path in ("attribution/relevance", "attribution/exponent")
    )
    relevance_NLG = np.ldexp(relevance_NLG.astype(np.float64), exponent_NL[..., None])
    chosen = slice(None) if blocks is None else list(blocks)
    return torch.from_numpy(relevance_NLG[:, chosen].sum(axis=1))


@torch.inference_mode()
def class_embedding_relevance(
    prepared: Prepared,
    scorer: Scorer,
    pictures: Pictures,
    convention: str,
    blocks: Sequence[int] | None,
) -> Tensor:
    """What the store would hold with this convention, before its rounding, summed over blocks."""
    space = prepared.subject.space.to(dtype=torch.float32, device=scorer.device)
    reducer = AttributionReducer(scorer.model, space, convention)
    labels = pictures.targets.labels.to(scorer.device)
    walked = walk(scorer.model, scorer.images(pictures.pixels), convention, reducer.sites)
    maps = [
        reducer.head_relevance(block, sites, labels).sum(dim=1)
        for block, sites in walked
        if blocks is None or block in blocks
    ]
    return torch.stack(maps).double().sum(dim=0)


def chefer_relevance(
    model: VisionTransformer, images: Tensor, labels: Tensor, embeddings: Tensor | None = None
) -> Tensor:
    """R = I, then block by block R += mean_h(max(∂l_y/∂A · A, 0)) · R; the row of CLS.

    One backward pass for all images: no image's logit l_y depends on another's attention. (Chefer,
    Gur and Wolf, ICCV 2021, for self-attention.)

    Args:
        images: normalised [N, 3, H, W], on the model's device. labels: y, int64 [N].
        embeddings: see `predict`.
    """
    with torch.enable_grad():
        maps, x = _attention_maps(model, images)
        logits = predict(model, x, embeddings=embeddings)
        label_logit = logits.gather(1, labels[:, None]).sum()
        gradients = torch.autograd.grad(label_logit, maps)
    tokens = maps[0].shape[-1]
    identity_TT = torch.eye(tokens, dtype=maps[0].dtype, device=images.device)
    relevance_NTT = identity_TT.expand(len(images), -1, -1)
    for attention_NHTT, gradient_NHTT in zip(maps, gradients, strict=True):
        cam_NTT = (gradient_NHTT * attention_NHTT.detach()).clamp(min=0).mean(dim=1)
        relevance_NTT = relevance_NTT + cam_NTT @ relevance_NTT
    return relevance_NTT[:, 0, model.num_prefix_tokens :]


@torch.no_grad()
def rollout_relevance(model: VisionTransformer, images: Tensor) -> Tensor:
    """Attention rollout: the row of CLS of Â_L · … · Â_1, Â = (mean_h A + I) / 2.

    The rows of Â sum to one as they are. (Abnar and Zuidema, ACL 2020.) It knows no label.

    Args:
        images: normalised [N, 3, H, W], on the model's device.
    """
    maps, _ = _attention_maps(model, images)
    tokens = maps[0].shape[-1]
    identity_TT = torch.eye(tokens, dtype=maps[0].dtype, device=images.device)
    row_N1T = identity_TT[:1].expand(len(images), 1, -1)
    for attention_NHTT in reversed(maps):
        row_N1T = (row_N1T @ attention_NHTT.mean(dim=1) + row_N1T) / 2
    return row_N1T[:, 0, model.num_prefix_tokens :]


def random_relevance(images: Tensor, patches: int, seed: int) -> Tensor:
    """Uniform numbers drawn for each place on the image axis, whatever the batch it comes in."""
    drawn = [np.random.default_rng([seed, int(image)]).random(patches) for image in images]
    return torch.from_numpy(np.stack(drawn))


def _attention_maps(model: VisionTransformer, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """A of every block, [N, H, T, T], part of the graph where gradients are on; the last output."""
    maps: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
        if torch.is_grad_enabled() and not attention.requires_grad:
            attention.requires_grad_()  # of the first block: nothing before it has a gradient
        maps.append(attention)
        return attention @ value

    x = None
    attends = [attend] * len(model.blocks)
    for _, sites in walk(model, images, "corrected", frozenset(), attends=attends):
        x = sites["resid"]
    assert x is not None
    return maps, x
