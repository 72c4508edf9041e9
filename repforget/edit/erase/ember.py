"""Take the factors of a concept out of token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.artifact import Edit, SparseDelta, Untie
from repforget.artifact.operations import Operation
from repforget.attribution import runs_of
from repforget.errors import NoEffectError, NumericalError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.weights import find, get_weight, is_tied
from repforget.progress import Progress, track
from repforget.scoring.encode import encode_prompts

INNER = 25  # steps of the codes for every step of the dictionary


def ember(
    model: LoadedModel, data: EditData, *, seed: int = 0, progress: Progress | None = None, size: int = 0,
    sparsity: float = 0.1, steps: int = 30, factors: int = 16, untie: bool = True,
) -> Edit:  # fmt: skip
    """Take sparse factors that tokens of the forget facts have, and others hardly, out of the token embeddings.

    A reconstruction: only the idea of the published method is known (arXiv 2606.03695), and what follows is this
    project's.  Embedding rows, less their mean, are written as S D with non-negative sparse codes S and unit rows of D
    (``min |E - S D|² / 2 + λ sum S``, by turns).  The ``factors`` with the largest mean code over the tokens of forget
    statements, relative to that over others (half retained text, half the vocabulary), are subtracted from the rows
    that have them: ``e_r - sum_j s_rj d_j``.  Other rows keep their bits.

    Args:
        size: rows of the dictionary, 0 for twice the width. sparsity: λ in units of the mean row length.
        steps: turns of the dictionary. factors: how many to take out.
        untie: give a tied unembedding a weight of its own, so that it stays; otherwise it changes with the embedding.

    Raises NoEffectError where no factor is larger on forget statements, NumericalError where the codes diverge.  Cost:
    no forward pass; ``steps`` times some products of the vocabulary, the width and the dictionary.

    Weakness: to be used beside another method. Names made of common tokens have no embedding of their own, and nothing
    is taken from what layers compute of tokens together.
    """
    if sparsity <= 0 or steps < 1 or factors < 1 or size < 0:
        raise UsageError(f"ember was given sparsity {sparsity}, steps {steps}, factors {factors} and size {size}: give "
                         "the first above 0 and one or more of the others (size 0: automatic).")  # fmt: skip
    ref = find(model.module, "embed")
    rows = get_weight(model.module, ref)
    found = factorised(rows, size or 2 * rows.shape[1], sparsity, steps, seed, progress)
    chosen = contrasted(found.codes, *_weights(model, data, len(rows)), factors)
    if not len(chosen):
        raise NoEffectError("No factor of the embeddings is larger on tokens of forget statements than on others: "
                            "lower 'sparsity', or give a larger 'size'.")  # fmt: skip
    part = found.codes[:, chosen] @ found.dictionary[chosen]
    affected = (found.codes[:, chosen] > 0).any(1).nonzero()[:, 0]
    width = rows.shape[1]
    index = (affected[:, None] * width + torch.arange(width, device=affected.device)).flatten()
    operations: list[Operation] = [SparseDelta(ref.name, index, -part[affected].flatten())]
    if untie and is_tied(model.module):
        operations.insert(0, Untie())
    notes = [f"{len(chosen)} factors taken out of {len(affected)} of {len(rows)} rows, "
             f"{found.unexplained:.2f} of the rows' variance outside the dictionary",
             "a reconstruction of the published method from its idea"]  # fmt: skip
    return Edit.build("ember", {}, model, data.digest, operations, notes=notes)


@dataclass(frozen=True)
class Factors:
    """Codes [V, k] (non-negative), dictionary [k, d] of unit rows, and the variance of rows they leave unexplained."""

    codes: Tensor
    dictionary: Tensor
    unexplained: float


def factorised(
    rows: Tensor, size: int, sparsity: float, steps: int, seed: int, progress: Progress | None = None
) -> Factors:
    """Non-negative sparse factors of ``rows`` [V, d] less their mean, by turns of codes (proximal gradient, with
    momentum) and dictionary (least squares); starts from rows drawn by seed."""
    x = rows.float() - rows.float().mean(0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(x), (size,), generator=generator).to(x.device)
    noise = torch.randn(size, x.shape[1], generator=generator).to(x)
    level = x.norm(dim=1).mean()
    dictionary = torch.nn.functional.normalize(x[drawn] + 0.1 * level * torch.nn.functional.normalize(noise, dim=1))
    codes = x.new_zeros(len(x), size)
    for _ in track(progress, range(steps), "factorising embeddings", steps):
        codes = _codes(x, dictionary, codes, float(sparsity * level))
        gram = codes.T @ codes
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(size, device=x.device)
        fresh = torch.linalg.solve(gram + ridge + 1e-12 * torch.eye(size, device=x.device), codes.T @ x)
        used = codes.any(0)
        dictionary = torch.nn.functional.normalize(torch.where(used[:, None], fresh, dictionary), dim=1)
    codes = _codes(x, dictionary, codes, float(sparsity * level))
    if not bool(codes.isfinite().all()):
        raise NumericalError("The factors of the embeddings are not finite: check the weights, or lower 'sparsity'.")
    left = (x - codes @ dictionary).square().sum() / x.square().sum().clamp(min=1e-30)
    return Factors(codes, dictionary, float(left))


def _codes(x: Tensor, dictionary: Tensor, start: Tensor, penalty: float) -> Tensor:
    """Codes that lower ``|x - S D|² / 2 + penalty sum S`` over S >= 0, from ``start``."""
    gram, target = dictionary @ dictionary.T, x @ dictionary.T
    rate = 1.0 / float(torch.linalg.matrix_norm(gram, 2))
    codes, ahead, t = start, start, 1.0
    for _ in range(INNER):
        new = (ahead - rate * (ahead @ gram - target + penalty)).clamp(min=0)
        later = (1 + (1 + 4 * t * t) ** 0.5) / 2
        ahead = new + (t - 1) / later * (new - codes)
        codes, t = new, later
    return codes


def contrasted(codes: Tensor, ours: Tensor, others: Tensor, most: int) -> Tensor:
    """The factors with the largest mean code under the token weights ``ours`` relative to ``others`` (both [V], sum 1);
    only those above 1."""
    inside, outside = ours.to(codes) @ codes, others.to(codes) @ codes
    ratio = inside / (outside + 1e-6 * codes.mean().clamp(min=1e-30))
    order = ratio.argsort(descending=True, stable=True)[:most]
    return order[(ratio[order] > 1) & (inside[order] > 0)]


def _weights(model: LoadedModel, data: EditData, rows: int) -> tuple[Tensor, Tensor]:
    """How often each token occurs in forget statements, and in retained text (half) or the vocabulary (half)."""
    forget = [run.base for run in runs_of(model.tokenizer, data.forget)]
    kept = [run.base for run in runs_of(model.tokenizer, data.retain)]
    kept += encode_prompts(model.tokenizer, data.general) if data.general else []

    def shares(texts: Sequence[Sequence[int]]) -> Tensor:
        tokens = torch.tensor([token for ids in texts for token in ids[1:]], dtype=torch.long)
        counts = torch.bincount(tokens, minlength=rows).double()
        return counts / counts.sum().clamp(min=1)

    return shares(forget), (shares(kept) + torch.full((rows,), 1 / rows)) / 2
