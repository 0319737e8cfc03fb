"""Network Dissection: how much of each class's pixels a neuron is active on (Bau et al. 2017).

A neuron is active at a patch whose activation is above its threshold. An image shows one labelled
class, and of each patch the covered share is known in whole units of 1/255. Activity is constant on
a patch, so that the area of both is the sum of the shares of active patches: whole numbers, exact.

Shape letters: N images, T tokens, G patches, F neurons, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from classlens.extractor.reducers.protocol import Found, Reduce, Targets, UnitPart
from classlens.extractor.schema import PATCH_AREA

if TYPE_CHECKING:
    from classlens.extractor.shards import Decoded


@dataclass(frozen=True, eq=False)
class DissectionAccumulator:
    """Areas of activity, of classes, and of both, by neuron and class.

    prefix, patches: numbers of tokens. thresholds: float32 [L, F], the smallest activation that is
    above, on the model's device. counted: bool, of each place on the image axis, whether the image
    is among those that the thresholds come from. Images without a mask are not counted.
    """

    prefix: int
    patches: int
    thresholds: Tensor
    counted: np.ndarray

    @property
    def sites(self) -> Set[str]:
        """The keys of the MLP."""
        return frozenset({"key_mlp"})

    def known(
        self, images: Sequence[Decoded], arrays: Mapping[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """The covered share of each patch, uint8 [N, G]."""
        none = np.zeros(self.patches, np.uint8)
        covered = [none if i.mask_fraction is None else i.mask_fraction for i in images]
        return {"covered": torch.from_numpy(np.stack(covered))}

    def for_batch(self, targets: Targets) -> Reduce:
        """Reduces one block after another of a batch.

        The function returned gives ``area`` int32 [N, 2, F], in units of 1/255 of a patch: of the
        image's class where a neuron is active, and of all where it is active.
        """
        assert targets.covered is not None
        covered_NG = targets.covered.float()
        weights_N2G = torch.stack([covered_NG, torch.full_like(covered_NG, PATCH_AREA)], dim=1)

        def reduce(block: int, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            patches_NGF = sites["key_mlp"][:, self.prefix :]
            active_NGF = patches_NGF >= self.thresholds[block]
            # Whole numbers up to 255 · G: float32 adds them up exactly to 2^24, in any order.
            return {"area": (weights_N2G @ active_NGF.float()).int()}

        return reduce

    def finite(self, found: Found, places: np.ndarray) -> np.ndarray:
        """Whether the first pass counted an image, bool [N]."""
        return self.counted[places]

    def merge(self, found: Found, part: UnitPart) -> None:
        """Adds the areas of a batch of good images to the unit's arrays."""
        arrays, masked_M, slots_M = part.arrays, part.masked, part.slots[part.masked]
        np.add.at(arrays["dissection/class_images"], slots_M, 1)
        np.add.at(arrays["dissection/class_area"], slots_M, part.class_area[masked_M])
        for block, active_F in enumerate(arrays["dissection/active_area"]):
            area_M2F = found[f"area/{block}"][masked_M].astype(np.uint32)
            active_F += area_M2F[:, 1].sum(axis=0, dtype=np.uint32)
            inside_SF = arrays["dissection/intersection"][block]
            for slot, inside_F in zip(slots_M, area_M2F[:, 0], strict=True):
                inside_SF[slot] += inside_F
