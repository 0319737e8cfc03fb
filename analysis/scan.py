"""A store as lazy frames. Importing this module is quick; Polars and Zarr load when it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import polars as pl


def scan(
    store: str | Path, *, images: Sequence[int] | np.ndarray | pl.Series | None = None
) -> pl.LazyFrame:
    """The scores of a store, one row for each (image, block, stream, token).

    Only committed units are seen, and of them only images whose status is ``OK``. Filters on
    ``image``, ``key``, ``label``, ``prediction``, ``block``, ``stream``, ``token``, ``kind``,
    ``row`` and ``col`` that are joined by AND are pushed down: what they rule out is not read.
    Columns that are not used are not read either. Join filters cannot be pushed down; give the
    wanted images as ``images`` instead.

    Columns: image Int32, key String, label Int32, prediction Int32, block Int16 (from 0), stream
    Enum, token Int16 (prefix tokens first), kind Enum (cls, dist, register, patch), row Int16 and
    col Int16 (place in the patch grid; null for prefix tokens), mask_fraction Float32 (share of the
    patch that the class's mask covers, in [0, 1]; null for prefix tokens and without masks), rank
    Int32 (0 is best), identifiability Float64 (1 - rank / C), label_logit Float32, label_logprob
    Float32, top1 … topk Int32 (class indices). The scores of tokens that `extract --intervene`
    removed are null.

    Rows are ordered by unit, block, stream, image, token, where ``image // unit_images`` is the
    unit.

    Args:
        store: folder that ``classlens extract --out`` wrote.
        images: values of ``image`` to keep; all when None. Order and repetition do not matter.

    Raises:
        StoreError: there is no store. While the frame is collected: a committed unit's file is
            missing or damaged (Polars before 2.0 wraps this error in a ComputeError).
        UsageError: a value in ``images`` is not a place on the store's image axis.
    """
    from classlens.analysis.source import scan_scores

    return scan_scores(Path(store), images)


def scan_memories(
    store: str | Path, *, images: Sequence[int] | np.ndarray | pl.Series | None = None
) -> pl.LazyFrame:
    """The memories of a store, one row for each (image, block, sublayer, token): paper §4.3.

    Columns: image Int32, key String, label Int32, prediction Int32, block Int16 (from 0), sublayer
    Enum (attn, mlp), token Int16, kind Enum, row Int16, col Int16, as in :func:`scan`; then
    Boolean: agreement (one of the token's 5 top value vectors is among the 5 top ones of the
    label), agreement_control (of another class, drawn once an image), agreement_text (one of the
    token's has the label among its own 5 top classes), agreement_text_control, composed (the
    sublayer's top class is the top class of one of the token's).

    Images, filters and order are as in :func:`scan`, with the sublayer in place of the stream.

    Args:
        images: values of ``image`` to keep; all when None.

    Raises:
        StoreError: as :func:`scan`.
        UsageError: the store was extracted without ``--reduce memories``; a value in ``images`` is
            not a place on the store's image axis.
    """
    from classlens.analysis.memory_source import scan_flags

    return scan_flags(Path(store), images)


def scan_images(store: str | Path) -> pl.LazyFrame:
    """The planned images of a store's committed units, bad ones included, one row for each.

    Columns: image Int32, key String, label Int32 (null when missing or not a number), prediction
    Int32 (null unless the status is ok), status Enum (lower-case names of
    :class:`classlens.extractor.schema.Status`), unit Int32, shard String (path of the tar), offset
    Int64 and size Int64 (bytes of the picture in the tar). Ordered by image.

    Raises:
        StoreError: there is no store. While the frame is collected: a committed unit's file is
            missing or damaged (Polars before 2.0 wraps this error in a ComputeError).
    """
    from classlens.analysis.source import scan_manifest

    return scan_manifest(Path(store))


def scan_attribution(
    store: str | Path,
    *,
    heads: bool = False,
    images: Sequence[int] | np.ndarray | pl.Series | None = None,
) -> pl.LazyFrame:
    """The attribution of a store (paper §5), one row for each (image, block, patch), or head.

    ``relevance`` is −∂ℓ/∂A[h, CLS, patch], ℓ the cross-entropy of the block's attention output at
    the CLS token against the image's label: what more attention to the patch would take off the
    loss. Summed over heads, or of each head. Images, filters and order are as in :func:`scan`;
    conditions on ``relevance`` are not pushed down.

    Columns: image Int32, key String, label Int32, prediction Int32, block Int16, head Int16 (with
    ``heads`` only), row Int16, col Int16, relevance Float32 (eleven significant bits, fewer for
    what is 2^29 times smaller than the largest of its image and block).

    Args:
        heads: the rows of each head, of a store that keeps them.

    Raises:
        StoreError: as in :func:`scan`.
        UsageError: the store holds no attribution, or none of each head; or ``images`` has a value
            that is not a place on the store's image axis.
    """
    from classlens.analysis.attribution import scan_relevance

    return scan_relevance(Path(store), heads, images)
