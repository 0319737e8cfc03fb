"""Whether the key-value memories a token activates belong to its image's class (paper §4.3).

The top value vectors of a token are those of its 5 largest coefficients, taken with their sign:
``key_mlp`` before the activation, ``key_attn``. `classlens.extractor.value_vectors` says what value
vectors are. A token has, as bits of one byte:

- ``agreement``: one of them is among the 5 value vectors v_j with the largest E_c·v_j of all, c the
  label (the paper's code);
- ``agreement_text``: one of them has c among its own 5 classes with the largest E_c·v_j (its text);
- both again for a control class, see `control_classes`;
- ``composed``: the top class of the sublayer's output is the top class of one of them.

Shape letters: N images, T tokens, C classes, F value vectors of a sublayer, K = 5 of them, J = 5
classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from classlens.extractor.reducers.drawing import drawn
from classlens.extractor.reducers.protocol import Reduce, Targets
from classlens.extractor.schema import (
    INVALID_FLAGS,
    MEMORY_FLAGS,
    MEMORY_FLAGS_PATH,
    SUBLAYERS,
    ArraySpec,
    Layout,
    memory_arrays,
)
from classlens.extractor.value_vectors import (
    KEPT,
    ValueTables,
    value_tables,
    value_vectors,
)
from classlens.kernels.class_scores import Impl, class_scores
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.key_topk import key_topk
from classlens.kernels.tiles import UNITS

TOP1_PATH = "scores/top1"


def control_classes(targets: Targets, num_classes: int) -> Tensor:
    """A class other than the label for each image, int64 [N].

    Drawn by the image's place alone, so that it depends on neither batches nor their order; all
    other classes are equally likely.
    """
    h = drawn(targets.images)
    return (targets.labels + 1 + h % (num_classes - 1)) % num_classes


@dataclass(frozen=True, eq=False)
class MemoriesReducer:
    """Reduces the key coefficients of attention and MLP to one byte a token.

    space: on the model's device. tables: of each block by sublayer, on the model's device. streams:
    those whose top class another reducer finds before this one, in the order of its stream axis; of
    the others the sublayer's output is projected here. impl: as in `class_scores`.
    """

    space: ClassSpace
    tables: tuple[dict[str, ValueTables], ...]
    streams: tuple[str, ...] = ()
    impl: Impl = "auto"

    @staticmethod
    def of(
        model: VisionTransformer,
        embedding_CD: Tensor,
        space: ClassSpace,
        *,
        streams: Sequence[str],
        impl: Impl,
    ) -> MemoriesReducer:
        """For a model that `require_value_vectors` accepts, its weights not yet cast.

        E·v_j is held for one sublayer at a time.

        Args:
            embedding_CD: E, float64 [C, D].
        """
        device = space.weight_CD.device
        tables = tuple(
            {
                sublayer: value_tables(embedding_CD, value_vectors(model, block, sublayer), device)
                for sublayer in SUBLAYERS
            }
            for block in range(len(model.blocks))
        )
        return MemoriesReducer(space, tables, tuple(streams), impl)

    @property
    def sites(self) -> Set[str]:
        """The keys, and the sublayer outputs whose top class nobody else finds."""
        return {f"key_{name}" for name in SUBLAYERS} | (set(SUBLAYERS) - set(self.streams))

    def arrays(self, layout: Layout) -> tuple[ArraySpec, ...]:
        """The array it fills, [image, block, sublayer, token]."""
        return memory_arrays(layout)

    def for_batch(self, targets: Targets) -> Reduce:
        """Reduces one block after another of a batch.

        The function returned takes the block's sites, and ``scores/top1`` [N, S, T] of the streams
        if there are any; it returns the flags, uint8 [N, 2, T], ``INVALID_FLAGS`` where
        coefficients or the output are not finite.
        """
        labels = targets.labels
        bfloat16 = self.space.weight_CD.dtype == torch.bfloat16
        topk_impl = "avx512" if self.impl in UNITS and bfloat16 else "auto"
        by_class = {"": labels, "_control": control_classes(targets, self.space.num_classes)}

        def top1(sites: Mapping[str, Tensor], sublayer: str) -> Tensor:
            if sublayer in self.streams:
                return sites[TOP1_PATH][:, self.streams.index(sublayer)]
            x = sites[sublayer]
            scores = class_scores(x, self.space, labels, topk=1, logsumexp=False, impl=self.impl)
            return scores.topk[..., 0]

        def flags(block: int, sites: Mapping[str, Tensor], sublayer: str) -> Tensor:
            tables, coefficients = self.tables[block][sublayer], sites[f"key_{sublayer}"]
            width = coefficients.shape[-1]
            top_NTK = key_topk(coefficients, min(KEPT, width), impl=topk_impl)
            top1_NT = top1(sites, sublayer)
            invalid_NT = (top_NTK[..., 0] == width) | (top1_NT == self.space.num_classes)
            top_NTK = top_NTK.clamp_(max=width - 1)
            classes_NTKJ = tables.classes[top_NTK]
            found = {"composed": (classes_NTKJ[..., 0] == top1_NT[..., None]).any(dim=-1)}
            for suffix, class_N in by_class.items():
                values_N11K = tables.values[class_N][:, None, None]
                found[f"agreement{suffix}"] = _any_equal(top_NTK[..., None], values_N11K)
                class_N111 = class_N[:, None, None, None]
                found[f"agreement_text{suffix}"] = _any_equal(classes_NTKJ, class_N111)
            bits_NT = torch.zeros_like(top1_NT, dtype=torch.uint8)
            for bit, name in enumerate(MEMORY_FLAGS):
                bits_NT |= found[name].to(torch.uint8) << bit
            return bits_NT.masked_fill_(invalid_NT, INVALID_FLAGS)

        def reduce(block: int, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = [flags(block, sites, sublayer) for sublayer in SUBLAYERS]
            return {MEMORY_FLAGS_PATH: torch.stack(found, dim=1)}

        return reduce


def _any_equal(a_NTKJ: Tensor, b_NTKJ: Tensor) -> Tensor:
    return (a_NTKJ == b_NTKJ).flatten(2).any(dim=-1)
