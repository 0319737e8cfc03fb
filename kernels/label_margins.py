"""Class scoring in bfloat16 on a CPU, by the margins of all classes over the label.

A CPU rounds the output of a bfloat16 product to bfloat16, and rounded logits tie in masses. The
product ``d_c = x · (W'_c − W'_y)`` is rounded just so, but its sign survives, and all that a rank
needs is the sign of ``rstd · d_c + (b'_c − b'_y)``.

Shape letters: N images, T tokens, D width, C classes, K top classes, M rows of a chunk, R rows
scored once more, P (row, class) pairs.
"""

import timeit
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Bool, Float32, Int
from torch import Tensor

from classlens.kernels.class_scores_torch import (
    empty_scores,
    row_rstd,
    rows_per_chunk,
    store_scores,
    token_chunks,
)
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reductions import CompiledReductions, EagerReductions, compiled
from classlens.kernels.reference import ClassScores

# Two float32 operands of 4096 × 768 are 25 MB.
PAIRS_PER_CHUNK = 4096
# A computed margin m is off by at most u (|m| + |Δb|) / (1 − u), u = 2⁻⁸: the output of the product
# was rounded. Two margins so differ in error by twice that.
MARGIN_SLACK = 2**-7 * 1.02


@dataclass(frozen=True, eq=False)
class LabelMargins:
    """Each class's row of W' less the label's; made by `label_margins`.

    Attributes:
        labels_N: [N] the labels it was made for.
        weight_NCD: [N, C, D] ``W'_c − W'_y`` rounded to bfloat16; exactly zero for c = y and for
            every class whose row equals the label's.
        bias_NC: [N, C] ``b'_c − b'_y``.
    """

    labels_N: Int[Tensor, " N"]
    weight_NCD: BFloat16[Tensor, "N C D"]
    bias_NC: Float32[Tensor, "N C"]


def label_margins(space: ClassSpace, labels: Int[Tensor, " N"]) -> LabelMargins:
    """Make the margins of one batch, once for all its blocks and streams.

    Takes N·C·D·2 bytes, 25 MB for 16 images of ViT-B/16. Worth its while only where
    `margins_pay`.

    Raises:
        ValueError: the space is rounded to 16 bits already, or is not on the CPU, or a label is
            not in [0, C).
    """
    if space.weight_CD.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"margins are rounded once, from float32 or float64, not from {space.weight_CD.dtype}; "
            "pass space.to(dtype=torch.float32)"
        )
    if space.weight_CD.device.type != "cpu" or labels.device.type != "cpu":
        raise ValueError("label_margins serves the CPU only; a GPU scores bfloat16 without it")
    space.require_labels(labels)
    weight_NCD = torch.empty(len(labels), *space.weight_CD.shape, dtype=torch.bfloat16)
    for n, label in enumerate(labels.tolist()):
        weight_NCD[n] = space.weight_CD - space.weight_CD[label]
    bias_NC = space.bias_C - space.bias_C[labels.long()][:, None]
    return LabelMargins(labels, weight_NCD, bias_NC.float())


def margins_pay() -> bool:
    """Whether this CPU multiplies bfloat16 natively; if not, float32 is several times faster."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def bfloat16_speedup(size: int = 1024) -> float:
    """How many times faster than in float32 a square product in bfloat16 is here, right now."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a: a @ a, number=1, repeat=5))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def class_scores_margins(
    x: BFloat16[Tensor, "N T D"],
    space: ClassSpace,
    margins: LabelMargins,
    *,
    topk: int,
    logsumexp: bool,
    compile: bool,
) -> ClassScores:
    """`classlens.kernels.class_scores.class_scores`, its arguments already checked.

    The label's logit is a float32 product with ``space``. Classes whose margins are too close
    for bfloat16 to order are scored again in float32 for the top-k.
    """
    out = empty_scores(x, topk, logsumexp)
    space = space.to(dtype=torch.float32)
    eager = EagerReductions(space.num_classes, torch.float32, x.device)
    reduce = CompiledReductions() if compile else eager
    statistics = compiled(row_rstd) if compile else row_rstd
    rows = rows_per_chunk(space.num_classes, x.device)
    for n, label in enumerate(margins.labels_N.tolist()):
        for tokens in token_chunks(x.shape[1], rows):
            x_MD = x[n, tokens]
            wide_MD = x_MD.float()
            rstd_M1, valid_M = statistics(x_MD, space.eps)
            products_MC = x_MD @ margins.weight_NCD[n].T
            reduced = reduce(
                products_MC,
                rstd_M1,
                margins.bias_NC[n],
                torch.full((len(x_MD), 1), label),
                topk=topk,
                logsumexp=logsumexp,
                slack=MARGIN_SLACK,
            )
            lse_M, rows_M = reduced.logsumexp, reduced.doubtful
            if rows_M is not None and reduced.floor is not None and rows_M.any():
                values_RC = products_MC[rows_M] * rstd_M1[rows_M] + margins.bias_NC[n]
                candidate_RC = values_RC >= reduced.floor[rows_M]
                reduced.topk[rows_M] = _topk_among(
                    wide_MD[rows_M], rstd_M1[rows_M], space, candidate_RC, topk
                )
            label_logit_M = (wide_MD @ space.weight_CD[label]) * rstd_M1[:, 0] + space.bias_C[label]
            store_scores(
                out,
                slice(n, n + 1),
                tokens,
                valid_M,
                space.num_classes,
                reduced._replace(
                    label_logit=label_logit_M,
                    logsumexp=None if lse_M is None else label_logit_M + lse_M,
                ),
            )
    return out


def _topk_among(
    x_RD: Float32[Tensor, "R D"],
    rstd_R1: Float32[Tensor, "R 1"],
    space: ClassSpace,
    candidate_RC: Bool[Tensor, "R C"],
    k: int,
) -> Int[Tensor, "R K"]:
    """The ``k`` first of each row's candidates by float32 logits."""
    rows_P, classes_P = candidate_RC.nonzero(as_tuple=True)
    logits_RC = x_RD.new_full(candidate_RC.shape, float("-inf"))
    for r, c in zip(rows_P.split(PAIRS_PER_CHUNK), classes_P.split(PAIRS_PER_CHUNK), strict=True):
        products_P = (x_RD[r] * space.weight_CD[c]).sum(dim=1)
        logits_RC[r, c] = products_P * rstd_R1[r, 0] + space.bias_C[c]
    order_RC = logits_RC.sort(dim=1, descending=True, stable=True).indices
    return order_RC[:, :k].int()
