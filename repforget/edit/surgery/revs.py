"""Edit value vectors in the vocabulary, so that they no longer rank the tokens of an answer high."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.attribution import runs_of
from repforget.causal import Run, prepare
from repforget.columns import column_deltas, value_vector
from repforget.edit._collect import subsample
from repforget.edit.surgery._units import best_neurons
from repforget.errors import NumericalError, UsageError
from repforget.knowledge import EditData
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.models.norms import freeze
from repforget.models.readout import lens
from repforget.models.sites import site_map
from repforget.models.value_vectors import projections, readouts, spoken
from repforget.models.weights import WeightRef
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site

ROUNDS = 200  # of lowering and reading again, per vector
MARGIN = 0.05  # below the wanted rank that a round aims, in standard deviations of the logits


def revs(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, rank: float = 0.5, answer_tokens: int = 2, top_layers: int = 2, neurons: int = 10,
    max_facts: int = 128,
) -> Edit:  # fmt: skip
    """Lower the tokens of an answer to a given rank in the value vectors that write them, layer by layer.

    For the ``answer_tokens`` rarest tokens of every answer: the layers whose MLP output, where the token is predicted,
    reads it out highest; there the neurons of largest |activation| times association, the token's logit in the value
    vector's readout above the mean logit. In each such vector v the logits of its tokens are lowered to rank ``rank``
    and mapped back, round after round, until they have that rank.  The map is the pseudo-inverse of the readout, scaled
    to reach exactly what is asked of these tokens: of all changes of v that do, the one that moves all logits least.
    Source: Ashuach et al. 2024, arXiv 2406.09325, implemented from its description.

    Args:
        rank: tokens that have to rank above, as a share of the vocabulary.
        answer_tokens: per answer, rarest among the editor's statements first.
        top_layers: per token. neurons: per token and layer; not used where ``where`` ranks neurons: then all tokens go
            from as many of its best as its band was made with.
        max_facts: statements read, chosen by seed.

    Raises SiteError for batched experts, NumericalError where a vector cannot reach the rank for all its tokens.  Cost:
    a forward per fact, one unembedding per neuron, a d x d solve and a few unembeddings per chosen vector.

    Weakness: what the answer is made of before it is written stays, in other bases than the vocabulary's; facts to keep
    with the same answer lose the same vectors; neurons that act by negative activations are not found.
    """
    if not 0 < rank < 1 or min(answer_tokens, top_layers, neurons) < 1:
        raise UsageError(f"revs was given rank {rank}, answer_tokens {answer_tokens}, top_layers {top_layers} and "
                         f"neurons {neurons}: give a share, and one or more of the others.")  # fmt: skip
    refs = projections(model.module)
    forget = runs_of(model.tokenizer, subsample(data.forget, max_facts, seed))
    counts = Counter(token for run in (*runs_of(model.tokenizer, data.retain), *runs_of(model.tokenizer, data.forget))
                     for token in run.base)  # fmt: skip
    wanted = [_rarest(run, counts, answer_tokens) for run in forget]
    given = best_neurons(where)
    if given:
        every = sorted({run.base[k] for run, own in zip(forget, wanted, strict=True) for k in own})
        targets = {neuron: set(every) for neuron in given}
    else:
        targets = _targets(model, forget, wanted, refs, top_layers, neurons, progress)
    below = max(1, int(rank * model.vocab_size))
    deltas: dict[Component, Tensor] = {}
    maps: dict[int, Tensor] = {}
    for neuron, tokens in track(progress, sorted(targets.items()), "editing value vectors", len(targets)):
        layer, vector = neuron.site.layer, value_vector(model, neuron)
        if layer not in maps:
            maps = {layer: _linear(model, refs[layer], vector)}
        moved = lowered(model, refs[layer], maps[layer], vector, sorted(tokens), below)
        if not torch.equal(moved, vector):
            deltas[neuron] = moved - vector
    notes = [f"{len(deltas)} of {len(targets)} value vectors of layers {sorted({n.site.layer for n in deltas})} moved, "
             f"{sum(map(len, targets.values())) / max(1, len(targets)):.1f} tokens each"]  # fmt: skip
    return Edit.build("revs", {}, model, data.digest, column_deltas(model, deltas), notes=notes)


def _rarest(run: Run, counts: Counter[int], most: int) -> list[int]:
    """Positions of the answer's rarest tokens in the run."""
    places = range(run.start, len(run.base))
    return sorted(sorted(places, key=lambda k: (counts[run.base[k]], k))[:most])


@torch.no_grad()
def _targets(
    model: LoadedModel, runs: Sequence[Run], wanted: Sequence[Sequence[int]], refs: Sequence[WeightRef],
    top_layers: int, neurons: int, progress: Progress | None,
) -> dict[Component, set[int]]:  # fmt: skip
    """The neurons to edit, and the tokens to lower in each."""
    tokens = sorted({run.base[k] for run, own in zip(runs, wanted, strict=True) for k in own})
    place = {token: k for k, token in enumerate(tokens)}
    association = [torch.cat([(part[:, tokens] - part.mean(1, keepdim=True)).clamp(min=0) for part in readouts(
        model.module, ref)]) for ref in refs]  # fmt: skip
    layers = range(len(refs))
    sites = [Site(kind, layer) for layer in layers for kind in ("mlp_post", "mlp_out")]
    found: dict[Component, set[int]] = {}
    batches = list(prepare(model, runs))
    for item in track(progress, batches, "finding neurons", len(batches)):
        values = capture(model, sites, item.base, gather="all")
        for b, row in enumerate(item.rows):
            shift = item.base.ids.shape[1] - (len(runs[row].base) - 1)
            for k in wanted[row]:
                token, at = runs[row].base[k], k - 1 + shift
                read = [lens(model, values[Site("mlp_out", layer)][b, at]) for layer in layers]
                ranks = [int((logits > logits[token]).sum()) for logits in read]
                for layer in sorted(layers, key=ranks.__getitem__)[:top_layers]:
                    size = values[Site("mlp_post", layer)][b, at].abs().float() * association[layer][:, place[token]]
                    for n in size.topk(min(neurons, len(size))).indices.tolist():
                        found.setdefault(Component(Site("mlp_post", layer), n), set()).add(token)
    return found


@torch.no_grad()
def _linear(model: LoadedModel, ref: WeightRef, vector: Tensor) -> Tensor:
    """The readout [V, d] of value vectors with all norms at scale 1 and without biases, float64."""
    module, anatomy = model.module, site_map(model.module).anatomy
    norms = [module.get_submodule(path) for path in (ref.post_norm, anatomy.final_norm) if path is not None]
    matrix = torch.eye(model.width, dtype=torch.float64, device=model.device)
    for norm in norms:
        fixed = freeze(norm, torch.ones(model.width, device=model.device, dtype=model.dtype))
        matrix = replace(fixed, scale=torch.ones_like(fixed.scale)).linear(matrix)
    head = module.get_submodule(anatomy.unembed)
    weight: Tensor = head.weight  # type: ignore[assignment]
    return weight.detach().double() @ matrix.T


@torch.no_grad()
def lowered(
    model: LoadedModel, ref: WeightRef, readout: Tensor, vector: Tensor, tokens: Sequence[int], below: int
) -> Tensor:
    """``vector`` [d] changed so that at least ``below`` tokens rank above each of ``tokens`` in its readout.

    NumericalError where that is not reached.  ``readout`` [V, d] is the readout without scale and biases.
    """
    if below > readout.shape[0] - len(tokens):
        raise UsageError(f"{below} tokens cannot rank above {len(tokens)} others in a vocabulary of "
                         f"{readout.shape[0]}: lower 'rank', or take fewer facts.")  # fmt: skip
    gram = readout.T @ readout
    inverse = torch.linalg.pinv(gram, hermitian=True)
    moved = vector.to(readout)
    for _ in range(ROUNDS):
        logits, turned = spoken(model.module, ref, torch.stack([moved, -moved]).to(model.dtype)).double()
        high = [t for t in tokens if int((logits > logits[t]).sum()) < below]
        if not high:
            return moved.float().cpu()
        plain, rows = readout @ moved, readout[high]
        scale = (plain @ (logits - turned) / 2 / plain.square().sum()).clamp(min=1e-12)  # biases cancel
        aim = logits.sort(descending=True).values[below] - MARGIN * logits.std()
        change = (aim - logits[high]) / scale
        moved = moved + inverse @ rows.T @ torch.linalg.lstsq(rows @ inverse @ rows.T, change[:, None]).solution[:, 0]
    raise NumericalError(f"A value vector of '{ref.name}' cannot have {below} tokens ranked above each of "
                         f"{len(tokens)} at once: lower 'rank', or take fewer facts.")  # fmt: skip
