"""``classlens bench fidelity``: ranks of each dtype beside those of a float64 model.

Shape letters: N images, L blocks, S streams, T tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.prepare import Prepared
    from classlens.extractor.reducers.protocol import Targets
    from classlens.extractor.scorer import Scorer

DTYPES = ("float32", "float16", "bfloat16")
DEMO, DEMO_IMAGES = "demo", 500
BATCH_IMAGES = 8
# What a terminal has room for; --json has all.
SHOWN = (
    "dtype",
    "stream",
    "kind",
    "tokens",
    "equal_ranks",
    "forward_equal_ranks",
    "scoring_equal_ranks",
    "identifiability_change",
    "rank_change_max",
    "rank0_agreement",
)


@click.command()
@click.option("--model", default=DEMO, show_default=True,
              help="The demo's trained model, or a timm name with random weights.")  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES,
              show_default=True, help="May be given several times.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--images", default=200, show_default=True, type=click.IntRange(1),
              help="The demo has 500.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fidelity(model: str, dtypes: tuple[str, ...], device: str, images: int, as_json: bool) -> None:
    """How far ranks in float32, float16 and bfloat16 agree with those of a float64 model.

    The truth is the whole model run in float64 on the same pixels and scored by the specification
    in float64. A rank can differ from it because the forward pass rounds, or because the scoring
    does; so the activations of each dtype are also scored in float64. Random weights rank at random
    and show rounding alone. Before anything is compared, a second float64 run must give the same
    ranks.
    """
    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result
    from classlens.extractor.console import status as spinner

    with tempfile.TemporaryDirectory() as folder, spinner("Comparing"):
        shards = Path(folder) / "shards"
        config = replace(draw_pictures(model, shards, images), device=device)
        rows = [{"model": model, **row} for row in measure(config, shards, images, dtypes)]
    shown = rows if as_json else [{name: row[name] for name in SHOWN} for row in rows]
    machine = machine_facts(device)
    print_result({"benchmark": "fidelity", "machine": machine, "rows": shown}, as_json)


def draw_pictures(model: str, shards: Path, images: int) -> ExtractConfig:
    """Writes at least that many pictures for a model; returns how the model is extracted.

    Raises:
        UsageError: the demo has fewer images than that.
    """
    from classlens.bench.demo.command import demo_config, draw_shards
    from classlens.bench.demo.model_card import WEIGHTS
    from classlens.bench.photographs import write_photographs
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.errors import UsageError

    if model != DEMO:
        write_photographs(shards, images, images)
        config = ExtractConfig(model=model, weights="random:0")
    elif images > DEMO_IMAGES:
        raise UsageError(f"--images is {images}, the demo has {DEMO_IMAGES}; give no more.")
    else:
        draw_shards(shards)
        config = demo_config(str(WEIGHTS))
    return replace(config, batch_size=BATCH_IMAGES)


def measure(
    config: ExtractConfig, shards: Path, images: int, dtypes: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each dtype, stream and kind of token, over the first ``images`` of the shards.

    What `agreement` returns compares the dtype's ranks with the truth; the same names behind
    ``forward_`` compare its activations scored in float64 with the truth, and behind ``scoring_``
    its ranks with its activations scored in float64. A token whose activations are not finite has
    rank C; ``invalid`` is the share of those.

    Raises:
        AssertionError: two runs in float64 differ, or their activations are not finite.
    """
    import numpy as np

    from classlens.extractor.prepare import prepare

    prepared = prepare(config, [str(shards)])
    layout = prepared.layout
    pixels, labels = read_pictures(prepared, images)
    truth_NLST = true_ranks(prepared, pixels, labels)
    first = slice(config.batch_size)
    if not np.array_equal(truth_NLST[first], true_ranks(prepared, pixels[first], labels[first])):
        raise AssertionError("two runs in float64 give different ranks")
    if (truth_NLST == layout.classes).any():
        raise AssertionError("activations are not finite in float64")

    kinds_T = np.array([*layout.prefix_kinds, *["patch"] * layout.patches])
    rows = []
    for dtype in dtypes:
        in_dtype = prepare(
            replace(config, dtype=dtype),  # pyright: ignore[reportArgumentType]
            [str(shards)],
        )
        ranks_NLST, forward_NLST = ranks_in_dtype(in_dtype, pixels, labels)
        for s, stream in enumerate(config.streams):
            for kind in dict.fromkeys(kinds_T.tolist()):
                here = np.s_[:, :, s, kinds_T == kind]
                truth, rank, forward = truth_NLST[here], ranks_NLST[here], forward_NLST[here]
                rows.append(
                    {
                        "dtype": dtype,
                        "stream": stream,
                        "kind": kind,
                        "device": config.device,
                        "images": images,
                        "blocks": layout.blocks,
                        "classes": layout.classes,
                        "tokens": truth.size,
                        "invalid": float((rank == layout.classes).mean()),
                        **agreement(rank, truth, layout.classes),
                        **agreement(forward, truth, layout.classes, "forward_"),
                        **agreement(rank, forward, layout.classes, "scoring_"),
                    }
                )
    return rows


def agreement(
    rank: np.ndarray, truth: np.ndarray, classes: int, prefix: str = ""
) -> dict[str, float | int]:
    """How far two arrays of ranks agree, each name behind ``prefix``.

    Returns:
        ``equal_ranks``: share of equal ones. ``identifiability_change``: mean |Δ(1 − rank / C)|.
        ``rank_change_max``: max |Δ rank|. ``rank0_agreement``: share of those where both or none
        is 0.
    """
    import numpy as np

    change = np.abs(rank - truth)
    return {
        f"{prefix}equal_ranks": float((change == 0).mean()),
        f"{prefix}identifiability_change": float(change.mean() / classes),
        f"{prefix}rank_change_max": int(change.max()),
        f"{prefix}rank0_agreement": float(((rank == 0) == (truth == 0)).mean()),
    }


def read_pictures(prepared: Prepared, images: int) -> tuple[Tensor, Tensor]:
    """The first pictures of a plan as the model sees them: uint8 [N, H, W, 3], labels int64 [N]."""
    from classlens.extractor import pictures

    first = prepared.plan.manifest["image"].head(images)
    [batch] = pictures.read_pictures(prepared, images, first)
    return batch.pixels, batch.targets.labels


def first_targets(labels: Tensor) -> Targets:
    """Targets of a store's first images."""
    import torch

    from classlens.extractor.reducers.protocol import Targets

    places = torch.arange(len(labels), device=labels.device)
    return Targets(labels, places, keys=places)


def true_ranks(prepared: Prepared, pixels: Tensor, labels: Tensor) -> np.ndarray:
    """Ranks [N, L, S, T] of the model run and scored in float64; casts the model in place."""
    import numpy as np
    import torch

    from classlens.extractor.scorer import Scorer

    config = prepared.config
    scorer = Scorer(
        prepared.subject,
        [],
        dtype=torch.float64,
        device=config.device,
        convention=config.convention,
    )
    batches = zip(pixels.split(config.batch_size), labels.split(config.batch_size), strict=True)
    return np.concatenate([float64_ranks(prepared, scorer, *batch) for batch in batches])


def ranks_in_dtype(
    prepared: Prepared, pixels: Tensor, labels: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks [N, L, S, T] as an extraction stores them, and those of its activations in float64."""
    import numpy as np

    from classlens.extractor.engine import make_scorer

    scorer, size = make_scorer(prepared), prepared.config.batch_size
    batches = list(zip(pixels.split(size), labels.split(size), strict=True))
    stored = [scorer.score(p, first_targets(y))["scores/rank"].numpy() for p, y in batches]
    forward = [float64_ranks(prepared, scorer, *batch) for batch in batches]
    return np.concatenate(stored), np.concatenate(forward)


def float64_ranks(prepared: Prepared, scorer: Scorer, pixels: Tensor, labels: Tensor) -> np.ndarray:
    """Ranks int32 [N, L, S, T]: the scorer's model in its dtype, the specification in float64."""
    import torch

    from classlens.kernels.reference import class_scores_reference

    config = prepared.config
    space, labels = prepared.subject.space.to(device=config.device), labels.to(config.device)
    ranks_LNST = []
    with torch.inference_mode():
        for _, sites in scorer.walk(pixels, wanted=frozenset(config.streams)):
            x_NSTD = torch.stack([sites[s] for s in config.streams], dim=1)
            scores = class_scores_reference(
                x_NSTD.flatten(1, 2), space, labels, topk=0, logsumexp=False, dtype=torch.float64
            )
            ranks_LNST.append(scores.rank.view(x_NSTD.shape[:3]))
    return torch.stack(ranks_LNST, dim=1).cpu().numpy()
