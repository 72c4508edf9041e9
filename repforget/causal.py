"""One exact activation patch, batched: the primitive that localisation and verification share.

A *run* is one teacher-forced item: ``base`` ids are run through the model while the activations of a *donor*
run (another prompt of equal length, or another model of the same architecture) are written in at chosen
components and positions.  Denoising takes the corrupted prompt as base and the clean one as donor, noising
the reverse (:meth:`Run.swapped`); a twin as donor needs no second prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import KnowledgeError, NumericalError, UsageError
from repforget.models.capture import Batch, capture, hooks
from repforget.models.load import LoadedModel
from repforget.models.resume import Kept, begin
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Component, Site
from repforget.scoring import encode
from repforget.scoring.encode import pad_id

Positions = Literal["all", "subject", "last", "answer"]
Metric = Literal["logprob", "logit_difference"]
Patch = Sequence[Component]
Plan = Mapping[Site, list[int] | None]  # whole site -> columns to write, None for all
EMBED = Site("embed")
TOKEN_BUDGET = 8192
_LOGITS_AT_ONCE = 2**26  # values of the vocabulary distribution held at once (float64: 512 MiB)


@dataclass(frozen=True)
class Run:
    """One item to patch: ids aligned position by position, the answer from index ``start`` to the end.

    ``positions`` are the indices that are overwritten; ``rival`` holds the tokens of the alternative answer
    that ``logit_difference`` compares with (the first token at which it leaves the true answer).
    """

    id: str
    cluster: str
    base: tuple[int, ...]
    donor: tuple[int, ...]
    start: int
    positions: tuple[int, ...]
    rival: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.base) != len(self.donor):
            raise KnowledgeError(f"Item '{self.id}' cannot be patched: its base has {len(self.base)} tokens "
                                 f"and its donor {len(self.donor)}; choose a donor prompt of equal token "
                                 "length.")  # fmt: skip
        if not 1 <= self.start < len(self.base):
            raise KnowledgeError(f"Item '{self.id}' has no answer tokens after its prompt: answer start "
                                 f"{self.start} of {len(self.base)} tokens; give it a non-empty answer.")  # fmt: skip

    def swapped(self) -> Run:
        """The opposite direction: donor and base exchanged."""
        return replace(self, base=self.donor, donor=self.base)


@dataclass(frozen=True)
class Effects:
    """Metric of the unpatched base [n], of the donor [n] and of every patch [p, n], float64, in nats or
    logits."""

    ids: tuple[str, ...]
    clusters: tuple[str, ...]
    base: NDArray[np.float64]
    donor: NDArray[np.float64]
    patched: NDArray[np.float64]

    @property
    def gap(self) -> NDArray[np.float64]:
        """What there is to move, per item: donor minus base [n]."""
        return self.donor - self.base

    @property
    def moved(self) -> NDArray[np.float64]:
        """What each patch moves, per item: patched minus base [p, n]."""
        return self.patched - self.base

    def shares(self, items: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Share of the gap that each patch moves [p]: sum of moves over sum of gaps on ``items`` (default
        all).

        With a clean donor this is the denoising score (LD_patch - LD_corr) / (LD_clean - LD_corr); with a
        corrupted donor it is the *negative* of the noising score, so that higher is always more important.  A
        ratio of sums, not a mean of ratios: items with a gap near zero cannot dominate.
        """
        return share(self.moved, self.gap, items)


def share(moved: NDArray[np.float64], gap: NDArray[np.float64],
          items: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:  # fmt: skip
    """Sum of ``moved`` [p, n] over sum of ``gap`` [n]; raises UsageError where the gap is zero."""
    chosen = np.ones(len(gap), dtype=bool) if items is None else items
    total = float(gap[chosen].sum())
    if abs(total) <= 1e-6 * max(1, int(chosen.sum())):  # rounding of one forward pass in float32
        raise UsageError("Base and donor score the answers equally (mean gap 0), so that no patch can be "
                         "judged: choose items that the model answers, and a donor that does not.")  # fmt: skip
    return np.asarray(moved[:, chosen].sum(axis=1) / total, dtype=np.float64)


@dataclass(frozen=True)
class Prepared:
    """A left-padded batch of runs on the model's device, without the last token (nothing is read after it).

    ``rows`` are indices into the runs; ``where`` [b, s, 1] marks patched positions; ``target`` [b, a] are the
    answer tokens aligned right, ``weight`` [b, a] is 1 on real ones; ``fork`` [b, 3] is (column, truth,
    rival).
    """

    rows: tuple[int, ...]
    base: Batch
    donor: Batch
    where: Tensor
    target: Tensor
    weight: Tensor
    fork: Tensor


def prompt_run(
    tokenizer: Any, id: str, cluster: str, prompt: str, answer: str, *, donor_prompt: str | None = None,
    subject: str = "", positions: Positions = "all", rival: str | None = None,
) -> Run:  # fmt: skip
    """Tokenise ``prompt`` + ``answer`` (and the donor prompt with the same answer) into an aligned
    :class:`Run`.

    Positions: every token, the tokens of ``subject`` (its last occurrence in the prompt), the last prompt
    token, or the tokens that predict the answer.  Raises KnowledgeError when the token lengths differ or the
    subject is not found.
    """
    base = encode(tokenizer, prompt, answer)
    donor = base if donor_prompt is None else encode(tokenizer, donor_prompt, answer)
    same = base.start == donor.start and base.ids[base.start :] == donor.ids[donor.start :]
    if not (base.valid and donor.valid and same):
        raise KnowledgeError(f"Item '{id}' cannot be patched: its prompts and answer do not tokenise into "
                             f"aligned parts (answer starts {base.start} and {donor.start}); choose a donor "
                             "of equal token length.")  # fmt: skip
    wanted: Mapping[str, Sequence[int]] = {
        "all": range(len(base.ids) - 1), "last": (base.start - 1,),
        "answer": range(base.start - 1, len(base.ids) - 1),
    }  # fmt: skip
    where = subject_tokens(tokenizer, id, prompt, subject, base.ids) if positions == "subject" else wanted[positions]
    other = () if rival is None else _rival(tokenizer, prompt, rival, base.ids, base.start)
    return Run(id, cluster, tuple(base.ids), tuple(donor.ids), base.start, tuple(where), other)


def _rival(tokenizer: Any, prompt: str, rival: str, ids: Sequence[int], start: int) -> tuple[int, ...]:
    """Tokens of the rival answer, or none where it does not differ from the true one in a shared position."""
    encoded = encode(tokenizer, prompt, rival)
    tokens = tuple(encoded.ids[encoded.start :])
    differs = any(a != b for a, b in zip(ids[start:], tokens, strict=False))
    return tokens if encoded.start == start and differs else ()


def subject_tokens(tokenizer: Any, id: str, prompt: str, subject: str, ids: Sequence[int]) -> tuple[int, ...]:
    """Indices of the tokens that overlap the last occurrence of ``subject`` in ``prompt``."""
    first = prompt.rfind(subject) if subject else -1
    if first < 0:
        raise KnowledgeError(f"The subject '{subject}' of item '{id}' does not occur in its prompt "
                             f"'{prompt}': give the item its subject as written, or use positions 'all'.")  # fmt: skip
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    own, spans = list(encoded["input_ids"]), encoded["offset_mapping"]
    shift = 0 if own[:1] == list(ids[:1]) else -1  # a special first token that only one of the two carries
    last = first + len(subject)
    found = tuple(k + shift for k, (a, b) in enumerate(spans) if a < last and b > first and b > a)
    if not found:
        raise KnowledgeError(f"The tokenizer gives no characters for the subject of item '{id}': use a fast "
                             "tokenizer, or positions 'all'.")  # fmt: skip
    return found


def prepare(model: LoadedModel, runs: Sequence[Run], *, token_budget: int = TOKEN_BUDGET) -> Iterator[Prepared]:
    """Yield left-padded batches of at most ``token_budget`` tokens, runs of similar length together."""
    pad = pad_id(model.tokenizer)
    order = sorted(range(len(runs)), key=lambda k: len(runs[k].base))
    chunk: list[int] = []
    for k in order:
        if chunk and (len(runs[k].base) - 1) * (len(chunk) + 1) > token_budget:
            yield _collate(runs, chunk, pad, model.device)
            chunk = []
        chunk.append(k)
    if chunk:
        yield _collate(runs, chunk, pad, model.device)


def _collate(runs: Sequence[Run], rows: Sequence[int], pad: int, device: torch.device) -> Prepared:
    chosen = [runs[k] for k in rows]
    length = max(len(r.base) for r in chosen) - 1
    widest = max(len(r.base) - r.start for r in chosen)
    shape = (len(chosen), length)
    base, donor = torch.full(shape, pad), torch.full(shape, pad)
    mask, where = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    target, weight = torch.zeros(len(chosen), widest, dtype=torch.long), torch.zeros(len(chosen), widest)
    fork = torch.zeros(len(chosen), 3, dtype=torch.long)
    for i, run in enumerate(chosen):
        shift, answer = length - (len(run.base) - 1), run.base[run.start :]
        base[i, shift:], donor[i, shift:] = torch.tensor(run.base[:-1]), torch.tensor(run.donor[:-1])
        mask[i, shift:] = 1
        where[i, [p + shift for p in run.positions]] = True
        target[i, widest - len(answer) :], weight[i, widest - len(answer) :] = torch.tensor(answer), 1.0
        step = next((j for j, (a, b) in enumerate(zip(answer, run.rival, strict=False)) if a != b), None)
        if step is not None:
            fork[i] = torch.tensor([widest - len(answer) + step, answer[step], run.rival[step]])
        else:
            fork[i] = -1
    mask = mask.to(device)
    return Prepared(tuple(rows), Batch(base.to(device), mask), Batch(donor.to(device), mask),
                    where.unsqueeze(-1).to(device), target.to(device), weight.to(device), fork.to(device))  # fmt: skip


def answer_metric(model: LoadedModel, batch: Batch, prepared: Prepared, metric: Metric) -> Tensor:
    """Run the model on ``batch`` (any multiple of the prepared rows) and return the metric per row, float64.

    ``logprob`` is the log-probability of the whole answer, teacher-forced, in nats; ``logit_difference`` is
    truth minus rival at the first token where the two answers differ.  Differentiable where gradients are
    enabled.
    """
    keep = prepared.target.shape[1]
    accepted = inspect.signature(type(model.module).forward).parameters
    optional = {"position_ids": batch.position_ids, "logits_to_keep": keep}
    logits = model.module(
        input_ids=batch.ids, attention_mask=batch.mask, use_cache=False,
        **{name: value for name, value in optional.items() if name in accepted},
    ).logits[:, -keep:].to(batch.ids.device)  # fmt: skip
    times = len(logits) // len(prepared.rows)
    if metric == "logit_difference":
        column, truth, rival = prepared.fork.repeat(times, 1).unbind(1)
        if bool((column < 0).any()):
            raise KnowledgeError("Metric 'logit_difference' needs a rival answer that differs from the true "
                                 "one for every item: use metric 'logprob', or give the items wrong "
                                 "answers.")  # fmt: skip
        at = logits[torch.arange(len(logits), device=logits.device), column].double()
        difference: Tensor = at.gather(1, truth[:, None]) - at.gather(1, rival[:, None])
        return difference[:, 0]
    target, weight = prepared.target.repeat(times, 1), prepared.weight.repeat(times, 1).double()
    parts = []
    step = max(1, _LOGITS_AT_ONCE // (keep * logits.shape[-1]))
    for first in range(0, len(logits), step):
        rows = slice(first, first + step)
        picked = logits[rows].double().log_softmax(-1).gather(-1, target[rows].unsqueeze(-1)).squeeze(-1)
        parts.append((picked * weight[rows]).sum(-1))
    return torch.cat(parts)


def columns_of(model: LoadedModel, component: Component) -> tuple[Site, range | None]:
    """The whole site a component lies in and its columns there (None for the whole site)."""
    site, neuron = component.site, component.neuron
    if neuron is not None:
        return site, range(neuron, neuron + 1)
    if site.head is None:
        return site, None
    width = site_map(model.module).head_dim
    return Site(site.kind, site.layer), range(site.head * width, (site.head + 1) * width)


def patch_scores(
    model: LoadedModel, runs: Sequence[Run], patches: Sequence[Patch], *, donor: LoadedModel | None = None,
    metric: Metric = "logprob", token_budget: int = TOKEN_BUDGET, progress: Progress | None = None,
    shift: Callable[[Prepared], Tensor] | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Metric of every run under every patch [p, n], float64; all components of one patch are written jointly.

    Donor activations come from ``donor`` (default: the model itself) on the donor ids.  An empty patch is the
    unpatched run.  Many patches share one forward pass in the batch dimension, and where one unpatched pass pays, the
    blocks before a patch are taken from it (:mod:`repforget.models.resume`; never under hooks).  ``shift`` gives what
    is added to the token embeddings of the base [b, s, d], before any patch.  Cost: at most one forward pass of the
    donor per item and one of the model per item and patch, of the blocks from the first patched one on; memory: the
    donor's sites of one batch, and three states per layer.
    What the number does not show: that an unpatched component is unimportant (other components compensate),
    or that editing at a high-scoring component removes the knowledge.  Zhang & Nanda 2023, arXiv 2309.16042.
    """
    source = model if donor is None else donor
    check_same_shape(model, source)
    plans = [patch_plan(model, patch) for patch in patches]
    sites = sorted({site for plan in plans for site in plan})
    jobs = begin(model, plans)
    result = np.zeros((len(patches), len(runs)), dtype=np.float64)
    share_of_budget = max(1, token_budget // max(1, min(len(patches), 8)))
    batches = list(prepare(model, runs, token_budget=share_of_budget))
    for item in track(progress, batches, "patching activations"):
        values = capture(source, sites, item.donor.to(source.device), gather="all") if sites else {}
        moved = None if shift is None else shift(item)
        b, s = item.base.ids.shape
        width = item.target.shape[1] * model.vocab_size
        group = max(1, min(token_budget // (b * s), 2 * _LOGITS_AT_ONCE // (b * width)))
        kept = Kept.of(model, jobs)
        with torch.no_grad(), hooks(model, _edits(values, item, [{}], moved)):
            kept.record(item.base)
        for start, numbers in jobs.items():
            for first in range(0, len(numbers), group):
                some = numbers[first : first + group]
                edits = _edits(values, item, [plans[k] for k in some], moved)
                wide = Batch(item.base.ids.repeat(len(some), 1), item.base.mask.repeat(len(some), 1))
                with torch.no_grad(), kept.resumed(start, len(some)), hooks(model, edits):
                    scores = answer_metric(model, wide, item, metric)
                result[np.ix_(some, item.rows)] = scores.reshape(len(some), b).cpu().numpy()
    if not np.isfinite(result).all():
        raise NumericalError(f"Patching model '{model.name}' gave values that are not finite: load it in "
                             "float32, or patch fewer components at once.")  # fmt: skip
    return result


def _edits(
    values: Mapping[Site, Tensor], item: Prepared, plans: Sequence[Plan], moved: Tensor | None
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Hooks that write each plan's sites into its block of rows, and add ``moved`` to the embeddings of all."""
    edits = {site: patch_writer(value, item.where, plans, site) for site, value in values.items()
             if any(site in plan for plan in plans)}  # fmt: skip
    if moved is not None:
        edits[EMBED] = _shifted(moved.repeat(len(plans), 1, 1), edits.get(EMBED))
    return edits


def patch_plan(model: LoadedModel, patch: Patch) -> dict[Site, list[int] | None]:
    """Whole site -> columns to write (None: all of them) for one patch."""
    plan: dict[Site, list[int] | None] = {}
    for component in patch:
        site, columns = columns_of(model, component)
        held = plan.setdefault(site, [])
        plan[site] = None if columns is None or held is None else sorted({*held, *columns})
    return plan


def patch_writer(
    value: Tensor, where: Tensor, plans: Sequence[Plan], site: Site
) -> Callable[[Tensor], Tensor]:
    """A hook that writes the donor's value into the row block of each plan that names ``site``."""
    blocks = [(k, plan[site]) for k, plan in enumerate(plans) if site in plan]
    b = len(value)

    def write(x: Tensor) -> Tensor:
        out, new, mask = x.clone(), value.to(device=x.device, dtype=x.dtype), where.to(x.device)
        for k, columns in blocks:
            rows = out[k * b : (k + 1) * b]
            if columns is None:
                rows.copy_(torch.where(mask, new, rows))
            else:
                rows[:, :, columns] = torch.where(mask, new[:, :, columns], rows[:, :, columns])
        return out

    return write


def _shifted(shift: Tensor, patch: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        moved = x + shift.to(x)
        return moved if patch is None else patch(moved)

    return write


def check_same_shape(model: LoadedModel, donor: LoadedModel) -> None:
    """Raise UsageError unless the two models have the same depth, widths and vocabulary."""
    if donor is model:
        return
    ours, theirs = ((m.n_layers, m.width, m.vocab_size, type(m.module).__name__) for m in (model, donor))
    if ours != theirs:
        raise UsageError(f"Activations of '{donor.name}' cannot be patched into '{model.name}': "
                         f"architectures differ (layers, width, vocabulary, class: {theirs} against {ours}); "
                         "give a model of the same architecture.")  # fmt: skip


def patch_effects(
    model: LoadedModel, runs: Sequence[Run], patches: Sequence[Patch], *, donor: LoadedModel | None = None,
    metric: Metric = "logprob", token_budget: int = TOKEN_BUDGET, progress: Progress | None = None,
    shift: Callable[[Prepared], Tensor] | None = None,
) -> Effects:  # fmt: skip
    """:func:`patch_scores` together with the unpatched base and the donor itself (never shifted), as
    :class:`Effects`."""
    source = model if donor is None else donor
    scores = patch_scores(model, runs, [(), *patches], donor=donor, metric=metric, token_budget=token_budget,
                          progress=progress, shift=shift)  # fmt: skip
    end = patch_scores(source, [r.swapped() for r in runs], [()], metric=metric, token_budget=token_budget)
    ids, clusters = tuple(r.id for r in runs), tuple(r.cluster for r in runs)
    return Effects(ids, clusters, scores[0], end[0], scores[1:])
