"""The perturbation test: keep n patches, drop the others, see whether the prediction holds (§5).

Negative test: the n most relevant patches are kept; a good relevance keeps the accuracy high.
Positive test: the n least relevant are kept; a good one lets it fall. Patches are dropped behind
the position embedding, so what is kept stays in its place and the cost falls with n.

Shape letters: N images, G patches, n kept patches, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import polars as pl
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from classlens.extractor.blocks import embed
from classlens.extractor.errors import ModelError, UsageError
from classlens.extractor.models import predict
from classlens.extractor.pictures import Pictures, read_pictures
from classlens.extractor.prepare import Prepared
from classlens.extractor.relevance import Relevance
from classlens.extractor.schema import RELEVANCE_METHODS
from classlens.extractor.scorer import DTYPES, Scorer

TESTS = ("negative", "positive")
ALL_COUNTS_UP_TO, DEFAULT_STEPS = 64, 25

SCHEMA = {
    "image": pl.Int32(),
    "method": pl.Enum(RELEVANCE_METHODS),
    "test": pl.Enum(TESTS),
    "kept": pl.Int16(),
    "right": pl.Boolean(),
}
"""Columns of what :func:`perturb` finds: place on the image axis, what was kept, and whether the
prediction is the label."""


def make_perturbed(prepared: Prepared) -> Scorer:
    """The model that is perturbed, on its device and in its dtype.

    Raises:
        ModelError: it does not predict from a CLS token, so that nothing is left without patches.
        UsageError: the store is of an intervention, which neither the test nor baselines apply.
    """
    model, intervene = prepared.subject.model, prepared.config.intervene
    if intervene is not None:
        raise UsageError(
            f"The store was extracted with --intervene {intervene}, and the perturbation test is "
            "of the model as it is; name the store extracted without --intervene."
        )
    if "cls" not in prepared.subject.prefix_kinds or model.global_pool != "token":
        raise ModelError(
            f"{prepared.config.model} does not predict from a CLS token, which the perturbation "
            "test keeps when all patches are dropped; choose a store of a model that does."
        )
    config = prepared.config
    return Scorer(
        prepared.subject,
        [],
        dtype=DTYPES[config.dtype],
        device=config.device,
        convention=config.convention,
    )


def kept_counts(patches: int, steps: int | None = None) -> list[int]:
    """The numbers of patches to keep, 0 and all of them included.

    Args:
        steps: this many even steps; None takes every number of up to 64 patches, and 25 steps of
            more.
    """
    if steps is None:
        steps = patches if patches <= ALL_COUNTS_UP_TO else DEFAULT_STEPS
    return np.unique(np.rint(np.linspace(0, patches, min(steps, patches) + 1)).astype(int)).tolist()


def by_relevance(relevance_NG: Tensor) -> Tensor:
    """Patches from the most to the least relevant, [N, G]; equal ones in their own order."""
    return relevance_NG.sort(dim=1, descending=True, stable=True).indices


@torch.inference_mode()
def predict_kept(
    model: VisionTransformer, x_NTD: Tensor, kept_Nn: Tensor, embeddings: Tensor | None = None
) -> Tensor:
    """The model's top class, [N], where only some patches go through its blocks.

    Args:
        x_NTD: `embed` of the images. kept_Nn: patches kept, in any order; prefix tokens stay.
        embeddings: see `predict`.
    """
    prefix, (images, _, width) = model.num_prefix_tokens, x_NTD.shape
    always = torch.arange(prefix, device=x_NTD.device).expand(images, -1)
    # Ascending, so that the result depends on the set alone.
    tokens_Nt = torch.cat([always, prefix + kept_Nn.sort(dim=1).values], dim=1)
    x = x_NTD.gather(1, tokens_Nt[..., None].expand(-1, -1, width))
    for block in model.blocks:
        x = block(x)
    return predict(model, x, embeddings=embeddings).float().argmax(dim=-1)


def perturb(
    prepared: Prepared,
    scorer: Scorer,
    methods: Mapping[str, Relevance],
    images: Iterable[int],
    counts: Sequence[int],
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Both tests of every method; one row for each image, method, test and count, see ``SCHEMA``.

    Args:
        images: places on the image axis; ones that can no longer be read are left out.
        counts: numbers of patches kept, 0 and all of them included.
        progress: called with (images done, images).

    Raises:
        ShardError: the shards no longer hold what was planned.
    """
    wanted, done = sorted(set(images)), 0
    frames = [pl.DataFrame(schema=SCHEMA)]
    for pictures in read_pictures(prepared, batch_size, wanted):
        frames += perturb_batch(scorer, methods, pictures, counts)
        done += len(pictures.pixels)
        if progress is not None:
            progress(done, len(wanted))
    return pl.concat(frames)


def perturb_batch(
    scorer: Scorer, methods: Mapping[str, Relevance], pictures: Pictures, counts: Sequence[int]
) -> Iterator[pl.DataFrame]:
    """A frame for each method, test and count."""
    with torch.inference_mode():
        x_NTD = embed(scorer.model, scorer.images(pictures.pixels))
    labels = pictures.targets.labels
    patches = x_NTD.shape[1] - scorer.model.num_prefix_tokens

    def right(kept_Nn: Tensor) -> np.ndarray:
        return (
            predict_kept(scorer.model, x_NTD, kept_Nn, scorer.embeddings).cpu() == labels
        ).numpy()

    none_NG = torch.arange(patches, device=scorer.device).expand(len(labels), -1)
    ends = {count: right(none_NG[:, :count]) for count in (0, patches)}  # alike for all methods
    for method, relevance in methods.items():
        order_NG = by_relevance(relevance(pictures)).to(scorer.device)
        for test in TESTS:
            ranked_NG = order_NG if test == "negative" else order_NG.flip(1)
            for count in counts:
                found = ends[count] if count in ends else right(ranked_NG[:, :count])
                yield pl.DataFrame(
                    {
                        "image": pictures.targets.images.numpy(),
                        "method": method,
                        "test": test,
                        "kept": count,
                        "right": found,
                    },
                    schema=SCHEMA,
                )
