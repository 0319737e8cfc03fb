"""Class embeddings from a file, such as the text embeddings that a CLIP tower is compared with.

The file is safetensors: a tensor ``embeddings`` T [C', D'], floating point, a row a class; in the
metadata ``names``, a JSON list of C' strings (without it classes are called by number), and
``source``, free text. D' is what the model's head gives: T then continues the head, and the class
embedding of a token is T · head.

Letters: C' classes of the file, D' width of the head's output, D width of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from classlens.extractor.errors import UsageError

TENSOR = "embeddings"
HOW_TO = (
    "write it with safetensors.torch.save_file({'embeddings': T}, FILE, "
    "{'names': json.dumps(names)})"
)


@dataclass(frozen=True, eq=False)
class ClassFile:
    """The content of a file of class embeddings.

    embeddings: T as written, [C', D']. names: one a class. source: where they come from, in the
    file's own words; empty where it has none. sha256: of the file.
    """

    path: Path
    embeddings: Tensor
    names: tuple[str, ...]
    source: str
    sha256: str

    def through_head(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """E = T · weight [C', D] and b = T · bias [C'], float64, of a head D -> D'.

        Equal rows of T give equal rows of E and entries of b, bit for bit.

        Args:
            weight: [D', D]. bias: [D'], or None for zeros, and then b is None too.
        """
        classes = self.embeddings.double()
        # A product may add up equal rows in different orders, and equal classes must tie.
        first: dict[bytes, int] = {}
        rows = [first.setdefault(row.tobytes(), c) for c, row in enumerate(classes.numpy())]
        head_bias = None if bias is None else (classes @ bias.detach().double())[rows]
        return (classes @ weight.detach().double())[rows], head_bias

    def require_width(self, width: int, model: str) -> None:
        """Raises UsageError unless D' is ``width``, what the head of the model gives."""
        given = self.embeddings.shape[1]
        if given != width:
            raise UsageError(
                f"--classes {self.path} has embeddings of width {given}, the head of {model} gives "
                f"{width}; take embeddings made for this model (--model-arg num_classes=0 removes "
                "the head, where they have the width of its tokens)."
            )


def read_class_file(path: Path) -> ClassFile:
    """Reads and checks a file of class embeddings.

    Raises:
        UsageError: it is no such file, or a row is not finite or all zeros, or the names are not
            as many as the rows.
    """

    def refuse(problem: str, remedy: str) -> UsageError:
        return UsageError(f"--classes {path} {problem}; {remedy}.")

    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(path, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = list(content.keys())
            embeddings = content.get_tensor(TENSOR) if TENSOR in tensors else None
    except (OSError, SafetensorError) as error:
        raise refuse(f"is no readable safetensors file ({error})", HOW_TO) from error
    if embeddings is None:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise refuse(f"has no tensor {TENSOR!r} (found: {found})", HOW_TO)
    if embeddings.ndim != 2 or not embeddings.is_floating_point() or not embeddings.numel():
        shape = "×".join(map(str, embeddings.shape))
        raise refuse(
            f"has {TENSOR} of shape {shape} and {embeddings.dtype}",
            "give a floating-point matrix with a row a class",
        )
    for problem, bad in (
        ("not finite", ~embeddings.isfinite().all(dim=1)),
        ("all zeros, so that the class ties with every other", ~embeddings.any(dim=1)),
    ):
        if bad.any():
            raise refuse(
                f"has {int(bad.sum()):,} rows that are {problem}, the first is row "
                f"{int(bad.int().argmax())}",
                "make the embeddings of these classes anew",
            )
    return ClassFile(
        path=path,
        embeddings=embeddings,
        names=_names(metadata, len(embeddings), refuse),
        source=metadata.get("source", ""),
        sha256=sha256,
    )


def _names(
    metadata: dict[str, str], classes: int, refuse: Callable[[str, str], UsageError]
) -> tuple[str, ...]:
    if "names" not in metadata:
        return tuple(map(str, range(classes)))
    remedy = f"give {classes:,} names, one a row, as json.dumps(names)"
    try:
        names = json.loads(metadata["names"])
    except ValueError as error:
        raise refuse(f"has names that are not JSON ({error})", remedy) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise refuse("has names that are not a JSON list of strings", remedy)
    if len(names) != classes:
        raise refuse(f"has {len(names):,} names for {classes:,} embeddings", remedy)
    return tuple(names)
