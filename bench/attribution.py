"""``classlens bench attribution``: the closed form beside one backward pass for each token."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from classlens.kernels.class_space import ClassSpace

# Largest difference of two ways, of the largest relevance of an image and block.
MOST_DIFFERENT = 1e-3


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True, help="A timm name.")
@click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE",
              help="As in `classlens extract`; repeatable.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--images", default=32, show_default=True, type=click.IntRange(1))
@click.option("--tokens", default=3, show_default=True, type=click.IntRange(1),
              help="Tokens of one image whose backward passes are timed.")  # fmt: skip
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def attribution(as_json: bool, device: str, **options: Any) -> None:
    """Attribution of a batch in every block, in closed form and by autograd.

    \b
    forward      the bare forward pass
    closed form  the pass with the attribution in it, as `extract` runs it
    cls rows     the pass with attention matrices, and by autograd one backward pass a block for the
                 CLS tokens of the whole batch: the least that autograd can do
    every token  the authors' way: image by image, in every block one backward pass for each token

    The last takes hours, so a few of its backward passes are timed, spread over the tokens, and
    their mean is multiplied up; the row says of how many. Random weights. Before anything is timed,
    all ways must agree. `seconds` are of the whole batch, forward pass included;
    `attribution_seconds` are of the attribution alone.
    """
    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result
    from classlens.extractor.console import status as spinner

    with spinner("Measuring"):
        rows = measure(device=device, **options)
    result = {"benchmark": "attribution", "machine": machine_facts(device), "rows": rows}
    print_result(result, as_json)


class Stopwatch:
    """Adds up the seconds that parts of a task take."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds = 0.0

    def __call__(self, part: Callable[[], Tensor]) -> Tensor:
        """What the part returns."""
        from classlens.bench.machine import seconds_of

        results: list[Tensor] = []
        self.seconds += seconds_of(lambda: results.append(part()), self._device)
        return results[0]


def measure(
    *,
    model: str,
    model_args: tuple[str, ...],
    device: str,
    images: int,
    tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each way; medians over the rounds, the ways in turn."""
    import torch

    from classlens.bench.machine import time_in_turn
    from classlens.extractor.commands import parse_model_arg
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.models import load_subject

    arguments = dict(parse_model_arg(argument) for argument in model_args)
    subject = load_subject(ExtractConfig(model, arguments, weights="random:0", device=device))
    vit = subject.model.to(device)
    space = subject.space.to(dtype=torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(images, 3, *subject.geometry.input_size, generator=generator).to(device)
    labels = torch.randint(0, space.num_classes, (images,), generator=generator).to(device)
    check(vit, space, batch[:2], labels[:2])

    count = vit.num_prefix_tokens + subject.grid[0] * subject.grid[1]
    timed = _spread(count, tokens)
    alone: dict[str, list[float]] = {}

    def watched(way: str, task: Callable[[Stopwatch], Tensor]) -> Callable[[], None]:
        def run() -> None:
            watch = Stopwatch(device)
            task(watch)
            alone.setdefault(way, []).append(watch.seconds)

        return run

    tasks = {
        "forward": watched("forward", lambda watch: forward(vit, batch)),
        "closed form": watched("closed form", lambda w: closed_form(vit, space, batch, labels, w)),
        "cls rows": watched("cls rows", lambda w: cls_rows(vit, batch, labels, w)),
        "every token": watched(
            "every token", lambda w: every_token(vit, batch[:1], labels[:1], timed, w)
        ),
    }
    seconds = time_in_turn(tasks, rounds, device)
    whole = {way: statistics.median(values) for way, values in seconds.items()}
    part = {way: statistics.median(values[1:]) for way, values in alone.items()}
    # For each image a pass, and a backward pass for each token of each block.
    pass_s = whole["every token"] - part["every token"]
    part["every token"] *= images * count / len(timed)
    whole["every token"] = images * pass_s + part["every token"]
    return [
        {
            "way": way,
            "model": model,
            "images": images,
            "seconds": round(whole[way], 4),
            "of_forward": round(whole[way] / whole["forward"], 3),
            "times_closed_form": round(whole[way] / whole["closed form"], 3),
            "attribution_seconds": round(part[way], 4),
            "attribution_times_closed_form": round(part[way] / part["closed form"], 3),
            "extrapolated_from": f"1 image, {len(timed)} of {count} tokens, all blocks"
            if way == "every token"
            else "",
            "all_seconds": [round(value, 4) for value in seconds[way]],
        }
        for way in tasks
    ]


def forward(model: VisionTransformer, images: Tensor) -> Tensor:
    """The bare forward pass; logits."""
    import torch

    with torch.inference_mode():
        return model(images)


def closed_form(
    model: VisionTransformer, space: ClassSpace, images: Tensor, labels: Tensor, watch: Stopwatch
) -> Tensor:
    """Relevance in every block and head, [N, L, H, G]."""
    import torch

    from classlens.extractor.blocks import walk
    from classlens.extractor.models import predict
    from classlens.extractor.reducers.attribution import AttributionReducer

    reducer, found, x = AttributionReducer(model, space), [], images
    with torch.inference_mode():
        for block, sites in walk(model, images, "corrected", reducer.sites):
            attribute = partial(reducer.head_relevance, block, sites, labels)
            found.append(watch(attribute))
            x = sites["resid"]
        predict(model, x)  # the forward pass does so too
        return torch.stack(found, dim=1)


def cls_rows(model: VisionTransformer, images: Tensor, labels: Tensor, watch: Stopwatch) -> Tensor:
    """The same by autograd, one backward pass a block."""
    import torch
    from torch.nn import functional as F

    def backward(attention: Tensor, added: Tensor) -> Tensor:
        loss = F.cross_entropy(_logits(model, added[:, 0]), labels, reduction="sum")
        [gradient] = torch.autograd.grad(loss, attention)
        return -gradient[:, :, 0, model.num_prefix_tokens :]

    found = [watch(partial(backward, *block)) for block in _blocks_with_graph(model, images)]
    return torch.stack(found, dim=1)


def every_token(
    model: VisionTransformer, images: Tensor, labels: Tensor, tokens: list[int], watch: Stopwatch
) -> Tensor:
    """The authors' way for one image and some tokens t, −∂ℓ_{b,t}/∂A_b[h, t, j].

    Only the backward passes are watched. [L, len(tokens), H, T].
    """
    import torch
    from torch.nn import functional as F

    def backward(attention: Tensor, losses: Tensor) -> Tensor:
        gradients = (
            torch.autograd.grad(losses[token], attention, retain_graph=True)[0] for token in tokens
        )
        rows = zip(gradients, tokens, strict=True)
        return torch.stack([-gradient[0, :, token] for gradient, token in rows])

    found = []
    for attention, added in _blocks_with_graph(model, images):
        logits = _logits(model, added[0])
        losses = F.cross_entropy(logits, labels.expand(len(logits)), reduction="none")
        found.append(watch(partial(backward, attention, losses)))
    return torch.stack(found)


def check(model: VisionTransformer, space: ClassSpace, images: Tensor, labels: Tensor) -> None:
    """Compares the ways on a few images.

    Raises:
        AssertionError: they differ.
    """
    watch = Stopwatch(str(images.device))
    expected = cls_rows(model, images, labels, watch)
    ours = closed_form(model, space, images, labels, watch)
    theirs = every_token(model, images[:1], labels[:1], [0], watch)
    theirs = theirs[:, 0, :, model.num_prefix_tokens :]
    for name, found, wanted in (("closed form", ours, expected), ("CLS", theirs, expected[0])):
        size = wanted.abs().amax(dim=(-2, -1), keepdim=True)
        if not ((found - wanted).abs() <= MOST_DIFFERENT * size).all():
            raise AssertionError(f"{name}: the relevance is not that of autograd")


def _blocks_with_graph(model: VisionTransformer, images: Tensor) -> Any:
    """Block by block A, a leaf, and what attention adds, [N, T, D], with the graph between."""
    from classlens.extractor.blocks import block_sites, walk

    leaves: list[torch.Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        leaves.append(scores.softmax(dim=-1).detach().requires_grad_())
        return leaves[-1] @ value

    def detached(block: Any, x: Tensor, *others: Any) -> dict[str, Tensor]:
        return block_sites(block, x.detach(), *others)

    attends = [attend] * len(model.blocks)
    for _, sites in walk(model, images, "corrected", frozenset({"attn"}), detached, attends):
        yield leaves.pop(), sites["attn"]


def _logits(model: VisionTransformer, x: Tensor) -> Tensor:
    return model.head(model.fc_norm(model.norm(x)))


def _spread(count: int, wanted: int) -> list[int]:
    """Some of the numbers below ``count``, evenly spread, 0 among them."""
    import numpy as np

    return np.unique(np.rint(np.linspace(0, count - 1, min(wanted, count))).astype(int)).tolist()
