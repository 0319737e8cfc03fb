"""``classlens bench rivals``: the authors' extractor and ours on the same images and weights."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from classlens.bench import rivals_reference
from classlens.bench.rivals_check import (
    STREAMS,
    check,
    read_reference_pixels,
    read_reference_ranks,
    write_data_set,
)
from classlens.extractor.errors import ClasslensError, UsageError

if TYPE_CHECKING:
    from classlens.extractor.config import ExtractConfig

# Their name of a model and timm's; of all these their loader squashes the images.
MODELS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_large_16": "vit_large_patch16_224",
    "vit_gap_16": "vit_base_patch16_rpn_224",
}
REFERENCE_FILES = ("src/extractor.py", "src/models/load.py", "src/datasets/imagenet.py")
REFERENCE_TIMM = "0.6.13"
IMAGES_PER_CLASS = 5  # also their batch size; both are fixed in their code
LAST_LINES = 15
OURS = "from classlens.bench.rivals import serve_ours; serve_ours()"
# What a terminal has room for; --json has all.
SHOWN = (
    "rival",
    "dtype",
    "images_per_s",
    "times_authors",
    "share_of_peak",
    "bytes_per_image",
    "equal_ranks",
    "in_bracket",
)


@click.command()
@click.option("--reference", required=True, metavar="DIR",
              type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A checkout of github martinagvilas/vit-cls_emb.")  # fmt: skip
@click.option("--reference-python", required=True, metavar="PATH",
              type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A Python with timm 0.6.13, transformers 4.26.0, einops, pandas, tqdm, torch "
              "and torchvision.")  # fmt: skip
@click.option("--model", type=click.Choice(list(MODELS)), default="vit_b_16", show_default=True)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16"]),
              default=("float32", "bfloat16"), show_default=True,
              help="Ours; theirs is float32. May be given several times.")  # fmt: skip
@click.option("--images", default=120, show_default=True, type=click.IntRange(IMAGES_PER_CLASS),
              help="A multiple of 5, which is what their code takes of a class, and of the batch "
              "size.")  # fmt: skip
@click.option("--batch-size", default=40, show_default=True, type=click.IntRange(1),
              help="Ours; theirs is 5.")  # fmt: skip
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1),
              help="Each round times all extractors in turn.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rivals(
    reference: Path,
    reference_python: Path,
    model: str,
    dtypes: tuple[str, ...],
    images: int,
    batch_size: int,
    rounds: int,
    as_json: bool,
) -> None:
    """The authors' extractor and ours: images/s, bytes an image, and whether the ranks agree.

    Both read the same generated photographs of 500 x 375 pixels as JPEG, resize them to the same
    pixels and run the same random weights on the CPU, with the same number of threads for torch,
    each in a process of its own. Timed is the extraction from image files to files of results;
    loading the model is not, nor is the first round. Ours is compiled where there is a compiler, as
    a long run is, and has threads of its own beside torch's that decode and write; theirs does one
    thing after another.

    "authors" is their extractor as it runs for a pretrained model: beside the scores it saves
    attention maps, keys, values and MLP keys. "authors-scores" leaves those out and so keeps what
    ours keeps: label's rank and logit and top classes (theirs five, ours one, and ours the
    log-probability too) of every token, in the streams resid, attn and mlp of every block.

    share_of_peak: of torch's fastest large matrix product in the extractor's dtype, timed in every
    round, what forward pass and scoring come to.

    All those ranks are compared, one by one: image, block, stream and token, CLS among them.
    equal_ranks is the share of equal ones; in_bracket the share of theirs that lie where
    rounding-error analysis (kernels/bounds.py) allows the rank of our activations. Their
    activations differ from ours by the rounding of another order of operations, which the bracket
    knows nothing of; and in bfloat16 ours are rounded and theirs are not. Before anything is timed,
    the images must be the same pixels, every rank of ours must lie in the bracket, and in float32
    most ranks must be equal.
    """
    import torch

    from classlens.bench.machine import machine_facts
    from classlens.bench.result import print_result
    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.console import status as spinner
    from classlens.kernels.reductions import compiler_found

    if images % IMAGES_PER_CLASS or images % batch_size:
        raise UsageError(
            f"--images is {images}; give a multiple of {IMAGES_PER_CLASS} and of --batch-size "
            f"({batch_size})."
        )
    check_reference(reference)
    check_interpreter(reference_python)
    with tempfile.TemporaryDirectory() as name, spinner("Measuring"):
        folder = Path(name)
        compiles = compiler_found(torch.device("cpu")) or None
        configs = [
            ExtractConfig(
                model=MODELS[model],
                weights=str(folder / "weights.pt"),
                geometry="squash",
                streams=tuple(STREAMS),
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                batch_size=batch_size,
                compile=compiles,
            )
            for dtype in dict.fromkeys(dtypes)
        ]
        write_weights(MODELS[model], folder / "weights.pt")
        theirs = {"reference": str(reference.resolve()), "model": model}
        rows, versions = measure(configs, theirs, reference_python, folder, images, rounds)
    shown = rows if as_json else [{k: row[k] for k in SHOWN if k in row} for row in rows]
    machine = machine_facts() | {f"reference_{name}": found for name, found in versions.items()}
    print_result({"benchmark": "rivals", "machine": machine, "rows": shown}, as_json)


def check_reference(reference: Path) -> None:
    """Raises UsageError where the folder is not a checkout of the authors' code."""
    missing = [name for name in REFERENCE_FILES if not (reference / name).is_file()]
    if missing:
        raise UsageError(
            f"{reference} is not a checkout of the authors' code ({', '.join(missing)} not found); "
            "clone github martinagvilas/vit-cls_emb and give its folder as --reference."
        )


def check_interpreter(python: Path) -> None:
    """Raises UsageError where the interpreter does not run or lacks the timm of the authors."""
    ask = "from importlib.metadata import version; print(version('timm'))"
    try:
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(
            f"{python} does not run ({error.strerror}); give a Python interpreter as "
            "--reference-python."
        ) from error
    found = answer.stdout.strip() if answer.returncode == 0 else "none"
    if found != REFERENCE_TIMM:
        raise UsageError(
            f"{python} has timm {found}, the authors' code needs {REFERENCE_TIMM}; give the "
            "interpreter of an environment made for it as --reference-python."
        )


def write_weights(name: str, path: Path) -> None:
    """Saves random weights of a timm model as a state dict.

    timm starts biases at 0 and LayerNorm at 1, where a slip in either would not show; both are
    moved off that.
    """
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    torch.save(model.state_dict(), path)


def measure(
    configs: Sequence[ExtractConfig],
    reference: Mapping[str, str],
    reference_python: Path,
    folder: Path,
    images: int,
    rounds: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row for each extractor, those of the authors first, and the versions theirs ran with.

    Args:
        configs: ours, one for each dtype.
        reference: the settings ``reference`` and ``model`` of `rivals_reference.load_reference`.
        folder: for all that is written.

    Raises:
        AssertionError: the extractors did not see the same pixels, or their ranks are wrong.
        ClasslensError: a process failed.
    """
    import torch

    from classlens.bench.extract import flops
    from classlens.bench.machine import gemm_peak
    from classlens.bench.photographs import write_photographs
    from classlens.extractor.engine import choose_forward
    from classlens.extractor.prepare import prepare
    from classlens.extractor.scorer import DTYPES

    unit_images = configs[0].batch_size or images
    shards = write_photographs(folder / "shards", images, unit_images, images // IMAGES_PER_CLASS)
    prepared = [prepare(config, [str(shards)]) for config in configs]
    order = write_data_set(folder / "data", prepared[0])
    common = {"threads": torch.get_num_threads()}
    theirs = {
        **common,
        **reference,
        "weights": configs[0].weights,
        "dataset": str(folder / "data"),
        "pixels": str(folder / "pixels.npy"),
        "scratch": str(folder / "scratch"),
    }
    their_command = [str(reference_python), rivals_reference.__file__]
    with ExitStack() as stack:

        def start(name: str, command: Sequence[str], settings: Mapping[str, Any]) -> Rival:
            return stack.enter_context(Rival(name, command, settings, folder))

        authors = start("authors", their_command, {**theirs, "coefficients": True})
        scores_only = start("authors-scores", their_command, {**theirs, "coefficients": False})
        ours = [
            start(
                f"ours {config.dtype}",
                [sys.executable, "-c", OURS],
                {**common, "config": config.to_json(), "shards": str(shards)},
            )
            for config in configs
        ]
        everyone = [authors, scores_only, *ours]
        for rival in everyone:
            rival.extract()
        their_ranks = read_reference_ranks(authors.out, reference["model"], order)
        again = read_reference_ranks(scores_only.out, reference["model"], order)
        if (their_ranks != again).any():
            raise AssertionError("the authors' ranks depend on what else they save")
        their_pixels = read_reference_pixels(folder / "pixels.npy", order)
        checks = [
            check(one, rival.out, their_ranks, their_pixels)
            for one, rival in zip(prepared, ours, strict=True)
        ]
        peaks: dict[str, list[float]] = {"float32": []} | {one.dtype: [] for one in configs}
        for _ in range(rounds):
            for rival in everyone:
                rival.seconds.append(rival.extract())
            for dtype, found in peaks.items():
                found.append(gemm_peak("cpu", DTYPES[dtype]))
    fixed = {"model": reference["model"], "images": images, "rounds": rounds, **common}
    authors_s = statistics.median(authors.seconds)
    image_flops = sum(flops(prepared[0]))
    floor_s = {
        dtype: images * image_flops / statistics.median(found) for dtype, found in peaks.items()
    }
    rows = [
        {
            "rival": rival.name,
            **fixed,
            "dtype": "float32",
            "batch_size": IMAGES_PER_CLASS,
            **rival.figures(images, authors_s, floor_s["float32"]),
        }
        for rival in (authors, scores_only)
    ]
    rows += [
        {
            "rival": "ours",
            **fixed,
            "dtype": config.dtype,
            "batch_size": config.batch_size,
            "forward": choose_forward(config, one.subject, images),
            **rival.figures(images, authors_s, floor_s[config.dtype]),
            **checked,
        }
        for one, config, rival, checked in zip(prepared, configs, ours, checks, strict=True)
    ]
    return rows, authors.versions


class Rival:
    """An extractor in a process of its own, loaded once and asked to extract again and again.

    name: for rows and messages. seconds: of the timed extractions. out: what the first one wrote,
    kept to be checked; later ones are deleted as soon as they are timed. versions: of its packages.
    """

    def __init__(
        self, name: str, command: Sequence[str], settings: Mapping[str, Any], folder: Path
    ) -> None:
        """Starts the process and waits until it has loaded; ``folder`` takes what it writes.

        Raises:
            ClasslensError: the process ended, with its last lines.
        """
        self.name, self.seconds = name, []
        stem = name.replace(", ", "-").replace(" ", "-")
        self.out, self._again = folder / f"{stem}-out", folder / f"{stem}-again"
        self._log = folder / f"{stem}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.versions: dict[str, str] = self._reply()

    def extract(self) -> float:
        """Extracts once more; the seconds that took.

        Raises:
            ClasslensError: the process ended, with its last lines.
        """
        out = self._again if self.out.exists() else self.out
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{out}\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it ended; the missing reply says so
            pass
        seconds: float = self._reply()["seconds"]
        shutil.rmtree(self._again, ignore_errors=True)
        return seconds

    def figures(self, images: int, authors_s: float, floor_s: float) -> dict[str, Any]:
        """Its throughput and the size of what it wrote; ``authors_s``: the authors' seconds;
        ``floor_s``: those that the FLOPs take at the peak of a matrix product."""
        median_s = statistics.median(self.seconds)
        size = sum(f.stat().st_size for f in self.out.rglob("*") if f.is_file())
        return {
            "images_per_s": round(images / median_s, 3),
            "times_authors": round(authors_s / median_s, 2),
            "share_of_peak": round(floor_s / median_s, 3),
            "bytes_per_image": round(size / images),
            "seconds": [round(s, 3) for s in self.seconds],
        }

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.communicate()
        last = self._log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        raise ClasslensError(
            f"The process of {self.name} ended with exit status {self._process.returncode}; its "
            "last lines were:\n" + "\n".join(last)
        )

    def __enter__(self) -> Rival:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()


def serve_ours() -> None:
    """Our side of `rivals_reference.serve`."""
    rivals_reference.serve(load_ours, ("torch", "timm"))


def load_ours(settings: dict[str, Any]) -> rivals_reference.Extract:
    """An extraction with its model loaded.

    Args:
        settings: ``config`` (of `ExtractConfig`), ``shards`` (a folder), ``threads``.
    """
    import torch

    from classlens.extractor.config import ExtractConfig
    from classlens.extractor.prepare import prepare
    from classlens.extractor.run import extract

    torch.set_num_threads(settings["threads"])
    config = ExtractConfig.from_json(settings["config"])
    prepared = prepare(config, [settings["shards"]])
    return lambda out: extract(prepared, out)
