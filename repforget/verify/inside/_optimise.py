"""What attacks by gradient share: texts with free places, their loss, descent on full batches, and the two halves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models._names import core
from repforget.models.capture import Batch, EditSite, hooks
from repforget.models.load import LoadedModel, copy_of
from repforget.records import ItemScores, Site
from repforget.scoring import encode_many
from repforget.scoring.encode import context_limit, pad_id
from repforget.scoring.forward import places_tokens
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path

Array = NDArray[np.float64]
Teach = Literal["halves", "support"]
EMBED = Site("embed")
TOKENS = 2048  # of one pass, whose states may be kept for the gradient
SAMPLE = 256  # token embeddings from which a scale and a start are taken


class Text(NamedTuple):
    """A question with its answer; from token ``first`` on lie the free places, which the attack fills."""

    path: path.Path
    first: int


class Lot(NamedTuple):
    """A padded batch of texts (``rows.which`` are their numbers); ``first`` [b] is each row's first free place.

    ``scale`` [layers, b, s] is the size of a unit perturbation at every position, where states are perturbed.
    """

    rows: path.Rows
    first: Tensor
    scale: Tensor = torch.ones(())


Edits = Callable[[Tensor, Lot], Mapping[Site, EditSite]]  # what is attacked with -> what it writes on a batch
Place = Callable[[LoadedModel, Sequence[path.Path], int], list[Text]]
Update = Callable[[Tensor, Tensor], Tensor]  # (what is attacked with, gradient of the loss) -> the next


class Asked(NamedTuple):
    """One part of a crossed attack: what is taught, and the items that are asked afterwards."""

    taught: tuple[Item, ...]
    items: tuple[Item, ...]


@contextmanager
def frozen(model: LoadedModel) -> Iterator[LoadedModel]:
    """The model in float32 at least (half precision: a copy), no parameter of which asks for a gradient meanwhile."""
    exact = model
    if model.dtype.itemsize < 4:
        exact = copy_of(model)
        exact.module.float()
    flags = [(p, p.requires_grad) for p in exact.module.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield exact
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def fitting(model: LoadedModel, paths: Sequence[path.Path], width: int) -> list[path.Path]:
    """Paths that ``width`` more tokens keep within the context."""
    return [p for p in paths if len(p.ids) + width <= context_limit(model)]


def opened(model: LoadedModel, paths: Sequence[path.Path], width: int, firsts: Sequence[int]) -> list[Text]:
    """Paths with ``width`` placeholders before token ``first`` of each."""
    fill = (pad_id(model.tokenizer),) * width
    return [Text(replace(p, ids=(*p.ids[:at], *fill, *p.ids[at:]), start=p.start + width), at)
            for p, at in zip(paths, firsts, strict=True)]  # fmt: skip


def front(model: LoadedModel, paths: Sequence[path.Path], width: int) -> list[Text]:
    """Free places at the very beginning, behind the token that opens every text where there is one."""
    bos = model.tokenizer.bos_token_id
    return opened(model, paths, width, [int(bos is not None and p.ids[0] == bos) for p in paths])


def behind(model: LoadedModel, paths: Sequence[path.Path], width: int) -> list[Text]:
    """Free places between the question and its answer."""
    return opened(model, paths, width, [p.start for p in paths])


def told(model: LoadedModel, items: Sequence[Item]) -> list[path.Path]:
    """Each item's first question with the true answer, every token of which is to become likely."""
    encoded = encode_many(model.tokenizer, [(item.questions[0], item.continuation()) for item in items],
                          limit=context_limit(model))  # fmt: skip
    return [path.Path(k, e.ids, e.start, tuple((t,) for t in e.answer)) for k, e in enumerate(encoded) if e.valid]


def lots(model: LoadedModel, texts: Sequence[Text]) -> list[Lot]:
    """Cut texts into batches of at most :data:`TOKENS` padded tokens, longest first."""
    order = sorted(range(len(texts)), key=lambda k: (-len(texts[k].path.ids), k))
    out = []
    while order:
        size = max(1, TOKENS // len(texts[order[0]].path.ids))
        which, order = order[:size], order[size:]
        rows = path.same_rows(model, [texts[k].path for k in which], which)
        out.append(Lot(rows, torch.tensor([texts[k].first for k in which])))
    return out


def written(vectors: Tensor, lot: Lot) -> Mapping[Site, EditSite]:
    """Put ``vectors`` ([n, d], or [texts, n, d] with each text's own) into the free places of the embedding."""
    chosen = vectors if vectors.ndim == 2 else vectors[torch.tensor(lot.rows.which, device=vectors.device)]
    places = lot.first[:, None] + torch.arange(vectors.shape[-2])

    def write(x: Tensor) -> Tensor:
        index = places.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, chosen.to(x.device, x.dtype).expand(len(x), -1, -1))

    return {EMBED: write}


def answer_logits(model: LoadedModel, batch: Batch, places: Tensor, *, grad: bool = False) -> Tensor:
    """Logits [b, k, V] at ``places`` [b, k]; with ``grad`` the graph to whatever hooks write is kept."""
    module: Any = core(model)
    keeps = "logits_to_keep" in inspect.signature(type(module).forward).parameters
    kept, slot = (torch.from_numpy(x) for x in np.unique(places.numpy(), return_inverse=True))
    device = model.device
    inputs: dict[str, Any] = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}
    if places_tokens(model):
        inputs["position_ids"] = batch.position_ids.to(device)
    if keeps:
        inputs["logits_to_keep"] = kept.to(device)
    # Other attention kernels may add up gradients in an order that changes from run to run.
    with torch.inference_mode(False), torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
        logits: Tensor = module(**inputs, use_cache=False).logits
        if not keeps:
            logits = logits[:, kept.to(logits.device)]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        index = slot.reshape(places.shape).to(logits.device)
        chosen: Tensor = wide[torch.arange(len(index), device=logits.device)[:, None], index]
        return chosen


def nats(logits: Tensor, rows: path.Rows) -> Tensor:
    """Log-probability [b] of each row's true answer, differentiable."""
    truth = logits.gather(-1, rows.choices[..., :1].to(logits.device))[..., 0] - logits.logsumexp(-1)
    return torch.where(rows.real.to(logits.device), truth, 0.0).sum(-1)


def odds(logits: Tensor, rows: path.Rows) -> Tensor:
    """Log-probability [b] of the truth when decoding is confined to the candidates, differentiable."""
    competing = logits.gather(-1, rows.choices.to(logits.device))
    competing = competing.masked_fill(~rows.open.to(logits.device), -torch.inf)
    # Padded rows have no choice at all; their infinities must not reach the gradient.
    real = rows.real.to(logits.device)
    competing = torch.where(real[..., None], competing, 0.0)
    return torch.where(real, competing[..., 0] - competing.logsumexp(-1), 0.0).sum(-1)


def slope(
    model: LoadedModel, lot: Lot, x: Tensor, edits: Edits, score: Callable[[Tensor, path.Rows], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """``score`` [b] of a batch under attack, and the gradient of its sum by ``x``.

    The gradient is None where an edit's hooks let none through, or where the score is not finite: there is no way on.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad(), hooks(model, edits(leaf, lot)):
        value = score(answer_logits(model, lot.rows.batch, lot.rows.places, grad=True), lot.rows)
    if not value.requires_grad or not bool(value.detach().isfinite().all()):
        return value.detach(), None
    found: Tensor | None = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
    return value.detach(), found


def loss(model: LoadedModel, batches: Sequence[Lot], x: Tensor, edits: Edits) -> tuple[float, Tensor | None]:
    """Mean cross-entropy (nats per answer token) over all texts, and its gradient."""
    total = 0.0
    gradient: Tensor | None = torch.zeros_like(x)
    tokens = max(1, sum(int(lot.rows.real.sum()) for lot in batches))
    for lot in batches:
        value, part = slope(model, lot, x, edits, nats)
        total -= float(value.double().sum())
        gradient = None if part is None or gradient is None else gradient - part / tokens
    return total / tokens, gradient


def descend(
    model: LoadedModel, batches: Sequence[Lot], x: Tensor, edits: Edits, update: Update, steps: int,
    seen: Callable[[int, Tensor], None],
) -> None:  # fmt: skip
    """Take ``steps`` full-batch steps and show every state to ``seen``; without a gradient it stays where it is."""
    flat = False
    for step in range(1, steps + 1):
        if not flat:
            gradient = loss(model, batches, x, edits)[1]
            flat = gradient is None
            x = x if gradient is None else update(x, gradient)
        seen(step, x)


def adam(rate: float) -> Update:
    """Adam with its usual constants (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1)."""
    state: dict[str, Any] = {"m": 0.0, "v": 0.0, "t": 0}

    def update(x: Tensor, gradient: Tensor) -> Tensor:
        state["t"] += 1
        state["m"] = 0.9 * state["m"] + 0.1 * gradient
        state["v"] = 0.999 * state["v"] + 0.001 * gradient.square()
        mean, square = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
        new: Tensor = x - rate * mean / (square.sqrt() + 1e-8)
        return new

    return update


def signed(rate: float) -> Update:
    """The same step in every coordinate, against the gradient's sign."""
    return lambda x, gradient: x - rate * gradient.sign()


def some_embeddings(model: LoadedModel, seed: int) -> Tensor:
    """Embeddings [SAMPLE, d] of tokens drawn by ``seed``, the same tokens on every arm with this vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, min(model.vocab_size, len(model.tokenizer)), (1, SAMPLE), generator=generator)
    with torch.no_grad():
        module: Any = core(model)
        found: Tensor = module.get_input_embeddings()(ids.to(model.device))[0]
    return found


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def probability(
    model: LoadedModel, count: int, paths: Sequence[path.Path], batches: Sequence[Lot],
    edits: Callable[[Lot], Mapping[Site, EditSite]],
) -> Array:  # fmt: skip
    """Per item, the truth's probability under confined decoding [count] while ``edits`` are written."""
    found = np.zeros(len(paths))
    for lot in batches:
        with hooks(model, edits(lot)):
            found[lot.rows.which] = path.read(answer_logits(model, lot.rows.batch, lot.rows.places), lot.rows)[0]
    return path.by_item(count, paths, found)


def universal(
    model: LoadedModel, part: Asked, paths: Sequence[path.Path], vectors: Tensor, place: Place, update: Update,
    marks: Sequence[int],
) -> tuple[Array, float]:  # fmt: skip
    """Learn ``vectors`` [n, d] on what is taught and ask with them; ``paths`` leave room for them.

    Returns the truth's probability [1 + marks, items], first for the plain question, and the last loss in nats per
    token.
    """
    width = len(vectors)
    asked = lots(model, place(model, paths, width))
    batches = lots(model, place(model, fitting(model, told(model, part.taught), width), width))
    rows = [path.probability(model, len(part.items), paths)]

    def seen(step: int, x: Tensor) -> None:
        nonlocal vectors
        vectors = x
        if step in marks:
            rows.append(probability(model, len(part.items), paths, asked, lambda lot: written(x, lot)))

    descend(model, batches, vectors, written, update, marks[-1], seen)
    return np.stack(rows), loss(model, batches, vectors, written)[0]


def marks_of(name: str, steps: int, checks: int) -> list[int]:
    """Steps after which is asked, without 0 (the plain question)."""
    if steps < checks or checks < 1:
        raise UsageError(f"Verifier '{name}' has {steps} steps and {checks} checks: give at least one step per check.")
    return sorted({round(steps * k / checks) for k in range(1, checks + 1)})


def crossed(
    name: str, view: View, *, seed: int, teach: Teach, company: float, max_taught: int, max_items: int
) -> list[Asked]:  # fmt: skip
    """What is taught and what is asked: each half of the forget clusters in turn, or retain items and everything."""
    if teach == "support":
        if not view.support:
            raise UsageError(f"Verifier '{name}' has no retain items to learn on: add some, or set teach: halves.")
        return [Asked(ask.limited(view.support, max_taught, seed), ask.limited(view.forget, max_items, seed))]
    halves = view.halves(seed)
    if not all(halves):
        raise UsageError(f"Verifier '{name}' needs at least two forget clusters on split '{view.split}' to learn on "
                         "one half and ask the other; or set teach: support.")  # fmt: skip
    out = []
    for taught, asked in (halves, halves[::-1]):
        taught = ask.limited(taught, max(1, round(max_taught / (1 + company))), seed)
        friends = ask.limited(view.support, round(company * len(taught)), seed)
        out.append(Asked((*taught, *friends), ask.limited(asked, max(1, max_items // 2), seed)))
    return out


def best_of(
    measure: str, parts: Sequence[tuple[Sequence[Item], Array]], view: View, alternatives: int
) -> tuple[dict[str, ItemScores], tuple[float, ...], int]:
    """Scores of the row [x, items] with the highest mean, the same maximum on every arm; the means; which row."""
    items = [item for part, _ in parts for item in part]
    table = np.concatenate([rows for _, rows in parts], axis=1)
    means = tuple(0.0 if np.isnan(row).all() else float(np.nanmean(row)) for row in table)
    best = int(np.argmax(means))
    before = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
    return {measure: ask.scores(items, table[best]), f"{measure}_prior": before}, means, best
