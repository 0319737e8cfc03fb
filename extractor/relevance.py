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
from classlens.extractor.errors import UsageError
from classlens.extractor.models import predict
from classlens.extractor.pictures import Pictures
from classlens.extractor.prepare import Prepared
from classlens.extractor.reducers.attribution import AttributionReducer
from classlens.extractor.schema import read_layout
from classlens.extractor.scorer import Scorer

Relevance = Callable[[Pictures], Tensor]
"""Pictures of N images -> relevance [N, G]."""


def make_methods(
    prepared: Prepared,
    scorer: Scorer,
    names: Sequence[str],
    *,
    store: Path | None,
    probes: Path | None = None,
    convention: str = "corrected",
    blocks: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Relevance]:
    """The methods of these names.

    Args:
        scorer: the model, on its device and in its dtype, without reducers.
        store: where the class-embedding relevance is read; None computes it.
        probes: store of linear probes on the same images, for ``linear-probe``.
        convention: of the class-embedding relevance, where it is computed.
        blocks: whose class-embedding and linear-probe relevance is summed; all when None.
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

    def linear_probe(pictures: Pictures) -> Tensor:
        assert probes is not None, "linear probes are read from their store"
        return probe_relevance(probes, pictures.targets.images.numpy(), blocks)

    made: dict[str, Relevance] = {
        "class-embedding": class_embedding,
        "chefer": lambda pictures: chefer_relevance(
            model, images(pictures), labels(pictures), scorer.embeddings
        ),
        "rollout": lambda pictures: rollout_relevance(model, images(pictures)),
        "linear-probe": linear_probe,
        "random": lambda pictures: random_relevance(
            pictures.targets.images, prepared.layout.patches, seed
        ),
    }
    return {name: made[name] for name in names}


def stored_relevance(store: Path, images: np.ndarray, blocks: Sequence[int] | None) -> Tensor:
    """Class-embedding relevance of ascending places on the image axis, summed over blocks."""
    relevance_NLG, exponent_NL = (
        _read(store, path, images) for path in ("attribution/relevance", "attribution/exponent")
    )
    relevance_NLG = np.ldexp(relevance_NLG.astype(np.float64), exponent_NL[..., None])
    return torch.from_numpy(relevance_NLG[:, _chosen(blocks)].sum(axis=1))


def probe_relevance(probes: Path, images: np.ndarray, blocks: Sequence[int] | None) -> Tensor:
    """Minus the label's ranks under each token's linear probes of ``resid``, summed over blocks.

    As the paper's code: a patch is the more relevant the better probes of it, trained in its place
    on block outputs, identify the class. Of ascending places on the image axis.

    Raises:
        UsageError: there are no probes of ``resid``.
    """
    layout = read_layout(probes)
    if "resid" not in layout.streams:
        raise UsageError(
            f"{probes} has no probes of the stream resid, whose ranks make the relevance; run "
            "`classlens probe` with --streams that include resid."
        )
    rank_NLST = _read(probes, "scores/rank", images)
    rank_NLG = rank_NLST[:, _chosen(blocks), layout.streams.index("resid"), layout.prefix :]
    return torch.from_numpy(-rank_NLG.sum(axis=1, dtype=np.int64))


def _read(store: Path, path: str, images: np.ndarray) -> np.ndarray:
    """An array of a store at ascending places on the image axis."""
    span = slice(int(images[0]), int(images[-1]) + 1)
    return np.asarray(zarr.open_array(str(store / path), mode="r")[span])[images - images[0]]


def _chosen(blocks: Sequence[int] | None) -> slice | list[int]:
    return slice(None) if blocks is None else list(blocks)


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
