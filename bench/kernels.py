"""``classlens bench kernels``: the implementations of class scoring, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from classlens.kernels.class_space import ClassSpace
    from classlens.kernels.reference import ClassScores

# (tokens, width); a block has three streams of them.
MODELS = {"B/32": (50, 768), "B/16": (197, 768), "L/16": (197, 1024)}
STREAMS = 3


@click.command()
@click.option("--model", "models", multiple=True, default=["B/16"], show_default=True,
              type=click.Choice(list(MODELS)), help="Repeatable.")  # fmt: skip
@click.option("--classes", multiple=True, default=[1000], show_default=True,
              type=click.IntRange(1), help="Repeatable.")  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True,
              type=click.Choice(["float32", "float16", "bfloat16"]),
              help="Repeatable  [default: float32 on CPU, float16 on GPU]")  # fmt: skip
@click.option("--device", help="cpu, cuda …  [default: the GPU if there is one]")
@click.option("--images", type=click.IntRange(1), help="[default: 8 on CPU, 256 on GPU]")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def kernels(
    models: tuple[str, ...],
    classes: tuple[int, ...],
    dtypes: tuple[str, ...],
    device: str | None,
    images: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Seconds of each implementation for the three streams of one block.

    \b
    triton     the fused kernel (GPU)
    amx        the fused kernel for CPUs, in tile registers
    avx512     the same in vector registers
    compiled   chunked products, compiled reductions
    torch      chunked products, eager reductions
    whole      plain torch.compile of LayerNorm, projection and reductions
    sorted     all logits and an argsort, as the paper's code does
    product    the bare matrix product: what none of them can beat

    Before it is timed, an implementation's ranks are held to the derived bracket. The share of peak
    is of the fastest matrix product seen in the same run, large square ones and the bare one among
    them.
    """
    import torch

    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.startswith("cuda")
    images = images or (256 if on_gpu else 8)
    rows = [
        row
        for dtype in dtypes or ("float16" if on_gpu else "float32",)
        for model in models
        for count in classes
        for row in _rows(model, count, getattr(torch, dtype), device, images, rounds)
    ]
    result = {"benchmark": "kernels", "machine": machine_facts(device), "rows": rows}
    print_result(result, as_json)


def _rows(
    model: str, classes: int, dtype: torch.dtype, device: str, images: int, rounds: int
) -> list[dict[str, Any]]:
    from classlens.bench.machine import gemm_peak, time_in_turn
    from classlens.kernels.cost import class_scores_cost

    tokens, width = MODELS[model]
    case = _case(images, STREAMS * tokens, width, classes, dtype, device)
    tasks = implementations(*case)
    for name, task in tasks.items():
        if name != "product":
            check(name, task(), *case)
    memory = {name: _peak_memory(task, device) for name, task in tasks.items()}
    seconds = time_in_turn(tasks, rounds, device)
    cost = class_scores_cost(
        images=images, tokens=STREAMS * tokens, width=width, classes=classes,
        bytes_per_value=dtype.itemsize,
    )  # fmt: skip
    peak = max(gemm_peak(device, dtype), cost.flops / min(seconds["product"]))
    return [
        {
            "impl": name,
            "model": model,
            "classes": classes,
            "dtype": str(dtype).removeprefix("torch."),
            "images": images,
            "seconds": round(statistics.median(taken), 6),
            "tflops": round(cost.flops / statistics.median(taken) / 1e12, 4),
            "share_of_peak": round(cost.flops / statistics.median(taken) / peak, 3),
            **({"extra_mib": memory[name]} if memory[name] is not None else {}),
            "all_seconds": [round(value, 6) for value in taken],
        }
        for name, taken in seconds.items()
    ]


def _case(
    images: int, tokens: int, width: int, classes: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ClassSpace, ClassSpace, torch.Tensor]:
    """x [N, T, D], the class space in float64, as it is multiplied, and labels."""
    import torch

    from classlens.kernels.class_space import fold_class_space

    generator = torch.Generator().manual_seed(width + classes)
    x = torch.randn(images, tokens, width, generator=generator)
    x[..., 0] *= 30  # outlier dimensions, as hidden states of ViTs have
    head_CD = torch.randn(classes, width, generator=generator) / width**0.5
    exact = fold_class_space(None, None, 1e-6, head_CD, torch.zeros(classes))
    labels = torch.randint(0, classes, (images,), generator=generator)
    on_gpu = device.startswith("cuda")
    multiplied = dtype if on_gpu or dtype == torch.bfloat16 else torch.float32
    space = exact.to(dtype=multiplied, device=device)
    return x.to(dtype).to(device), exact, space, labels.to(device)


def implementations(
    x: torch.Tensor, exact: ClassSpace, space: ClassSpace, labels: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """What runs on this device, by name; each scores the whole of ``x``."""

    from classlens.kernels import cpp
    from classlens.kernels.class_scores import class_scores
    from classlens.kernels.reductions import compiled, compiler_found
    from classlens.kernels.tiles import UNITS, has_units

    on_cpu = x.device.type == "cpu"
    tasks: dict[str, Callable[[], Any]] = {}
    if not on_cpu:
        tasks["triton"] = lambda: class_scores(x, space, labels, impl="triton")
    if on_cpu and cpp.compiler() is not None:
        for units in UNITS:
            if has_units(units, x.dtype):
                tasks[units] = partial(class_scores, x, space, labels, impl=units)
    if compiler_found(x.device):
        tasks["compiled"] = lambda: class_scores(x, space, labels, impl="compiled")
    tasks["torch"] = lambda: class_scores(x, space, labels, impl="torch")
    if compiler_found(x.device):
        tasks["whole"] = lambda: _as_scores(
            compiled(score_whole)(x, space.weight_CD, space.bias_C, space.eps, labels), x
        )
    tasks["sorted"] = lambda: class_scores(x, space, labels, impl="reference")
    weight_DC = space.weight_CD.to(x.dtype).T.contiguous()
    tasks["product"] = lambda: x.flatten(0, 1) @ weight_DC
    return tasks


def score_whole(
    x: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor, eps: float, labels: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Class scoring as one would write it down for a compiler, the logits held as a whole."""
    import torch

    wide = x.flatten(0, 1).float()
    rstd = torch.rsqrt(wide.var(dim=1, correction=0, keepdim=True) + eps)
    products = (x.flatten(0, 1).to(weight_CD.dtype) @ weight_CD.T).float()
    logits = products * rstd + bias_C
    places = labels.repeat_interleave(x.shape[1])[:, None]
    label_logit = logits.gather(1, places)
    classes = torch.arange(len(bias_C), device=x.device)
    ahead = (logits > label_logit) | ((logits == label_logit) & (classes < places))
    rank = ahead.sum(dim=1, dtype=torch.int32)
    return rank, label_logit[:, 0], logits.logsumexp(dim=1), logits.argmax(dim=1, keepdim=True)


def _as_scores(parts: tuple[torch.Tensor, ...], x: torch.Tensor) -> ClassScores:
    from classlens.kernels.reference import ClassScores

    rank, label_logit, logsumexp, topk = (part.unflatten(0, x.shape[:2]) for part in parts)
    return ClassScores(rank, label_logit, logsumexp, topk)


def check(
    name: str,
    scores: ClassScores,
    x: torch.Tensor,
    exact: ClassSpace,
    space: ClassSpace,
    labels: torch.Tensor,
) -> None:
    """Holds the ranks of the first and last image to the derived bracket.

    Raises:
        AssertionError: a rank lies outside.
    """
    import torch

    from classlens.kernels.bounds import rank_bracket

    # Plain torch.compile rounds 16-bit products to 16 bits: no bracket is derived for that.
    if name == "whole" and space.weight_CD.dtype != torch.float32:
        return
    ends = torch.tensor([0, len(x) - 1])
    dtype = space.weight_CD.dtype
    lo, hi = rank_bracket(x[ends].cpu(), exact, labels[ends].cpu(), dtype, split=name == "amx")
    rank = scores.rank[ends].cpu()
    if ((rank < lo) | (rank > hi)).any():
        raise AssertionError(f"{name}: ranks outside the derived bracket")


def _peak_memory(task: Callable[[], Any], device: str) -> float | None:
    """MiB that a task takes on a GPU beyond its inputs; None on a CPU."""
    import torch

    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    task()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
