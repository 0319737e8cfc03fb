"""The fused kernel: LayerNorm statistics, projection onto the classes, and their reduction.

One program takes `block_t` tokens of one image and goes over all classes, tile by tile. It starts
with the tile that holds the label, so that the label's logit is there, out of the same
accumulator as every other, before the first comparison: a logit from a separate dot product
differs by rounding, and the label then outranks itself.

Shape letters: N images, T tokens, D width, C classes, K top classes.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.runtime.jit import JITFunction

from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores

MAX_TOPK = 64


class Tile(NamedTuple):
    """How the work is cut: rows × classes × width of a product, and the warps that share it."""

    block_t: int
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int


def choose_tile(dtype: torch.dtype, topk: int, capability: int) -> Tile:
    """The tile for inputs of ``dtype``: the largest of those tried that spills no register.

    The 64-bit keys of a top-k with k > 1 take registers from the accumulator. ``capability`` is
    the major one of CUDA; from 10 on the accumulator lies in a memory of its own, and what comes
    back from it for the top class just does not fit.
    """
    if dtype == torch.float32:
        return Tile(block_t=64, block_c=64, block_d=16, num_warps=8, num_stages=2)
    if topk > 1:
        return Tile(block_t=64, block_c=64, block_d=64, num_warps=8, num_stages=3)
    if topk == 1 and capability >= 10:
        return Tile(block_t=128, block_c=64, block_d=64, num_warps=8, num_stages=3)
    return Tile(block_t=128, block_c=128, block_d=64, num_warps=8, num_stages=3)


def compile_options(tile: Tile) -> dict[str, int]:
    """Triton's options for the kernel; fusing is pinned, for its default differs by release."""
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


def class_scores_triton(
    x: Float[Tensor, "N T D"],
    space: ClassSpace,
    labels: Int[Tensor, " N"],
    *,
    topk: int,
    logsumexp: bool,
) -> ClassScores:
    """`classlens.kernels.class_scores.class_scores`, its shapes and devices already checked.

    Raises:
        ValueError: float64, bfloat16 under the interpreter, a CPU without the interpreter, more
            than 64 top classes.
    """
    interpreted = not isinstance(_class_scores_kernel, JITFunction)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernel takes no {x.dtype}; pass impl='torch'")
    if x.dtype != space.weight_CD.dtype:
        raise ValueError(
            f"x is {x.dtype} and the class space {space.weight_CD.dtype}; "
            f"pass space.to(dtype={x.dtype})"
        )
    if interpreted and x.dtype == torch.bfloat16:
        raise ValueError(
            "Triton's interpreter multiplies bfloat16 wrongly without a word; "
            "use float16 or float32 under TRITON_INTERPRET=1"
        )
    if not x.is_cuda and not interpreted:
        raise ValueError(
            "the Triton kernel needs a GPU; pass impl='torch', or set TRITON_INTERPRET=1 "
            "before the first import to try the kernel on a CPU"
        )
    if topk > MAX_TOPK:
        raise ValueError(f"the Triton kernel keeps at most {MAX_TOPK} classes; pass impl='torch'")

    n_images, n_tokens, width = x.shape
    if x.stride(2) != 1:
        x = x.contiguous()
    weight_CD = space.weight_CD.contiguous()
    shape = (n_images, n_tokens)
    rank_NT = torch.empty(shape, dtype=torch.int32, device=x.device)
    label_logit_NT = torch.empty(shape, dtype=torch.float32, device=x.device)
    lse_NT = torch.empty(shape, dtype=torch.float32, device=x.device) if logsumexp else None
    topk_NTK = torch.empty(*shape, topk, dtype=torch.int32, device=x.device)
    scores = ClassScores(rank_NT, label_logit_NT, lse_NT, topk_NTK)
    capability = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    tile = choose_tile(x.dtype, topk, capability)
    n_programs = n_images * triton.cdiv(n_tokens, tile.block_t)
    if n_programs:
        _class_scores_kernel[(n_programs,)](
            x,
            weight_CD,
            space.bias_C.float(),
            labels.contiguous(),
            rank_NT,
            label_logit_NT,
            lse_NT,
            topk_NTK if topk else None,
            n_tokens,
            x.stride(0),
            x.stride(1),
            space.eps,
            WIDTH=width,
            CLASSES=space.num_classes,
            TOPK=topk,
            BLOCK_T=tile.block_t,
            BLOCK_C=tile.block_c,
            BLOCK_D=tile.block_d,
            **compile_options(tile),
        )
    return scores


@triton.jit
@no_type_check
def _class_scores_kernel(
    x_ptr,  # [N, T, D] with the strides given
    weight_ptr,  # [C, D] contiguous
    bias_ptr,  # [C] float32
    labels_ptr,  # [N]
    rank_ptr,  # [N, T] int32
    label_logit_ptr,  # [N, T] float32
    lse_ptr,  # [N, T] float32, or None: no logsumexp
    topk_ptr,  # [N, T, K] int32, or None: no top-k
    n_tokens,
    stride_n,
    stride_t,
    eps,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_per_image = tl.cdiv(n_tokens, BLOCK_T)
    image = tl.program_id(0) // blocks_per_image
    tokens = (tl.program_id(0) % blocks_per_image) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = tokens < n_tokens
    x_rows = x_ptr + image.to(tl.int64) * stride_n + tokens.to(tl.int64) * stride_t
    dims = tl.arange(0, BLOCK_D)

    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        total += tl.sum(_load_rows(x_rows, token_ok, start + dims, WIDTH).to(tl.float32), 1)
    mean = total / WIDTH
    squares = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        x = _load_rows(x_rows, token_ok, start + dims, WIDTH).to(tl.float32)
        centred = tl.where((start + dims < WIDTH)[None, :], x - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    variance = squares / WIDTH
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))

    label = tl.load(labels_ptr + image).to(tl.int32)
    label_ok = (label >= 0) & (label < CLASSES)
    label = tl.where(label_ok, label, 0)
    row_ok = token_ok & (variance < float("inf")) & label_ok

    rank = tl.zeros([BLOCK_T], tl.int32)
    label_logit = tl.zeros([BLOCK_T], tl.float32)
    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK_T], tl.float32)
    first = tl.full([BLOCK_T], CLASSES, tl.int32)  # the class of the peak
    best = _no_keys(BLOCK_T, TOPK)
    n_tiles: tl.constexpr = (CLASSES + BLOCK_C - 1) // BLOCK_C
    first_tile = label // BLOCK_C
    for step in range(n_tiles):
        tile = (first_tile + step) % n_tiles
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        class_ok = classes < CLASSES
        weight_rows = weight_ptr + classes.to(tl.int64) * WIDTH
        products = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            x = _load_rows(x_rows, token_ok, start + dims, WIDTH)
            weight = _load_rows(weight_rows, class_ok, start + dims, WIDTH)
            products = tl.dot(x, tl.trans(weight), products, input_precision="ieee")
        bias = tl.load(bias_ptr + classes, mask=class_ok, other=0.0)
        logits = products * rstd[:, None] + bias[None, :]
        logits = tl.where(class_ok[None, :], logits, float("-inf"))

        if step == 0:
            is_label = (classes == label)[None, :]
            label_logit = tl.sum(tl.where(is_label, logits, 0.0), 1)

        above = logits > label_logit[:, None]
        on = logits == label_logit[:, None]
        ahead = (above & (classes != label)[None, :]) | (on & (classes < label)[None, :])
        rank += tl.sum(ahead.to(tl.int32), 1)

        tile_peak = tl.max(logits, 1)
        if TOPK == 1:
            on_peak = logits == tile_peak[:, None]
            tile_first = tl.min(tl.where(on_peak, classes[None, :], CLASSES), 1)
            wins = (tile_peak > peak) | ((tile_peak == peak) & (tile_first < first))
            first = tl.where(wins, tile_first, first)
        raised = tl.maximum(peak, tile_peak)
        if lse_ptr is not None:
            sum_exp *= tl.exp(peak - raised)
            sum_exp += tl.sum(tl.exp(logits - raised[:, None]), 1)
        peak = raised
        if TOPK > 1:
            best = _merge_best(best, _keys(logits, classes), TOPK)

    nan = float("nan")
    out = image.to(tl.int64) * n_tokens + tokens
    tl.store(rank_ptr + out, tl.where(row_ok, rank, CLASSES), mask=token_ok)
    tl.store(label_logit_ptr + out, tl.where(row_ok, label_logit, nan), mask=token_ok)
    if lse_ptr is not None:
        tl.store(lse_ptr + out, tl.where(row_ok, peak + tl.log(sum_exp), nan), mask=token_ok)
    if TOPK == 1:
        tl.store(topk_ptr + out, tl.where(row_ok, first, CLASSES), mask=token_ok)
    if TOPK > 1:
        for place in range(TOPK):
            largest = tl.max(best, 1)
            best_class = tl.where(row_ok, _class_of_key(largest), CLASSES)
            tl.store(topk_ptr + out * TOPK + place, best_class, mask=token_ok)
            best = tl.where(best == largest[:, None], -(2**63), best)


@triton.jit
@no_type_check
def _load_rows(rows_ptr, row_ok, dims, WIDTH: tl.constexpr):
    """[rows, dims] of a row-major matrix, zero outside."""
    return tl.load(
        rows_ptr[:, None] + dims[None, :],
        mask=row_ok[:, None] & (dims < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
@no_type_check
def _keys(logits, classes):
    """64-bit keys that order as (logit descending, class ascending) does, largest first.

    The upper half is the logit's bits made monotone, the lower half falls with the class.
    """
    logits = tl.where(logits == 0.0, 0.0, logits)  # −0 ties with +0
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - classes).to(tl.int64)[None, :]


@triton.jit
@no_type_check
def _class_of_key(keys):
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
@no_type_check
def _no_keys(BLOCK_T: tl.constexpr, TOPK: tl.constexpr):
    """Room for the best keys, filled with keys that differ and lie below any other."""
    PLACES: tl.constexpr = triton.next_power_of_2(TOPK) if TOPK > 0 else 1
    places = tl.arange(0, PLACES).to(tl.int64)
    return tl.zeros([BLOCK_T, PLACES], tl.int64) + (places + -(2**63))[None, :]


@triton.jit
@no_type_check
def _merge_best(best, keys, TOPK: tl.constexpr):
    """Let the largest `TOPK` of ``keys`` take the places of smaller ones in ``best``, unsorted."""
    for _ in range(TOPK):
        largest = tl.max(keys, 1)[:, None]
        smallest = tl.min(best, 1)[:, None]
        best = tl.where((best == smallest) & (smallest < largest), largest, best)
        keys = tl.where(keys == largest, -(2**63), keys)
    return best
