"""The pictures of a plan once more, for what needs pixels outside an extraction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from classlens.extractor.prepare import Prepared
from classlens.extractor.reducers.protocol import Targets
from classlens.extractor.schema import Status
from classlens.extractor.shards import Decoded, Planned, decode, kept_tokens, planned_images


@dataclass(frozen=True)
class Pictures:
    """A batch of images that could be read.

    pixels: uint8 [N, H, W, 3], after resize and crop. targets: labels and places on the image axis.
    mask_fraction: uint8 [N, G], share of each patch that shows the class; None without masks.
    """

    pixels: Tensor
    targets: Targets
    mask_fraction: np.ndarray | None


def read_pictures(
    prepared: Prepared, batch_size: int, images: Iterable[int] | None = None
) -> Iterator[Pictures]:
    """Batches of the planned images, in order; bad images are left out.

    Args:
        images: places on the image axis; all when None.

    Raises:
        ShardError: a tar no longer holds what was planned.
    """
    decoder = prepared.image_decoder()
    shape = (*decoder.geometry.input_size, 3)

    def decoded(image: Planned) -> tuple[int, Decoded, np.ndarray]:
        pixels = np.empty(shape, np.uint8)
        return image.row["image"], decode(image, decoder, pixels), pixels

    planned = _planned(prepared, None if images is None else set(images))
    with ThreadPoolExecutor(prepared.config.decoding_threads, "classlens-decode") as pool:
        while part := list(islice(planned, batch_size)):
            good = [x for x in pool.map(decoded, part) if x[1].status is Status.OK]
            if not good:
                continue
            kept = kept_tokens([image for _, image, _ in good])
            fractions = [f for _, image, _ in good if (f := image.mask_fraction) is not None]
            yield Pictures(
                pixels=torch.from_numpy(np.stack([pixels for *_, pixels in good])),
                targets=Targets(
                    labels=torch.tensor([image.label for _, image, _ in good]),
                    images=torch.tensor([place for place, *_ in good]),
                    kept=None if kept is None else torch.from_numpy(kept),
                ),
                mask_fraction=np.stack(fractions) if len(fractions) == len(good) else None,
            )


def _planned(prepared: Prepared, images: set[int] | None) -> Iterator[Planned]:
    rows = prepared.plan.manifest
    for unit in prepared.plan.units:
        of_unit = rows.filter(rows["unit"] == unit.index)
        if images is not None and images.isdisjoint(of_unit["image"]):
            continue
        for image in planned_images(unit, of_unit):
            if images is None or image.row["image"] in images:
                yield image
