"""What the images of a unit say of every neuron: exemplars, class averages, quantiles.

A neuron is a key-value pair of a block's MLP, its activation the key's coefficient *before* the
activation function (site ``key_mlp``), at the image tokens. Added up in one pass:

- **exemplars** (MILAN): the 15 images of largest activation over patches, ties to the lower place
  on the image axis, each with the codes of all its patches (`classlens.extractor.codes`);
- **class averages**: an image's mean over patches in whole units of 2^-16, summed by class;
- **histograms of codes**, of which any quantile can be read: of all patches where an image has up
  to 64, else of 32 drawn for each image, the same ones for all neurons.

Sums are of integers and exemplars are a largest set, so that units merge exactly, in any order and
grouping: an estimating sketch (t-digest, KLL) would not, and its error would depend on the order.

Only images whose activation exceeds the unit's fifteenth so far can become exemplars. Their codes
alone are computed, an ever smaller part of a batch.

Shape letters: N images, T tokens, G patches, S patches drawn of an image, F neurons, P pairs of an
image and a neuron, C = 256 codes, X = 15 exemplars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from classlens.extractor.reducers.drawing import drawn_patches
from classlens.extractor.reducers.exemplars import merge_exemplars
from classlens.extractor.reducers.protocol import Found, Reduce, Targets, UnitPart
from classlens.extractor.schema import EXEMPLARS, MEAN_UNIT
from classlens.kernels.neuron_sums import SumsImpl, neuron_sums, pair_codes

if TYPE_CHECKING:
    from classlens.extractor.shards import Decoded

COUNT_ALL, SAMPLED_PATCHES = 64, 32
LARGEST_MEAN = 2.0**24
"""Means are clipped there, so that sums over a million images fit int64."""


@dataclass(frozen=True)
class NeuronsAccumulator:
    """Exemplars, class averages and histograms of every neuron.

    prefix: number of prefix tokens. impl: of `classlens.kernels.neuron_sums.neuron_sums`.
    """

    prefix: int
    impl: SumsImpl = "torch"

    @property
    def sites(self) -> Set[str]:
        """The keys of the MLP."""
        return frozenset({"key_mlp"})

    def for_batch(self, targets: Targets) -> Reduce:
        """Reduces one block after another of a batch.

        The function returned gives ``mean`` float32 [N, F], ``histogram`` int32 [F, C], and of each
        pair that may be an exemplar ``image`` int64 [P] (in the batch, ascending), ``neuron`` int64
        [P], ``value`` float32 [P] and ``codes`` uint8 [P, G].
        """
        tokens_NS = None

        def reduce(block: int, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            nonlocal tokens_NS
            x_NTF = sites["key_mlp"]
            if tokens_NS is None:
                tokens_NS = self._tokens_to_count(targets, x_NTF.shape[1])
            peak_NF, mean_NF, histogram_FC = neuron_sums(
                x_NTF, self.prefix, tokens_NS, impl=self.impl
            )
            floor_F = None if targets.floor is None else targets.floor[block]
            image_P, neuron_P = _candidates(peak_NF, floor_F)
            return {
                "mean": mean_NF,
                "histogram": histogram_FC,
                "image": image_P,
                "neuron": neuron_P,
                "value": peak_NF[image_P, neuron_P],
                "codes": pair_codes(x_NTF, self.prefix, image_P, neuron_P, impl=self.impl),
            }

        return reduce

    def known(
        self, images: Sequence[Decoded], arrays: Mapping[str, np.ndarray]
    ) -> dict[str, Tensor]:
        """The floor: the unit's fifteenth largest value of each neuron so far, float32 [L, F]."""
        return {"floor": torch.from_numpy(arrays["neurons/exemplar_value"].min(axis=-1))}

    def finite(self, found: Found, places: np.ndarray) -> np.ndarray:
        """Whether all means of an image are finite, and so all activations, bool [N]."""
        means = [mean for name, mean in found.items() if name.startswith("mean/")]
        return np.logical_and.reduce([np.isfinite(mean).all(axis=1) for mean in means])

    def merge(self, found: Found, part: UnitPart) -> None:
        """Adds what was found in a batch of good images to the unit's arrays."""
        arrays = part.arrays
        np.add.at(arrays["neurons/class_images"], part.slots, 1)
        for block in range(len(arrays["neurons/histogram"])):
            mean_NF, sums_SF = found[f"mean/{block}"], arrays["neurons/class_sums"][block]
            clipped_NF = np.clip(mean_NF, -LARGEST_MEAN, LARGEST_MEAN)
            whole_NF = np.rint(clipped_NF / np.float32(MEAN_UNIT)).astype(np.int64)
            for slot, whole_F in zip(part.slots, whole_NF, strict=True):
                sums_SF[slot] += whole_F
            arrays["neurons/histogram"][block] += found[f"histogram/{block}"].astype(np.uint32)
            merge_exemplars(
                arrays["neurons/exemplar_value"][block],
                arrays["neurons/exemplar_image"][block],
                arrays["neurons/exemplar_codes"][block],
                neuron_P=found[f"neuron/{block}"],
                value_P=found[f"value/{block}"],
                image_P=part.places[found[f"image/{block}"]],
                codes_PG=found[f"codes/{block}"],
            )

    def _tokens_to_count(self, targets: Targets, tokens: int) -> Tensor:
        """The image tokens whose activations are counted, int64 [N, S]."""
        patches = tokens - self.prefix
        assert targets.keys is not None
        if patches <= COUNT_ALL:
            places_S = torch.arange(self.prefix, tokens, device=targets.keys.device)
            return places_S.expand(len(targets.keys), -1)
        return drawn_patches(targets.keys, patches, SAMPLED_PATCHES) + self.prefix


def _candidates(peak_NF: Tensor, floor_F: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pairs of image and neuron that may be among the unit's exemplars, int64 [P] each.

    All that are among the 15 of their batch, with ties, and above the floor: later images of a unit
    lose a tie.
    """
    least_F = peak_NF.topk(min(EXEMPLARS, len(peak_NF)), dim=0).values[-1]
    may_NF = peak_NF >= least_F
    if floor_F is not None:
        may_NF &= peak_NF > floor_F
    image_P, neuron_P = may_NF.nonzero(as_tuple=True)
    return image_P, neuron_P
