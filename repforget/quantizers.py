"""Rounding of weights to few bits and back: what a verifier attacks with and what an edit can be made to survive."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Form = Literal["int8", "nf4", "int4", "int3"]
FORMS: tuple[Form, ...] = get_args(Form)
BLOCK = 64
GRIDS: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 128), "int3": (3, 128)}  # bits, group
# Dettmers et al. 2023, arXiv 2305.14314: quantiles of a normal scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def projections(module: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> matrix [.., out, in] (a view) of every projection except embedding and unembedding.

    Counts linear layers, transposed Conv1D and stacked expert weights; not convolutions, norms or tables.
    """
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, Tensor] = {}
    for place, part in module.named_modules():
        if part is head or isinstance(part, nn.Embedding | nn.Conv1d | nn.Conv2d):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim in (2, 3) and parameter.is_floating_point():
                found[f"{place}.{name}"] = parameter.data.mT if isinstance(part, Conv1D) else parameter.data
    return found


def round_trip(weight: Tensor, kind: Form) -> tuple[Tensor, Tensor]:
    """Codes (as int8) and rounded values, both in the shape of ``weight`` [.., out, in]."""
    wide = weight.detach().float()
    if kind != "nf4":
        codes, values = to_nearest(wide, *GRIDS[kind])
        return codes.to(torch.int8), values.to(weight.dtype)
    width = wide.shape[-1]
    padded, scale = grouped(wide, BLOCK)
    book = torch.tensor(NF4, device=wide.device)
    middle = (book[1:] + book[:-1]) / 2
    codes = torch.bucketize((padded / scale).contiguous(), middle)
    values = (book[codes] * scale).flatten(-2)[..., :width]
    return codes.flatten(-2)[..., :width].to(torch.int8), values.to(weight.dtype)


def to_nearest(weight: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Integer codes and rounded values of [.., out, in], scaled per output and ``group`` (None: all) inputs."""
    width, highest = weight.shape[-1], 2 ** (bits - 1) - 1
    padded, scale = grouped(weight, group or width)
    step = scale / highest
    codes = (padded / step).round().clamp(-highest, highest)
    return codes.flatten(-2)[..., :width], (codes * step).flatten(-2)[..., :width]


def scales(weight: Tensor, kind: Form) -> Tensor:
    """The largest size in the group of each weight, in the shape of ``weight`` [.., out, in], float32."""
    width = weight.shape[-1]
    blocks, scale = grouped(weight.detach().float(), BLOCK if kind == "nf4" else GRIDS[kind][1] or width)
    each: Tensor = scale.expand_as(blocks).flatten(-2)[..., :width]
    return each


def levels(kind: Form) -> Tensor:
    """The values that codes stand for, as shares of the scale, rising."""
    highest = 2 ** (GRIDS[kind][0] - 1) - 1 if kind != "nf4" else 0
    return torch.tensor(NF4) if kind == "nf4" else torch.linspace(-1, 1, 2 * highest + 1)


def grouped(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The last axis in zero-padded groups [.., groups, group], and the largest size in each [.., groups, 1]."""
    padded = nn.functional.pad(weight, (0, -weight.shape[-1] % group))
    padded = padded.reshape(*padded.shape[:-1], -1, group)
    return padded, padded.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
