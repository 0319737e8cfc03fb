"""The key-value memories of a model: value vectors, and how they stand to the classes (paper §4.3).

An MLP multiplies the activation of each key coefficient j with a vector v_j and adds them up: the
columns of ``fc2.weight``. So does attention with its concatenated heads: the columns of
``attn.proj.weight``. They are taken as they stand in the weights: what comes after them (biases,
LayerScale, a post-norm, the final LayerNorm) is left out, as in the paper, and neither they nor the
class embedding E are normalised.

Nothing here changes a weight.

Shape letters: C classes, D width, F value vectors of a sublayer, K kept of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from classlens.extractor.errors import ModelError
from classlens.extractor.models import Subject
from classlens.kernels.key_topk import key_topk

KEPT = 5
"""How many value vectors of a token, value vectors of a class, classes of a value vector count."""


def require_key_neurons(subject: Subject, name: str, reducer: str) -> int:
    """Refuses a model without key-value memories in the MLP of every block.

    Args:
        reducer: of ``extract --reduce``, to be named in the message.

    Returns:
        their number F in a block.

    Raises:
        ModelError: an MLP is not fc1, activation, fc2; or they are not equally wide.
    """
    widths = set()
    for index, block in enumerate(subject.model.blocks):
        mlp = block.mlp
        if not isinstance(mlp, Mlp) or not isinstance(mlp.fc2, nn.Linear):
            raise ModelError(
                f"Block {index} of {name} has a {type(mlp).__name__}, whose key coefficients are "
                "not the output of one linear layer, so it has no key-value memories; choose a "
                f"model whose MLPs are plain (timm's Mlp), or extract without --reduce {reducer}."
            )
        widths.add(mlp.fc2.in_features)
    if len(widths) > 1:
        raise ModelError(
            f"The MLPs of {name} have {', '.join(map(str, sorted(widths)))} neurons; choose a "
            f"model whose blocks are alike, or extract without --reduce {reducer}."
        )
    return widths.pop()


def require_value_vectors(subject: Subject, name: str) -> None:
    """Refuses a model without key-value memories in every block, or without a second class.

    Raises:
        ModelError: as of `require_key_neurons`; or there is a single class.
    """
    require_key_neurons(subject, name, "memories")
    if subject.space.num_classes < 2:
        raise ModelError(
            f"{name} has a single class, so there is no other to compare it with; choose a model "
            "with more classes, or extract without --reduce memories."
        )


def value_vectors(model: VisionTransformer, block: int, sublayer: str) -> Tensor:
    """The v_j of ``attn`` or ``mlp`` of a block, a copy in float64 [D, F]."""
    name = "attn.proj" if sublayer == "attn" else "mlp.fc2"
    layer = model.blocks[block].get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().to(torch.float64, copy=True)


@dataclass(frozen=True, eq=False)
class ValueTables:
    """What is kept of E·v_j for the value vectors of one sublayer of one block.

    values: int32 [C, K], the value vectors of the largest products of each class. classes: int32
    [F, K], the classes of the largest products of each value vector. Both largest first, ties to
    the lower index.
    """

    values: Tensor
    classes: Tensor


def value_tables(
    embedding_CD: Tensor, values_DF: Tensor, device: torch.device | str
) -> ValueTables:
    """The tables of one sublayer, computed and kept on ``device``.

    Args:
        embedding_CD: E; values_DF: the value vectors; multiplied in their dtype.
    """
    products_CF = embedding_CD.to(device) @ values_DF.to(device)
    classes, vectors = products_CF.shape
    return ValueTables(
        values=key_topk(products_CF, min(KEPT, vectors)),
        classes=key_topk(products_CF.T.contiguous(), min(KEPT, classes)),
    )
