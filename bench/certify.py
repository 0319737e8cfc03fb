"""``classlens bench certify``: certified ranks held to exact arithmetic on hostile data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from classlens.kernels.class_scores import Impl
    from classlens.kernels.class_space import ClassSpace

# (width, classes, share of the rows); the last two are ViT-S's and ViT-B's.
SHAPES = ((32, 10, 0.3), (96, 100, 0.3), (192, 300, 0.2), (384, 1000, 0.15), (768, 1000, 0.05))
TOKENS = 50
# Each image has its own flavour of near-tie: W'_c = W'_y (1 + scale · noise).
TIE_SCALES = (
    *(1e-4, 0.0, 2.0**-53, 1e-6, 2.0**-40, 1e-9),
    *(10.0**-e for e in range(3, 9) for _ in range(6)),
)
CHUNK_LOGITS = 20_000_000
COST_IMAGES = 12
# Decimal digits of the judge: products of doubles, their squares, and room.
JUDGE_DIGITS = 120


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, type=click.IntRange(1000),
              help="At least so many in all.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--compile/--no-compile", default=False, show_default=True,
              help="Compile the reductions.")  # fmt: skip
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def certify(rows: int, device: str, compile: bool, rounds: int, as_json: bool) -> None:
    """Wrong ranks, share of rows recomputed, and cost of `extract --certify`.

    Hidden states with outlier dimensions, large means, tiny and no variance; classes that tie with
    the label exactly, in all but the last bit, or nearly. Each rank is judged in float64 and, where
    that cannot tell, with 120 decimal digits.
    """
    import torch

    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result

    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for width, classes, share in SHAPES:
            images = math.ceil(rows * share / 3 / TOKENS)
            found.append(_row(images, width, classes, dtype, device, compile, rounds))
    result = {"benchmark": "certify", "machine": machine_facts(device), "rows": found}
    print_result(result, as_json)
    if wrong := sum(row["wrong"] for row in found):
        raise AssertionError(f"{wrong} certified ranks are wrong")


def _row(
    images: int,
    width: int,
    classes: int,
    dtype: torch.dtype,
    device: str,
    compile: bool,
    rounds: int,
) -> dict[str, Any]:
    from classlens.kernels.certify import Certifier
    from classlens.kernels.class_scores import class_scores

    impl: Impl = "compiled" if compile else "torch"
    wrong = recomputed = 0
    step = max(1, CHUNK_LOGITS // (TOKENS * classes))
    for first in range(0, images, step):
        case = hostile_case(min(step, images - first), width, classes, dtype, seed=first)
        x, exact, labels = case
        space = exact.to(dtype=_weight_dtype(dtype, device), device=device)
        certifier = Certifier(exact, space, dtype, compile=compile)
        scores = class_scores(
            x.to(device), space, labels.to(device), impl=impl, certifier=certifier
        )
        assert scores.recomputed is not None
        wrong += int((scores.rank.cpu() != judged_ranks(*case)).sum())
        recomputed += int(scores.recomputed.sum())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "width": width,
        "classes": classes,
        "impl": impl,
        "rows": images * TOKENS,
        "wrong": wrong,
        "recomputed_share": round(recomputed / (images * TOKENS), 4),
        **_cost(width, classes, dtype, device, impl, rounds),
    }


def _cost(
    width: int, classes: int, dtype: torch.dtype, device: str, impl: Impl, rounds: int
) -> dict[str, float]:
    """Seconds with and without certification on normal values without planted ties."""
    import statistics

    import torch

    from classlens.bench.machine import time_in_turn
    from classlens.kernels.certify import Certifier
    from classlens.kernels.class_scores import class_scores
    from classlens.kernels.class_space import ClassSpace

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COST_IMAGES, 197, width, generator=generator).to(dtype).to(device)
    weight_CD = torch.randn(classes, width, generator=generator).double() / width**0.5
    exact = ClassSpace(weight_CD, torch.zeros(classes).double(), 1e-6)
    space = exact.to(dtype=_weight_dtype(dtype, device), device=device)
    labels = (torch.arange(COST_IMAGES) % classes).to(device)
    certifier = Certifier(exact, space, dtype, compile=impl == "compiled")
    scores = class_scores(x, space, labels, impl=impl, certifier=certifier)
    assert scores.recomputed is not None
    seconds = time_in_turn(
        {
            "plain": lambda: class_scores(x, space, labels, impl=impl),
            "certified": lambda: class_scores(x, space, labels, impl=impl, certifier=certifier),
        },
        rounds,
        device,
    )
    plain, certified = (statistics.median(seconds[name]) for name in ("plain", "certified"))
    return {
        "ordinary_recomputed_share": round(float(scores.recomputed.float().mean()), 4),
        "ordinary_cost": round(certified / plain, 2),
    }


def _weight_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """A GPU multiplies by weights of the dtype of the hidden states, a CPU by float32 ones."""
    import torch

    return dtype if device.startswith("cuda") else torch.float32


def hostile_case(
    images: int, width: int, classes: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, ClassSpace, torch.Tensor]:
    """(x [images, 50, width], float64 class space, labels) on which ranks are hard to get right.

    A third of the classes lie near another class, which is then a label.
    """
    import torch

    from classlens.kernels.class_space import fold_class_space

    generator = torch.Generator().manual_seed(seed + width + classes)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    head_CD, bias_C = normal(classes, width) / width**0.5, 0.1 * normal(classes)
    originals = max(1, classes // 3)
    for i in range(originals):
        near = originals + i  # a class with a higher number ties with class i
        scale = TIE_SCALES[i % len(TIE_SCALES)]
        if near < classes:
            head_CD[near] = head_CD[i] * (1 + scale * normal(width))
            bias_C[near] = bias_C[i] * (1 + scale * normal(1).item())
    space = fold_class_space(1 + 0.2 * normal(width), 0.1 * normal(width), 1e-6, head_CD, bias_C)
    x = normal(images, TOKENS, width)
    x[:, :, 0] *= 30
    x[:, 1::5] += 20  # the mean far from zero
    x[:, 2::5] *= 1e-3  # a variance near eps
    x[:, 3] = x[:, 3, :1]  # no variance at all
    picks = torch.randint(0, min(2 * originals, classes), (images,), generator=generator)
    return x.to(dtype), space, picks


def judged_ranks(x: torch.Tensor, space: ClassSpace, labels: torch.Tensor) -> torch.Tensor:
    """Exact ranks [N, T], by an algorithm that has nothing in common with the certifier's.

    Float64 decides where logits lie 1e-9 of their scale apart, 120 decimal digits elsewhere.
    """
    import torch

    x64 = x.double()
    centred = x64 - x64.mean(dim=2, keepdim=True)
    rstd = 1 / (centred.square().mean(dim=2, keepdim=True) + space.eps).sqrt()
    logits = rstd * (centred @ space.weight_CD.T) + space.bias_C
    places = labels[:, None, None].expand(*x.shape[:2], 1)
    label_logit = logits.gather(2, places)
    margins = logits - label_logit
    classes = torch.arange(space.num_classes)
    # Float64 errs by D · 2⁻⁵³ of this; a mean subtracted in float64 loses what it is larger by.
    scale = rstd * x64.norm(dim=2, keepdim=True) * space.weight_CD.norm(dim=1).amax() + 1
    close = (margins.abs() < 1e-9 * scale) & (classes != places)
    rank = ((margins > 0) & ~close).sum(dim=2)
    for n, t, c in close.nonzero().tolist():
        y = int(labels[n])
        margin = _decimal_margin(x64[n, t].tolist(), space, c, y)
        rank[n, t] += margin > 0 or (margin == 0 and c < y)
    return rank.int()


def _decimal_margin(x: list[float], space: ClassSpace, c: int, y: int) -> Any:
    from decimal import Decimal, localcontext

    if space.weight_CD[c].equal(space.weight_CD[y]) and space.bias_C[c] == space.bias_C[y]:
        return 0
    with localcontext() as context:
        context.prec = JUDGE_DIGITS
        values = [Decimal(value) for value in x]
        mean = sum(values, Decimal(0)) / len(values)
        squares = ((value - mean) ** 2 for value in values)
        variance = sum(squares, Decimal(0)) / len(values)
        rows = zip(values, space.weight_CD[c].tolist(), space.weight_CD[y].tolist(), strict=True)
        products = (value * (Decimal(a) - Decimal(b)) for value, a, b in rows)
        product = sum(products, Decimal(0))
        bias = Decimal(space.bias_C[c].item()) - Decimal(space.bias_C[y].item())
        return product / (variance + Decimal(space.eps)).sqrt() + bias
