"""Score every token against every class and keep the rank of the label: paper §4.1.

    x [N, T, D] → LayerNorm → · class embedding [C, D] → rank, label logit, logsumexp, top-k

The logits, [N, T, C], are never held as a whole. `class_scores_reference` is the specification,
`class_scores_triton` the fused kernel for GPUs, `class_scores_cpu` that for CPUs with AMX or
AVX-512, `class_scores_torch` chunked products whose reductions are eager or compiled.

Shape letters: N images, T tokens, D width, C classes, K top classes.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from classlens.kernels.certify import Certifier
from classlens.kernels.class_scores_cpu import class_scores_cpu
from classlens.kernels.class_scores_torch import class_scores_torch
from classlens.kernels.class_space import ClassSpace
from classlens.kernels.reference import ClassScores, class_scores_reference
from classlens.kernels.tiles import UNITS, Units

Impl = Literal["auto", "reference", "torch", "compiled", "triton", Units]
IMPLS = ("auto", "reference", "torch", "compiled", "triton", *UNITS)


def resolve_impl(x: Tensor, impl: Impl = "auto") -> Impl:
    """Which implementation scores ``x``: what ``impl`` says, and for "auto" "triton" for
    float16, bfloat16 and float32 on a GPU, "torch" for float64 and on a CPU.

    A CPU scores faster by "amx", "avx512" and "compiled", whose first calls compile for a second or
    two and for half a minute: the caller knows whether that pays.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLS)}; pass one of these")
    if impl != "auto":
        return impl
    return "triton" if x.is_cuda and x.dtype != torch.float64 else "torch"


def class_scores(
    x: Float[Tensor, "N T D"],
    space: ClassSpace,
    labels: Int[Tensor, " N"],
    *,
    topk: int = 1,
    logsumexp: bool = True,
    impl: Impl = "auto",
    certifier: Certifier | None = None,
) -> ClassScores:
    """Rank, label logit, logsumexp and top classes of every token in class-embedding space.

    Args:
        x: [N, T, D] hidden states before the final LayerNorm; float16, bfloat16, float32 or
            float64. Statistics and products are accumulated in float32, for float64 in float64.
        space: the final LayerNorm and the head, on the device of ``x``. On a GPU its weight has
            the dtype of ``x``; on a CPU any dtype will do, and float32 is quickest.
        labels: [N] the class of each image, in [0, C). On a CPU this is checked. On a GPU the
            check would stall the queue and is the caller's; a label out of range makes the rows
            of its image invalid.
        topk: how many top classes to keep, 0 to C.
        logsumexp: whether to compute it; it costs one exponential a logit.
        impl: "triton" (GPU; under ``TRITON_INTERPRET=1`` also CPU), "torch" (any device),
            "compiled" (the same, its reductions compiled), "amx" and "avx512" (bfloat16 or float32
            on a CPU, see `classlens.kernels.class_scores_cpu`), "reference" (all logits and a
            sort), or "auto", see `resolve_impl`. There is no fallback: what cannot run raises.
        certifier: proves or mends every rank, see `classlens.kernels.certify`; for "torch" and
            "compiled".

    Returns:
        `ClassScores`; a row with NaN or infinity is invalid and marked as that class says.

    Raises:
        ValueError: an argument does not fit; the message says which and what to pass instead.
    """
    certified = certifier is not None
    impl_taken = "torch" if certified and impl == "auto" else resolve_impl(x, impl)
    _check(x, space, labels, topk, impl_taken, certified=certified)
    if impl_taken == "reference":
        return class_scores_reference(x, space, labels, topk=topk, logsumexp=logsumexp)
    if impl_taken == "triton":
        # Triton exists for Linux alone and takes a while to import.
        from classlens.kernels.class_scores_triton import class_scores_triton

        return class_scores_triton(x, space, labels, topk=topk, logsumexp=logsumexp)
    if impl_taken in UNITS:
        return class_scores_cpu(x, space, labels, impl_taken, topk=topk, logsumexp=logsumexp)
    compile = impl_taken == "compiled"
    return class_scores_torch(
        x, space, labels, topk=topk, logsumexp=logsumexp, compile=compile, certifier=certifier
    )


def _check(
    x: Tensor,
    space: ClassSpace,
    labels: Tensor,
    topk: int,
    impl: str,
    *,
    certified: bool,
) -> None:
    weight = space.weight_CD
    if x.shape[2] != space.width:
        raise ValueError(
            f"x has width {x.shape[2]} and the class space {space.width}; pass the hidden states "
            "that the model's final LayerNorm takes"
        )
    if len(labels) != len(x):
        raise ValueError(f"{len(labels)} labels for {len(x)} images; pass one label an image")
    if not x.device == weight.device == labels.device:
        raise ValueError(
            f"x is on {x.device}, the class space on {weight.device}, the labels on "
            f"{labels.device}; move them to one device"
        )
    if not 0 <= topk <= space.num_classes:
        raise ValueError(
            f"topk={topk} is not in [0, {space.num_classes}]; there are no more classes"
        )
    if impl != "reference" and x.is_cuda and weight.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype} and the class space {weight.dtype}; pass space.to(dtype={x.dtype})"
        )
    if x.device.type == "cpu":
        space.require_labels(labels)
    full_float32 = torch.get_float32_matmul_precision() == "highest"
    if impl != "triton" and x.dtype != torch.float64 and not full_float32:
        raise ValueError(
            "ranks need full float32 products; call torch.set_float32_matmul_precision('highest')"
        )
    if certified and impl not in ("torch", "compiled"):
        raise ValueError("certified ranks need impl='torch' or 'compiled'; pass one of these")
