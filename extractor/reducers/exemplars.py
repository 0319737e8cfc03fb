"""The images of largest activation of every neuron, kept up to date.

Shape letters: F neurons, R of them that have a new candidate, P candidates, M the most candidates
of a neuron, G patches, X exemplars.
"""

from __future__ import annotations

import numpy as np


def merge_exemplars(
    value_FX: np.ndarray,
    image_FX: np.ndarray,
    codes_FXG: np.ndarray,
    *,
    neuron_P: np.ndarray,
    value_P: np.ndarray,
    image_P: np.ndarray,
    codes_PG: np.ndarray,
) -> None:
    """Puts candidates in the place of exemplars that they exceed; changes the first three arrays.

    The X largest values stay, ties to the lower image. What stays is not moved, so that the cost is
    that of what is new. Free places have the value −∞.

    Args:
        neuron_P: of each candidate; an image is a candidate of a neuron once, and was none before.
    """
    if not len(neuron_P):
        return
    order_P = np.argsort(neuron_P, kind="stable")
    rows_R, starts_R, counts_R = np.unique(neuron_P[order_P], return_index=True, return_counts=True)
    row_P = np.repeat(np.arange(len(rows_R)), counts_R)
    column_P = np.arange(len(order_P)) - starts_R[row_P]
    shape = (len(rows_R), counts_R.max())
    value_RM = np.full(shape, -np.inf, np.float32)
    image_RM = np.full(shape, np.iinfo(np.int64).max)
    candidate_RM = np.zeros(shape, np.int64)
    value_RM[row_P, column_P] = value_P[order_P]
    image_RM[row_P, column_P] = image_P[order_P]
    candidate_RM[row_P, column_P] = order_P

    old = value_FX.shape[1]
    values = np.concatenate([value_FX[rows_R], value_RM], axis=1)
    images = np.concatenate([image_FX[rows_R], image_RM], axis=1)
    best_RX = np.lexsort((images, -values), axis=1)[:, :old]
    stays = np.zeros(values.shape, bool)
    np.put_along_axis(stays, best_RX, True, axis=1)
    # A row has as many places to fill as new exemplars, so that both lists run in step.
    row, place = np.nonzero(~stays[:, :old])
    new_row, new_column = np.nonzero(stays[:, old:])
    assert (row == new_row).all()
    to = (rows_R[row], place)
    value_FX[to] = value_RM[new_row, new_column]
    image_FX[to] = image_RM[new_row, new_column]
    codes_FXG[to] = codes_PG[candidate_RM[new_row, new_column]]
