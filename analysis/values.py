"""What the weights of attention and MLP say by themselves (paper §4.3): value vectors and classes.

The value vectors of an MLP are the columns of ``fc2.weight``, those of attention the columns of
``attn.proj.weight``; see `classlens.extractor.value_vectors` for what is left out. No image is
read and no weight is changed. Torch is imported when a function runs. Both conventions compute the
same numbers here; the paper's code leaves its model changed behind.

Shape letters: C classes, D width, F value vectors of a sublayer, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from classlens.analysis import statistics
from classlens.extractor.config import ExtractConfig
from classlens.extractor.errors import UsageError
from classlens.extractor.schema import SUBLAYERS

if TYPE_CHECKING:
    from classlens.extractor.models import Subject

AGREEMENT_SCHEMA = {"source": pl.String, "sublayer": pl.String, "block": pl.Int16}


@dataclass(frozen=True)
class ValuesResult:
    """Class-value agreement of a model and its control. agreement: see :func:`class_value`."""

    model: str
    weights: str
    control: str | None
    seed: int
    agreement: pl.DataFrame

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping: settings, and the frame as a list of rows."""
        return vars(self) | {"agreement": self.agreement.to_dicts()}


def load_model(model: str, weights: str, model_args: dict[str, Any]) -> Subject:
    """A model with value vectors.

    Raises:
        ModelError: it cannot be loaded, has no class-embedding space or no value vectors.
    """
    from classlens.extractor.models import load_subject
    from classlens.extractor.value_vectors import require_value_vectors

    subject = load_subject(ExtractConfig(model=model, model_args=model_args, weights=weights))
    require_value_vectors(subject, model)
    return subject


def analyze_values(
    model: str,
    *,
    weights: str = "pretrained",
    model_args: dict[str, Any] | None = None,
    control: str | None = "random:0",
    seed: int = 0,
) -> ValuesResult:
    """Class-value agreement of every block of a model, tested against a control.

    Args:
        control: weights of the same architecture to compare with; None for no test.

    Raises:
        ModelError: as `load_model`.
    """
    model_args = model_args or {}
    cosines = {"model": class_value_cosines(load_model(model, weights, model_args))}
    if control is not None:
        cosines["control"] = class_value_cosines(load_model(model, control, model_args))
    return ValuesResult(model, weights, control, seed, class_value(cosines, seed=seed))


def class_value_cosines(subject: Subject) -> dict[str, np.ndarray]:
    """max_j cos(E_c, v_j) of each block and class by sublayer, float64 [L, C]; 0 for a zero v_j."""
    import torch

    from classlens.extractor.value_vectors import value_vectors

    tiny = torch.finfo(torch.float64).tiny

    def unit(vectors: torch.Tensor, dim: int) -> torch.Tensor:
        return vectors / vectors.norm(dim=dim, keepdim=True).clamp_min(tiny)

    embedding_CD = unit(subject.embedding(), 1)

    def largest_C(block: int, sublayer: str) -> np.ndarray:
        values_DF = unit(value_vectors(subject.model, block, sublayer), 0)
        return (embedding_CD @ values_DF).amax(dim=1).numpy()

    return {
        sublayer: np.stack([largest_C(block, sublayer) for block in range(subject.blocks)])
        for sublayer in SUBLAYERS
    }


def class_value(cosines: dict[str, dict[str, np.ndarray]], *, seed: int = 0) -> pl.DataFrame:
    """Class-value agreement per block: the mean over classes of the largest cosine.

    Args:
        cosines: of :func:`class_value_cosines`, for "model" and, if wanted, "control".

    Columns: source ("model", "control"), sublayer, block, cosine, low, high (95% bootstrap interval
    over classes), n_classes; for the model with a control also p_value (one-sided paired Wilcoxon
    test over classes that the model exceeds the control) and q_value (Benjamini–Hochberg over the
    blocks of a sublayer).
    """
    rows = []
    for source, by_sublayer in cosines.items():
        for sublayer, cosine_LC in by_sublayer.items():
            low, high = statistics.bootstrap_interval(cosine_LC.T, seed=seed)
            blocks, classes = cosine_LC.shape
            columns = {"cosine": cosine_LC.mean(1), "low": low, "high": high}
            if source == "model" and "control" in cosines:
                pairs = zip(cosine_LC, cosines["control"][sublayer], strict=True)
                p_values = np.array([statistics.wilcoxon_greater(x, y) for x, y in pairs])
                q_values = statistics.benjamini_hochberg(p_values)
                columns |= {"p_value": p_values, "q_value": q_values}
            frame = {
                "source": [source] * blocks,
                "sublayer": [sublayer] * blocks,
                "block": range(blocks),
                **columns,
                "n_classes": [classes] * blocks,
            }
            rows.append(pl.DataFrame(frame, schema_overrides=AGREEMENT_SCHEMA))
    return pl.concat(rows, how="diagonal")


def top_classes(
    subject: Subject, block: int, neurons: Sequence[int], *, sublayer: str = "mlp", top: int = 5
) -> pl.DataFrame:
    """The classes of the largest E_c·v_j of some value vectors of a block.

    Columns: block, sublayer, neuron (j), place (0 is the largest product; ties to the lower class),
    class, name, product.

    Raises:
        UsageError: there is no such block, value vector or number of classes.
    """
    products_CF = products(subject, block, sublayer)
    classes, vectors = products_CF.shape
    if outside := [j for j in neurons if not 0 <= j < vectors]:
        raise UsageError(
            f"There is no value vector {outside[0]} in {sublayer} of block {block}; give 0 to "
            f"{vectors - 1}."
        )
    if not 1 <= top <= classes:
        raise UsageError(f"--top is {top}; the model has {classes} classes.")
    rows = []
    for neuron in neurons:
        order = np.argsort(-products_CF[:, neuron], kind="stable")[:top].tolist()
        rows += [
            (block, sublayer, neuron, place, c, subject.class_names[c], products_CF[c, neuron])
            for place, c in enumerate(order)
        ]
    columns = ("block", "sublayer", "neuron", "place", "class", "name", "product")
    return pl.DataFrame(rows, columns, orient="row")


def strongest(subject: Subject, block: int, *, sublayer: str = "mlp", top: int = 10) -> list[int]:
    """The value vectors of a block with the largest product with any class, the largest first.

    Raises:
        UsageError: there is no such block, or there are not so many value vectors.
    """
    largest_F = products(subject, block, sublayer).max(axis=0)
    if not 1 <= top <= len(largest_F):
        raise UsageError(f"--top is {top}; {sublayer} has {len(largest_F)} value vectors a block.")
    return np.argsort(-largest_F, kind="stable")[:top].tolist()


def products(subject: Subject, block: int, sublayer: str = "mlp") -> np.ndarray:
    """E_c·v_j of every class and value vector of a block, float64 [C, F].

    Raises:
        UsageError: there is no such block.
    """
    from classlens.extractor.value_vectors import value_vectors

    if not 0 <= block < subject.blocks:
        raise UsageError(f"There is no block {block}; give 0 to {subject.blocks - 1}.")
    embedding_CD = subject.embedding()
    return (embedding_CD @ value_vectors(subject.model, block, sublayer)).numpy()
