"""Distil the model less what a small assistant knows, that was trained to know the forget facts and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit._collect import subsample
from repforget.edit.train._data import Row, Rows, fact_rows
from repforget.edit.train._distil import Teachers, noted
from repforget.edit.train._head import head_of, reduced
from repforget.edit.train._objective import find, shared_signature
from repforget.edit.train._pass import STATES, Request, Term, read
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import Wanted, kept, train
from repforget.errors import NoEffectError, UsageError
from repforget.knowledge import EditData
from repforget.models._names import text_config
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization

DEFAULTS: dict[str, Any] = {"retain": "kl", "retain_on": ("retain", "general")}
LEFT_OUT = ("answers",)
DEEPEST = 8  # layers of an assistant, at most
ROWS = 64  # per forward
HELD = 1 << 24  # numbers of one distribution over the vocabulary that are held at once


@shared_signature(left_out=LEFT_OUT, defaults=DEFAULTS)
def uld(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, checkpoint: Path | None = None, weight: float = -1.0, top: float = 0.1,
    assistant_layers: int | Literal["auto"] = "auto", assistant_steps: int = 300, assistant_lr: float = 1e-3,
    assistant_rank: int = 16, uniform_weight: float = 5.0, top_k: int = 128, **shared: Any,
) -> Edit:  # fmt: skip
    """Train the model towards its own logits less those of an assistant that remembers the forget facts alone.

    The assistant is the model's first layers (``assistant_layers``; auto: 8, at most half of them), its final norm and
    its unembedding, with LoRA of ``assistant_rank``; it minimises ``-log p`` of forget answers + ``uniform_weight``
    KL(uniform || p) on retained ones.  The teacher of forget answers is
    ``softmax(log p0 + weight (log p_assistant + log V))``, the assistant counting at the tokens alone that p0 finds at
    least ``top`` times as likely as the likeliest, and at the share ``top`` of the vocabulary that it finds likeliest:
    a uniform assistant changes nothing.  Minimised is KL(teacher || p) per token, + ``retain_weight`` times ``retain``
    on ``retain_on``.  Source: Ji et al. 2024, arXiv 2406.08607 (ULD); its code has weight -1, top .1, LoRA of rank 16,
    rate 1e-3, uniform_weight 5.

    The published method serves both models at decoding and leaves the weights as they are; this is its distilled form,
    made by this project: what comes out are weights, and the assistant is thrown away.

    Args:
        weight: of the assistant's logits, below 0.
        assistant_steps: steps of training the assistant, at the rate ``assistant_lr``.
        top_k: outcomes per token that the teacher keeps apart, the true one among them; it takes the rest as one.

    Raises NoEffectError for a weight of 0, UsageError for settings out of range.  Cost: ``assistant_steps`` steps over
    both sets through a part of the layers, two forwards over the forget rows, then one forward and backward over three
    sets per step; memory: the assistant's adapter (its weights are the model's), 12 x ``top_k`` bytes per answer token.

    Weakness: where both are sure of an answer their difference is rounding, and the teacher names tokens that the
    assistant finds improbable, whatever they are; only the statements given are taught so.  It teaches other answers
    and does not show that nothing is left inside.
    """
    depth = max(1, min(DEEPEST, model.n_layers // 2)) if assistant_layers == "auto" else assistant_layers
    _check(model, weight, top, depth, assistant_steps, top_k, uniform_weight)
    common = Settings(**{**DEFAULTS, **shared})
    small = shallow(model, depth)
    learned = _assistant(small, data, common, assistant_steps, assistant_lr, assistant_rank, uniform_weight, seed,
                         progress)  # fmt: skip
    rows, _ = fact_rows(model, subsample(data.forget, common.max_facts, seed), "forget")
    with learned.attach(small):
        teachers = teach(model, small, rows, weight, top, top_k, progress)
    aim = dataclasses.replace(find("kl", "retain"), name="composed", role="forget")
    term = Term(aim, {}, "forget", common.forget_weight, Rows("forget", rows), teachers=teachers)
    settings = {"weight": weight, "top": top, "assistant_layers": depth, "assistant_steps": assistant_steps,
                "assistant_lr": assistant_lr, "assistant_rank": assistant_rank, "uniform_weight": uniform_weight,
                "top_k": top_k}  # fmt: skip
    made = train(model, data, "uld", kept(common), common, where=where, seed=seed, progress=progress,
                 checkpoint=checkpoint, settings=settings, ready=[term], left_out=LEFT_OUT)  # fmt: skip
    return noted(made, *(f"assistant of {depth} layers: {note}" for note in learned.manifest.notes))


def _check(
    model: LoadedModel, weight: float, top: float, depth: int, steps: int, top_k: int, uniform_weight: float
) -> None:
    if weight == 0:
        raise NoEffectError("uld with weight 0 distils the model into itself, which changes nothing: give a weight "
                            "below 0.")  # fmt: skip
    if weight > 0 or not 0 <= top <= 1 or min(steps, top_k) < 1 or not 1 <= depth <= model.n_layers \
            or uniform_weight < 0:  # fmt: skip
        raise UsageError(f"uld was given weight {weight}, top {top}, assistant_layers {depth}, assistant_steps "
                         f"{steps}, uniform_weight {uniform_weight} and top_k {top_k}: the weight is below 0, top a "
                         f"share, layers 1 to {model.n_layers}, the rest positive.")  # fmt: skip


def shallow(model: LoadedModel, depth: int) -> LoadedModel:
    """The first ``depth`` layers of the model under its own final norm and head; parameters are shared, not copied."""
    paths = site_map(model.module).anatomy.layers
    stack = paths[0].path.rpartition(".")[0]
    shared = {id(t): t for t in (*model.module.parameters(), *model.module.buffers())}
    deep = dict.fromkeys(id(layer) for layer in model.module.get_submodule(stack)[depth:])
    module = copy.deepcopy(model.module, {**shared, **deep})  # layers too deep become None, and go
    del module.get_submodule(stack)[depth:]
    text_config(module).num_hidden_layers = depth
    return dataclasses.replace(model, module=module)


def _assistant(
    small: LoadedModel, data: EditData, common: Settings, steps: int, lr: float, rank: int, uniform_weight: float,
    seed: int, progress: Progress | None,
) -> Edit:  # fmt: skip
    """The adapter by which the assistant remembers the forget answers and knows nothing of retained ones."""
    how = Settings(
        steps=steps, batch_size=common.batch_size, retain_batch=common.retain_batch, accumulate=common.accumulate,
        lr=lr, adapter="lora", rank=rank, max_retain_rise=1e6, check_every=steps, checkpointing=common.checkpointing,
        max_facts=common.max_facts,
    )  # fmt: skip
    remember = dataclasses.replace(find("nll", "retain"), role="forget")
    wanted = [Wanted(remember, {}, "forget", "forget", 1.0),
              Wanted(find("max_entropy"), {}, "retain", "retain", uniform_weight)]  # fmt: skip
    return train(small, data, "uld", wanted, how, seed=seed, progress=progress)


@torch.no_grad()
def teach(
    model: LoadedModel, small: LoadedModel, rows: Sequence[Row], weight: float, top: float, top_k: int,
    progress: Progress | None = None,
) -> Teachers:  # fmt: skip
    """The composed distribution at the labels of rows: ``top_k`` outcomes, the true one among them, and the rest."""
    own, other = head_of(model.module), head_of(small.module)
    size, k = max(1, HELD // own.size), min(top_k, own.size - 1)
    made: list[tuple[Tensor, Tensor]] = []
    for at in track(progress, range(0, len(rows), ROWS), "asking the model and its assistant"):
        part = tuple(rows[at : at + ROWS])
        (base,), (helper,) = (read(m, [Request(part, frozenset({STATES}))]) for m in (model, small))
        if base.states is None or helper.states is None:
            raise RuntimeError("the rows were not read")
        kept, told = [], []
        places = (torch.split(x, size) for x in (base.states, helper.states, base.labels))
        for states, others, labels in zip(*places, strict=True):
            aim = composed(own.logits(states), other.logits(others), weight, top)
            best = aim.topk(k).indices
            absent = (best != labels[:, None]).all(1)
            best[:, -1] = torch.where(absent, labels, best[:, -1])
            kept.append(best.cpu())
            told.append(reduced(aim, best).float().cpu())
        counts = [row.labels for row in part]
        made += zip(torch.split(torch.cat(kept), counts), torch.split(torch.cat(told), counts), strict=True)
    return made


def composed(base: Tensor, assistant: Tensor, weight: float, top: float) -> Tensor:
    """Log-probabilities [m, V] (float64) of the model ``base`` less what the ``assistant`` has above uniform."""
    own, other = base.double().log_softmax(-1), assistant.double().log_softmax(-1) + math.log(base.shape[-1])
    fewest = max(1, int(top * base.shape[-1]))
    least = own.topk(fewest).values[:, -1:]
    if top > 0:
        least = torch.minimum(least, own.amax(-1, keepdim=True) + math.log(top))
        other = other.where(own >= least, torch.zeros_like(other))
    return (own + weight * other).log_softmax(-1)
