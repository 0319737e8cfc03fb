"""A pre-norm transformer block on a CPU with AMX or AVX-512: launcher of ``vit_block_cpu.cpp``.

Every operation's result is rounded to the dtype of the activations, bfloat16 or float32, as in the
model run operation by operation; products are summed in float32, see `classlens.kernels.tiles`. A
token's result does not depend on what else is in the batch.

Shape letters: N images, T tokens, D width, F width of the MLP, H heads, d width of a head.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from classlens.kernels.class_scores_cpu import ClassScoring
from classlens.kernels.tiles import PANEL, Units, functions, load, pack_panels, require

SOURCE = Path(__file__).with_suffix(".cpp")
GELU_SEGMENTS, GELU_END = 32, 6.0  # GELU(-6) is -6e-9
GELU_DEGREES = {torch.bfloat16: 3, torch.float32: 4}
STREAMS = ("attn", "mid", "mlp", "resid")
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64


class VitBlockCpu:
    """x → norm1 → qkv → attention → proj → + x → norm2 → fc1 → GELU → fc2 → +, of timm's `Block`.

    The weights are copied into tiles; the modules are not kept.
    """

    def __init__(
        self,
        units: Units,
        *,
        num_heads: int,
        norm1: nn.LayerNorm,
        qkv: nn.Linear,
        proj: nn.Linear,
        norm2: nn.LayerNorm,
        fc1: nn.Linear,
        fc2: nn.Linear,
        attn_scale: Tensor | None = None,
        mlp_scale: Tensor | None = None,
    ) -> None:
        """Packs the weights of a block.

        Args:
            units: the registers that multiply.
            attn_scale, mlp_scale: [D], LayerScale of the two sublayers.

        Raises:
            ValueError: weights are not on a CPU, all in bfloat16 or all in float32; or a width,
                that of a head among them, is no multiple of 32.
            RuntimeError: no such registers; no compiler, or it fails.
        """
        self.num_heads, self.head_dim = num_heads, qkv.out_features // 3 // num_heads
        weights = [module.weight for module in (norm1, qkv, proj, norm2, fc1, fc2)]
        widths = {self.head_dim, *(width for weight in weights for width in weight.shape)}
        if any(width % PANEL for width in widths):
            raise ValueError(f"widths {sorted(widths)} are not all multiples of {PANEL}")
        require(units, *weights)
        self.units, self.dtype = units, weights[0].dtype
        self._functions = {name: of[self.dtype] for name, of in _functions(units).items()}
        self._norm1, self._norm2 = _Norm(norm1), _Norm(norm2)
        self._qkv, self._proj = _Linear(qkv, units), _Linear(proj, units)
        self._fc1, self._fc2 = _Linear(fc1, units), _Linear(fc2, units)
        self._attn_scale = None if attn_scale is None else attn_scale.detach().float()
        self._mlp_scale = None if mlp_scale is None else mlp_scale.detach().float()

    def qkv(self, x: Float[Tensor, "N T D"]) -> Float[Tensor, "3 H N T d"]:
        """Queries, keys and values of every head, of the block's input."""
        x = self._checked(x, self._norm1.width)
        out = torch.empty(3, self.num_heads, *x.shape[:2], self.head_dim, dtype=x.dtype)
        self._functions["queries_keys_values"](
            x.data_ptr(),
            x.shape[0] * x.shape[1],
            self._norm1,
            self._qkv,
            self.head_dim,
            torch.get_num_threads(),
            out.data_ptr(),
        )
        return out

    def attention(self, qkv: Float[Tensor, "3 H N T d"]) -> Float[Tensor, "N T Hd"]:
        """softmax(Q·Kᵀ / √d)·V of every head, concatenated."""
        _, heads, images, tokens, depth = qkv.shape
        qkv = self._checked(qkv, depth)
        out = torch.empty(images, tokens, heads * depth, dtype=qkv.dtype)
        self._functions["attention"](
            qkv.data_ptr(),
            images,
            tokens,
            heads,
            depth,
            torch.get_num_threads(),
            out.data_ptr(),
        )
        return out

    def after_attention(
        self,
        x: Float[Tensor, "N T D"],
        heads: Float[Tensor, "N T Hd"],
        wanted: Set[str] = frozenset(),
        scoring: ClassScoring | None = None,
        scored: Sequence[str] = (),
    ) -> dict[str, Float[Tensor, "N T _"]]:
        """``resid``, the block's output, of its input and what attention made of it; and those of
        ``attn`` and ``mlp``, what the sublayers add, ``mid``, the stream between them, and
        ``key_mlp`` [N, T, F], the output of fc1, that are wanted.

        scored: the streams of ``scoring``, among ``STREAMS``, in their order there. Its scores are
        those of `classlens.kernels.class_scores_cpu.class_scores_cpu`, bit for bit.

        Raises:
            ValueError: dtype, width or units of the activations or of the scoring are not the
                block's.
        """
        if scoring is not None:
            self._checked(scoring.space.weight_CD, self._norm2.width)
            if scoring.units != self.units:
                raise ValueError(f"weights packed for {scoring.units} do not fit {self.units}")
        x, heads = self._checked(x, self._norm2.width), self._checked(heads, self._proj.depth)
        width, hidden_width = self._norm2.width, self._fc1.columns
        widths = {"attn": width, "mid": width, "key_mlp": hidden_width, "mlp": width}
        widths = {name: n for name, n in widths.items() if name in wanted} | {"resid": width}
        out = {name: torch.empty(*x.shape[:2], n, dtype=x.dtype) for name, n in widths.items()}
        pointers = {name: value.data_ptr() for name, value in out.items()}
        places = {name: place for place, name in enumerate(scored)}
        self._functions["after_attention"](
            _AfterAttention(
                heads=heads.data_ptr(),
                x=x.data_ptr(),
                rows=x.shape[0] * x.shape[1],
                proj=ctypes.pointer(self._proj),
                fc1=ctypes.pointer(self._fc1),
                fc2=ctypes.pointer(self._fc2),
                norm=ctypes.pointer(self._norm2),
                tail=ctypes.pointer(_normal_tail(GELU_DEGREES[self.dtype])),
                attn_scale=_pointer(self._attn_scale),
                mlp_scale=_pointer(self._mlp_scale),
                scoring=None if scoring is None else ctypes.pointer(scoring),
                **{f"{name}_stream": places.get(name, -1) for name in STREAMS},
                **pointers,
            ),
            torch.get_num_threads(),
        )
        return out

    def _checked(self, x: Tensor, width: int) -> Tensor:
        if x.dtype != self.dtype or not x.is_cpu or x.shape[-1] != width:
            raise ValueError(
                f"a block of width {width} takes {self.dtype} on a CPU, not {tuple(x.shape)} in "
                f"{x.dtype} on {x.device}"
            )
        return x.contiguous()


class _Norm(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("bias", POINTER), ("width", INTEGER), ("eps", ctypes.c_float))

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.tensors = norm.weight.detach().float(), norm.bias.detach().float()  # kept alive
        pointers = (tensor.data_ptr() for tensor in self.tensors)
        super().__init__(*pointers, norm.normalized_shape[0], norm.eps)


class _Linear(ctypes.Structure):
    _fields_ = (("weight", POINTER), ("bias", POINTER), ("depth", INTEGER), ("columns", INTEGER))

    def __init__(self, linear: nn.Linear, units: Units) -> None:
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        weight = pack_panels(linear.weight.detach(), units)
        self.tensors = weight, bias.detach().float()  # kept alive
        pointers = (tensor.data_ptr() for tensor in self.tensors)
        super().__init__(*pointers, linear.in_features, linear.out_features)


class _Tail(ctypes.Structure):
    _fields_ = (
        ("coefficients", POINTER),
        ("segments_per_unit", ctypes.c_float),
        ("end", ctypes.c_float),
    )


class _AfterAttention(ctypes.Structure):
    _fields_ = (
        *(("heads", POINTER), ("x", POINTER), ("rows", INTEGER)),
        *((name, ctypes.POINTER(_Linear)) for name in ("proj", "fc1", "fc2")),
        *(("norm", ctypes.POINTER(_Norm)), ("tail", ctypes.POINTER(_Tail))),
        *((name, POINTER) for name in ("attn_scale", "mlp_scale")),
        *((name, POINTER) for name in ("attn", "mid", "key_mlp", "mlp", "resid")),
        ("scoring", ctypes.POINTER(ClassScoring)),
        *((f"{name}_stream", INTEGER) for name in STREAMS),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def tail_coefficients(degree: int) -> Float32[np.ndarray, "powers segments"]:
    """Polynomials in [0, 1) for the normal distribution's upper tail on equal segments of
    [0, ``GELU_END``], by falling powers; cubics are off by 6e-7 at most, quartics by 4e-8."""
    width = GELU_END / GELU_SEGMENTS
    nodes = np.polynomial.chebyshev.chebpts1(degree + 1) / 2 + 0.5
    places = (np.arange(GELU_SEGMENTS) + nodes[:, None]) * width
    tail = torch.special.erfc(torch.from_numpy(places / np.sqrt(2))).numpy() / 2
    return np.ascontiguousarray(np.polyfit(nodes, tail, degree), np.float32)


@functools.cache
def _normal_tail(degree: int) -> _Tail:
    # Just under the end, which would be a segment of its own.
    end = np.nextafter(np.float32(GELU_END), np.float32(0))
    return _Tail(tail_coefficients(degree).ctypes.data, GELU_SEGMENTS / GELU_END, end)


@functools.cache
def _functions(units: Units) -> dict[str, dict[torch.dtype, Callable[..., None]]]:
    library, structure = load(SOURCE, units), ctypes.POINTER
    argtypes = {
        "queries_keys_values": [
            *(POINTER, INTEGER, structure(_Norm), structure(_Linear), INTEGER, INTEGER, POINTER),
        ],
        "attention": [*(POINTER, INTEGER, INTEGER, INTEGER, INTEGER, INTEGER, POINTER)],
        "after_attention": [structure(_AfterAttention), INTEGER],
    }
    return {name: functions(library, name, types) for name, types in argtypes.items()}
