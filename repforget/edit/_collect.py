"""Stream the activations of an editor's facts at sites into Statistics; nothing but moments is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.capture import Batch, capture, hooks, stream
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization, Site
from repforget.scoring.encode import context_limit, encode_many, encode_prompts, pad_id, token_batches
from repforget.stats import Precision, Statistics

T = TypeVar("T")
Positions = Literal["last", "subject", "both"]
Consume = Callable[[dict[Site, Tensor], list[int]], None]
MEMORY = 2 << 30  # bytes of covariances held at once when many sites are read in one pass
TOKENS_PER_FEATURE = 100  # of retained text, for a covariance that is only a metric


@dataclass(frozen=True)
class Points:
    """Token sequences with the positions to read: ``positions`` [n][p], indices from each sequence's start.

    ``groups`` names for every (row, position) the frame within which a concept is compared: relation and kind
    of position. Position 0 carries massive activations and is never read (``skipped`` counts such points).
    """

    ids: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[str, ...], ...]
    facts: tuple[Fact, ...]

    @property
    def skipped(self) -> int:
        return sum(where == 0 for row in self.positions for where in row)


def read_points(model: LoadedModel, facts: Sequence[Fact], positions: Positions = "last") -> Points:
    """Where to read each fact: the last prompt token (which predicts the answer), the last token of the
    subject, or both. Answers are tokenised with their prompt, so the boundary is the one that scoring uses.
    """
    limit = context_limit(model)
    encoded = encode_many(model.tokenizer, [(f.prompt, f.answer) for f in facts], limit=limit)
    long = [fact.id for fact, code in zip(facts, encoded, strict=True) if not code.valid]
    if long:
        raise KnowledgeError(f"{len(long)} facts are longer than the model's context of {limit} tokens, first "
                             f"'{long[0]}': shorten their prompts.")  # fmt: skip
    rows: list[tuple[int, ...]] = []
    where: list[tuple[int, ...]] = []
    groups: list[tuple[str, ...]] = []
    for fact, code in zip(facts, encoded, strict=True):
        prompt = code.ids[: code.start]
        found = {"last": len(prompt) - 1}
        if positions != "last":
            found["subject"] = min(subject_token(model.tokenizer, fact), len(prompt) - 1)
        kinds = ("last", "subject") if positions == "both" else (positions,)
        rows.append(prompt)
        where.append(tuple(found[kind] for kind in kinds))
        groups.append(tuple(f"{fact.relation}/{kind}" for kind in kinds))
    return Points(tuple(rows), tuple(where), tuple(groups), tuple(facts))


def subject_token(tokenizer: Any, fact: Fact) -> int:
    """Index of the last token that holds a character of the subject's last mention in the prompt."""
    start = fact.prompt.rfind(fact.subject) if fact.subject else -1
    if start < 0:
        raise KnowledgeError(f"Fact '{fact.id}' does not mention its subject '{fact.subject}' in the prompt: read "
                             "the last token instead (positions: last).")  # fmt: skip
    if not tokenizer.is_fast:
        raise UsageError("Subject tokens need a tokenizer with character offsets (a fast one): read the last "
                         "token instead (positions: last).")  # fmt: skip
    stop = start + len(fact.subject)
    offsets = tokenizer(fact.prompt + fact.answer, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
    if not inside:
        raise UsageError(f"The tokenizer reports no characters for the subject of fact '{fact.id}': read the last "
                         "token instead (positions: last).")  # fmt: skip
    return inside[-1]


@torch.no_grad()
def collect(
    model: LoadedModel, points: Points, sites: Sequence[Site], consume: Consume, *,
    edits: Mapping[Site, Callable[[Tensor], Tensor]] | None = None, token_budget: int = 8192,
    progress: Progress | None = None, description: str = "reading activations",
) -> None:  # fmt: skip
    """Call ``consume(values, numbers)`` per batch: values [m, d] at each site, and the number of each point.

    Points are numbered row after row, ``row * p + position``. ``edits`` are active while reading. Costs one
    forward pass per fact, up to the deepest site.
    """
    width = len(points.positions[0])
    batches = list(token_batches(points.ids, token_budget=token_budget, pad_id=pad_id(model.tokenizer)))
    gathers = [torch.tensor([points.positions[row] for row in rows]) for rows, _ in batches]

    def receive(values: dict[Site, Tensor], index: int) -> None:
        rows, where = batches[index][0], gathers[index]
        keep = where.flatten() > 0
        numbers = (torch.tensor(rows)[:, None] * width + torch.arange(width)).flatten()[keep]
        flat = {site: x.flatten(0, 1)[keep.to(x.device)] for site, x in values.items()}
        consume(flat, numbers.tolist())

    shown = track(progress, (batch for _, batch in batches), description, len(batches))
    with ExitStack() as stack:
        if edits:
            stack.enter_context(hooks(model, edits))
        stream(model, sites, shown, lambda index: gathers[index], receive)


def collect_text(
    model: LoadedModel, sequences: Sequence[Sequence[int]], sites: Sequence[Site],
    consume: Callable[[dict[Site, Tensor]], None], *,
    edits: Mapping[Site, Callable[[Tensor], Tensor]] | None = None, token_budget: int = 8192,
    progress: Progress | None = None, description: str = "reading text",
) -> None:  # fmt: skip
    """Call ``consume`` with every token's activation [m, d] (first tokens and padding left out)."""
    pad = pad_id(model.tokenizer)
    batches = [batch for _, batch in token_batches(sequences, token_budget=token_budget, pad_id=pad)]
    with ExitStack() as stack:
        if edits:
            stack.enter_context(hooks(model, edits))
        shown = track(progress, batches, description, len(batches))
        stream(model, sites, shown, "tokens", lambda values, _: consume(values))


def text_sequences(model: LoadedModel, data: EditData, facts: Sequence[Fact]) -> list[tuple[int, ...]]:
    """Token sequences of retained text: complete statements and the general texts, cut to the context.

    Statements are a fixed random selection of ``facts`` of at most ``TOKENS_PER_FEATURE`` tokens per residual
    dimension: a covariance of that many rows is known well enough.
    """
    limit = context_limit(model)
    general, stated = (
        [ids[:limit] for ids in encode_prompts(model.tokenizer, texts)] if texts else []
        for texts in (list(data.general), [fact.prompt + fact.answer for fact in facts])
    )
    share = TOKENS_PER_FEATURE * model.width / max(1, sum(map(len, stated)))
    if share < 1:
        order = torch.randperm(len(stated), generator=torch.Generator().manual_seed(0))
        stated = [stated[i] for i in order[: math.ceil(share * len(stated))].sort().values.tolist()]
    return stated + general


def new_statistics(
    model: LoadedModel, sites: Sequence[Site], k: int = 0, *, covariance: bool = True, precision: Precision = "double",
) -> dict[Site, Statistics]:  # fmt: skip
    """Empty statistics for each site, on the model's device where that has float64."""
    places = site_map(model.module)
    device = torch.device("cpu") if model.device.type == "mps" else model.device
    return {
        site: Statistics.empty(places.size(site), k, covariance=covariance, precision=precision, device=device,
                               meta={"model": model.fingerprint, "site": str(site)})
        for site in sites
    }  # fmt: skip


def site_groups(model: LoadedModel, sites: Sequence[Site]) -> list[list[Site]]:
    """Sites in forward order, in groups whose covariances fit in memory together."""
    places = site_map(model.module)
    ordered = sorted(dict.fromkeys(sites), key=places.rank)
    size = max(1, MEMORY // (8 * places.width**2))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def choose_sites(
    model: LoadedModel, requested: Literal["auto"] | Sequence[str], where: Localization | None, *,
    kinds: Sequence[str], top_layers: int,
) -> tuple[Site, ...]:  # fmt: skip
    """The sites asked for, in forward order; "auto": ``kinds`` of the localization's best layers, else of all."""
    places = site_map(model.module)
    if requested != "auto":
        if not requested:
            raise UsageError("No site was given: name at least one, for example 'mlp_in.3', or write 'auto'.")
        found = [site for text in requested for site in places.expand(text)]
    else:
        layers = where.layers()[:top_layers] if where is not None else ()
        found = [site for kind in kinds for site in places.expand(kind) if not layers or site.layer in layers]
    return tuple(sorted(dict.fromkeys(found), key=places.rank))


def subsample(facts: Sequence[T], limit: int, seed: int) -> tuple[T, ...]:
    """At most ``limit`` facts (or texts), chosen by seed, in their own order."""
    if limit < 1:
        raise UsageError(f"At most {limit} facts were allowed: give a positive number.")
    if len(facts) <= limit:
        return tuple(facts)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(facts), generator=generator)[:limit].sort().values
    return tuple(facts[i] for i in chosen.tolist())


def leftover(model: LoadedModel, sites: Sequence[Site], basis: Tensor, sequences: Sequence[Sequence[int]]) -> float:
    """Largest share |basis x| / |x| over all tokens at ``sites`` (``basis`` [r, d] orthonormal; 0 = nothing left)."""
    worst = 0.0
    for rows in (sequences[i : i + 64] for i in range(0, len(sequences), 64)):
        for x in capture(model, sites, Batch.pad(rows), gather="tokens").values():
            wide = x.double()
            shares = (wide @ basis.to(wide).mT).norm(dim=-1) / wide.norm(dim=-1)
            worst = max(worst, float(shares.max()))
    return worst
