"""What a trained editor of a recipe will need, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from repforget import discover
from repforget.edit.train._adapters import LARGE
from repforget.edit.train._cost import Size, Work, memory, operations
from repforget.edit.train._objective import Objective, find
from repforget.edit.train._parts import ACCELERATOR, BUDGETS
from repforget.edit.train._settings import Settings, named
from repforget.errors import UnknownNameError
from repforget.knowledge import EditData
from repforget.models.load import ModelEstimate

LETTERS = 4  # per token, assumed: no tokenizer is loaded
REACHED = 0.4  # of the speed of matrix products, assumed of training
SQUARE = 1024


@dataclasses.dataclass(frozen=True)
class Planned:
    """Peak bytes, and a line that says what was counted."""

    bytes: int
    text: str


def planned(
    method: str, given: Mapping[str, Any], model: ModelEstimate, data: EditData, device: torch.device
) -> Planned | None:
    """Memory and time of one rung of the ladder; None for editors that do not train by steps."""
    found = discover.method("edit", method)
    names = {field.name for field in dataclasses.fields(Settings)}
    if not {"steps", "adapter", "accumulate"} <= set(found.hyperparameters):
        return None
    full = found.settings(given)
    shared = Settings(**{name: value for name, value in full.items() if name in names})
    objective = getattr(found.function, "objective", None)
    adapter = shared.adapter != "none" and (shared.adapter != "auto" or model.parameters >= LARGE)
    size = _size(model, shared, objective)
    work = _work(shared, _terms(objective, shared, full), data, BUDGETS.get(device.type, ACCELERATOR).tokens)
    need = memory(size, shared, work, adapter=adapter)
    rate = REACHED * matmul_rate(device, getattr(torch, model.dtype))
    seconds = operations(size, shared, work, adapter=adapter) / rate
    trained = size.low_rank if adapter else size.trained
    what = f"{_count(trained)} parameters in an adapter on" if adapter else f"{_count(trained)} of"
    text = (f"{shared.steps} steps of {work.rows} rows (up to {work.longest} tokens), {what} "
            f"{_count(model.parameters)} parameters: {need}, about {_duration(seconds)} at "
            f"{rate / 1e12:.2g} TFLOP/s")  # fmt: skip
    return Planned(need.total, text)


def _size(model: ModelEstimate, shared: Settings, objective: Objective | None) -> Size:
    shapes = dict(model.shapes)
    chosen = {name: shape for name, shape in shapes.items()
              if shared.targets == "auto" or any(re.search(t, name) for t in shared.targets)}  # fmt: skip
    matrices = [shape for shape in chosen.values() if len(shape) == 2 and model.vocab_size not in shape]
    trained = sum(math.prod(shape) for shape in chosen.values())
    if shared.targets == "auto" and objective is not None and objective.targets == "mlp_down" and matrices:
        trained = (objective.span or 1) * max(math.prod(shape) for shape in matrices)
    low_rank = sum(shared.rank * sum(shape) for shape in matrices)
    item = torch.empty((), dtype=getattr(torch, model.dtype)).element_size()
    return Size(model.parameters, trained, low_rank, model.layers, model.width, model.vocab_size, item)


def _terms(objective: Objective | None, shared: Settings, full: Mapping[str, Any]) -> list[tuple[str, int, bool, bool]]:
    """(data set, rows per step, whether another answer is read too, whether the untouched model is asked) per term."""
    retained = shared.retain_batch or shared.batch_size
    if objective is None and isinstance(full.get("terms"), list):
        return [_term(str(e.get("objective")), str(e.get("data", "forget")), shared.batch_size) for e in full["terms"]]
    out = [_term(objective.name if objective else "", "forget", shared.batch_size)]
    name = named(shared.retain)[0]
    return out if name == "none" else [*out, *(_term(name, on, retained) for on in shared.retain_on)]


def _term(name: str, data: str, rows: int) -> tuple[str, int, bool, bool]:
    try:
        reads = set(find(name, "forget" if data == "forget" else "retain").reads)
    except UnknownNameError:
        reads = set()
    return data, rows, bool(reads & {"instead", "pattern"}), bool(reads & {"reference", "teacher", "original"})


def _work(shared: Settings, terms: Sequence[tuple[str, int, bool, bool]], data: EditData, budget: int) -> Work:
    facts = {"forget": data.forget, "retain": data.retain}
    texts: list[tuple[int, int]] = []  # tokens of rows, and of their answers
    rows = asked = 0
    for name, size, instead, compared in terms:
        own = [(len(f.prompt + f.answer), len(f.answer)) for f in facts.get(name, ())] or \
            [(len(text), len(text)) for text in data.general]  # fmt: skip
        own = own or [(4 * LETTERS, LETTERS)]
        texts += [(-(-a // LETTERS), -(-b // LETTERS)) for a, b in own]
        size = min(size, len(own))
        rows += size * (2 if instead else 1)
        asked += min(len(own), size * shared.steps) if compared else 0
    mean = [sum(column) / len(texts) for column in zip(*texts, strict=True)]
    return Work(rows, max(a for a, _ in texts), mean[0], mean[1], budget, asked)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of products of square matrices, measured in some tenths of a second."""
    x = torch.ones(SQUARE, SQUARE, dtype=dtype, device=device)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        float((x @ x)[0, 0])  # wait for the device
        best = max(best, 2.0 * SQUARE**3 / (time.perf_counter() - started))
    return best


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else \
        f"{seconds / 3600:.1f} h"  # fmt: skip
