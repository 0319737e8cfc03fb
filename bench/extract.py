"""``classlens bench extract``: images/s of an extraction beside the bare forward, in one run."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from classlens.extractor.schema import REDUCERS, Layout, all_arrays

if TYPE_CHECKING:
    import numpy as np
    import torch

    from classlens.extractor.captured import CapturedScorer
    from classlens.extractor.prepare import Prepared

# Of the ranks of a batch scored twice, in batches of different sizes.
MOST_UNEQUAL = 0.02
# Whole batches, and with more images several units: one is committed while the next is scored.
SHARD_IMAGES_CPU, SHARD_IMAGES_GPU = 128, 512


@click.command()
@click.option("--model", default="vit_base_patch16_224", show_default=True, help="A timm name.")
@click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE",
              help="As in `classlens extract`; repeatable.")  # fmt: skip
@click.option("--dtype", "dtypes", multiple=True,
              type=click.Choice(["float32", "float16", "bfloat16"]),
              help="Repeatable  [default: float32 on CPU, float16 on GPU]")  # fmt: skip
@click.option("--device", help="cpu, cuda …  [default: the GPU if there is one]")
@click.option("--images", default=128, show_default=True, type=click.IntRange(2))
@click.option("--batch-size", type=click.IntRange(1), help="[default: as `classlens extract`]")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1),
              help="Each round times forward, scoring and extraction in turn.")  # fmt: skip
@click.option("--compile/--no-compile", default=None, help="[default: both, on a CPU]")
@click.option("--certify", is_flag=True, help="Also with certified ranks.")
@click.option("--reduce", multiple=True, type=click.Choice(REDUCERS),
              help="Also with all these besides the ranks; repeatable.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def extract(
    dtypes: tuple[str, ...],
    device: str | None,
    compile: bool | None,
    certify: bool,
    reduce: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Bare forward, scoring in memory, and `extract` from JPEG tars to a store.

    Random weights, generated photographs of 500 x 375 pixels, three streams, rank + logit +
    log-probability + top-1. Before anything is timed, the store is verified and its ranks are
    compared with those scored in memory.

    At equal efficiency the scored run reaches the floor, forward FLOPs / (forward + scoring FLOPs),
    0.763 of the bare forward for ViT-B/16 and three streams. Shares of peak are of the fastest
    large matrix product of the same run. With --reduce, `cost_of_ranks` is the time of scoring in
    memory, sums over a unit included, over that of the ranks alone, the two timed in turn. All
    images are of one unit; exemplars cost most in its first batch, so that a run's share is less.
    """
    import torch

    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result
    from classlens.extractor.console import status as spinner
    from classlens.kernels.reductions import compiler_found

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device == "cpu"
    both = on_cpu and compile is None and compiler_found(torch.device(device))
    rows = []
    with spinner("Measuring"):
        for dtype in dtypes or ("float32" if on_cpu else "float16",):
            for compiled in (False, True) if both else (compile,):
                for certified in (False, True) if certify else (False,):
                    for kept in ((), reduce) if reduce else ((),):
                        facts = {"dtype": dtype, "compile": compiled, "certify": certified}
                        rows.append(_row({**facts, "reduce": kept}, device, **options))
    result = {"benchmark": "extract", "machine": machine_facts(device), "rows": rows}
    print_result(result, as_json)


def _row(
    facts: dict[str, Any],
    device: str,
    model: str,
    model_args: tuple[str, ...],
    images: int,
    batch_size: int | None,
    rounds: int,
) -> dict[str, Any]:
    from classlens.bench.photographs import write_photographs
    from classlens.extractor.commands import parse_model_arg
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        per_shard = SHARD_IMAGES_CPU if device == "cpu" else SHARD_IMAGES_GPU
        shards = write_photographs(Path(folder) / "shards", images, per_shard=per_shard)
        config = ExtractConfig(
            model=model,
            model_args=dict(parse_model_arg(argument) for argument in model_args),
            weights="random:0",
            device=device,
            batch_size=batch_size,
            **facts,
        )
        return measure(prepare(config, [str(shards)]), Path(folder), rounds)


def measure(prepared: Prepared, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, in turn so that a drifting machine hits all alike."""
    import numpy as np

    from classlens.bench.fidelity import first_targets, read_pictures
    from classlens.bench.machine import gemm_peak, time_in_turn
    from classlens.extractor.engine import choose_forward, choose_impl, make_engine
    from classlens.extractor.reducers.protocol import UnitPart, split_results
    from classlens.extractor.run import extract as run_extract
    from classlens.extractor.scorer import DTYPES, Scorer

    config, count = prepared.config, prepared.plan.manifest.height
    engine = make_engine(prepared)
    forward_taken = choose_forward(config, prepared.subject, count)
    batch = min(engine.batch_size, count)
    pixels, labels = (part.to(config.device) for part in read_pictures(prepared, count))
    targets = first_targets(labels)
    bare = Scorer(
        prepared.subject,
        [],
        dtype=DTYPES[config.dtype],
        device=config.device,
        convention=config.convention,
        forward=forward_taken,
    )
    parts = [slice(start, min(start + batch, count)) for start in range(0, count, batch)]
    alone = None
    if config.reduce:
        ranks = replace(prepared, config=replace(config, reduce=(), per_head=False))
        alone = make_engine(ranks).scorer
    stores = (folder / f"store{i}" for i in range(rounds + 2))
    summaries = []

    def forward() -> None:
        for part in parts:
            bare.score(pixels[part], targets[part])["images/prediction"].cpu()

    def scored(scorer: Scorer | CapturedScorer = engine.scorer) -> None:
        arrays = unit_arrays(prepared.layout)
        for part in parts:
            known = targets[part]
            if scorer.accumulator is not None:
                known = replace(known, **scorer.accumulator.known([], arrays))
            results = scorer.score(pixels[part], known)
            found = {name: value.cpu().numpy() for name, value in results.items()}
            if scorer.accumulator is not None:
                places = known.images.cpu().numpy()
                zeros = np.zeros(len(places), np.int64)
                unit = UnitPart(arrays, places, zeros, zeros.astype(bool), zeros)
                scorer.accumulator.merge(split_results(found)[1], unit)

    def end_to_end() -> None:
        summaries.append(run_extract(prepared, next(stores)))

    end_to_end()
    first = slice(batch)
    check(folder / "store0", engine.scorer.score(pixels[first], targets[first])["scores/rank"])
    tasks = {"forward": forward, "scored": scored, "extract": end_to_end}
    if alone is not None:
        tasks["ranks"] = lambda: scored(alone)
    seconds = time_in_turn(tasks, rounds, config.device)
    rate = {name: count / statistics.median(values) for name, values in seconds.items()}
    forward_flops, scoring_flops = flops(prepared)
    peak = gemm_peak(config.device, DTYPES[config.dtype])
    peak = max(peak, forward_flops * count / min(seconds["forward"]))
    floor = forward_flops / (forward_flops + scoring_flops)
    return {
        "model": config.model,
        "dtype": config.dtype,
        "certify": config.certify,
        "reduce": ", ".join(config.reduce),
        "impl": choose_impl(config, count),
        "forward": forward_taken,
        "images": count,
        "batch_size": batch,
        "forward_images_per_s": round(rate["forward"], 3),
        "scored_images_per_s": round(rate["scored"], 3),
        "extract_images_per_s": round(rate["extract"], 3),
        "scored_of_forward": round(rate["scored"] / rate["forward"], 3),
        "floor_of_forward": round(floor, 3),
        **({"cost_of_ranks": round(rate["ranks"] / rate["scored"], 3)} if config.reduce else {}),
        "extract_of_scored": round(rate["extract"] / rate["scored"], 3),
        "forward_share_of_peak": round(rate["forward"] * forward_flops / peak, 3),
        "scored_share_of_peak": round(rate["scored"] * (forward_flops + scoring_flops) / peak, 3),
        "peak_tflops": round(peak / 1e12, 4),
        "bytes_per_image": round(summaries[0].bytes_per_image),
        "held_back_by": summaries[-1].held_back_by,
        "stages": summaries[-1].stages,
        "seconds": {k: [round(s, 3) for s in values] for k, values in seconds.items()},
    }


def unit_arrays(layout: Layout) -> dict[str, np.ndarray]:
    """The arrays that add up the images of one unit, by path."""
    import numpy as np

    return {
        spec.path: np.full(spec.shard(layout)[1:], spec.fill, spec.dtype)
        for spec in all_arrays(layout)
        if spec.axes[0] == "unit"
    }


def check(store: Path, expected: torch.Tensor) -> None:
    """Verifies the store, and holds its first images to ranks scored in memory, [N, L, S, T].

    Raises:
        AssertionError: something differs.
    """
    import numpy as np
    import zarr

    from classlens.extractor.store import verify

    if found := verify(store):
        raise AssertionError(f"the store that was to be timed is not whole: {found[0]}")
    stored = np.asarray(zarr.open_array(str(store / "scores/rank"), mode="r")[: len(expected)])
    # A batch of another size is added up in another order, so a few ranks may differ by a place.
    if (stored != expected.cpu().numpy()).mean() > MOST_UNEQUAL:
        raise AssertionError("the stored ranks are not those scored in memory")


def flops(prepared: Prepared) -> tuple[int, int]:
    """FLOPs an image of the forward pass, and of scoring."""
    from classlens.kernels.cost import class_scores_cost, vit_forward_cost

    layout, model = prepared.layout, prepared.subject.model
    height, _ = prepared.subject.geometry.input_size
    forward = vit_forward_cost(
        images=1,
        image_size=height,
        patch_size=height // layout.grid[0],
        prefix_tokens=layout.prefix,
        depth=layout.blocks,
        width=model.embed_dim,
        mlp_width=model.blocks[0].mlp.fc1.out_features,  # pyright: ignore
        classes=layout.classes,
    )
    scoring = class_scores_cost(
        images=1,
        tokens=len(layout.streams) * layout.blocks * layout.tokens,
        width=model.embed_dim,
        classes=layout.classes,
    )
    return forward.flops, scoring.flops
