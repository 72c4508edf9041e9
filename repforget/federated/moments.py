"""Editors that need moments alone, made for a federation: every client sends second moments, nobody an activation.

A client reads its own facts and texts and sends :class:`~repforget.stats.Statistics`; the server adds them up, in any
number and order, and solves.  The edit is the one that all the data in one place would have given.

What that discloses: means, covariances and class means of activations, and which classes (relations and answers) a
client has.  A class of one point *is* that point's activation, and a mean over few is nearly as telling: so a client
refuses below ``minimum`` points per class and per matrix.  The second moments of no more points than features also
tell the space that those points span.  Sums over clients (:mod:`repforget.federated.secure`) hide each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from repforget.artifact import Edit, LowRankDelta
from repforget.edit._collect import (
    Points,
    Positions,
    choose_sites,
    collect,
    collect_text,
    new_statistics,
    read_points,
    site_groups,
    subsample,
    text_sequences,
)
from repforget.edit._concept import Concept, Target
from repforget.edit.erase._leace_math import Eraser, fit_eraser
from repforget.edit.erase._scrub import Metric, Reading, as_edit, cut, limit
from repforget.errors import KnowledgeError, NumericalError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization, Site
from repforget.stats import Shrinkage, Statistics

MINIMUM = 5  # points behind every mean that a client sends
HEADER = 2048  # bytes at most of names and checksums around the numbers
Classes = tuple[tuple[str, str], ...]  # (frame, label), sorted: the columns of the concept
Moments = dict[Site, tuple[Statistics, Statistics]]  # of the concept's points, and of the rows of the metric


@dataclass(frozen=True, eq=False)
class Question:
    """What the server asks of every client: which moments, behind which erasers, of at least how many points."""

    sites: tuple[Site, ...]
    how: Reading
    classes: Classes = ()
    erasers: Mapping[Site, Eraser] | None = None
    seed: int = 0
    minimum: int = MINIMUM


class Reader(Protocol):
    """A client as the server sees it, or many in one."""

    @property
    def names(self) -> tuple[str, ...]:
        """Who is behind it."""

    def classes(self, question: Question) -> Classes:
        """The (frame, label) pairs of its own points."""

    def moments(self, question: Question) -> Moments:
        """Moments at the sites, of the concept's points and of the metric's rows."""

    def keys(self, question: Question) -> Moments:
        """Moments of MLP keys: of the forget facts (with one class per frame), and of everything to keep."""


@dataclass(frozen=True)
class Local:
    """A client in this process: ``name``, the shared model and its own data, of which nothing but moments is told.

    UsageError below the question's minimum.  Cost of an answer: one pass over its own facts and texts.
    """

    name: str
    model: LoadedModel
    data: EditData

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def classes(self, question: Question) -> Classes:
        return tuple(sorted({pair for _, pair in self._labelled(question)[1]}))

    def moments(self, question: Question) -> Moments:
        points, labelled = self._labelled(question)
        number = {pair: i for i, pair in enumerate(question.classes)}
        own = question.how.metric == "concept"
        seen = new_statistics(self.model, question.sites, len(number), covariance=own)
        labels = torch.tensor([number[pair] for _, pair in labelled], dtype=torch.long)
        self._read(points, labels, question, seen)
        space = seen
        if not own:
            space = new_statistics(self.model, question.sites)
            retain = subsample(self.data.retain, question.how.max_facts, question.seed)
            if question.how.metric == "retain":
                self._read(read_points(self.model, retain, question.how.positions), None, question, space)
            else:
                self._text(text_sequences(self.model, self.data, retain), question, space)
        return checked(self.name, {site: (seen[site], space[site]) for site in question.sites}, question.minimum)

    def keys(self, question: Question) -> Moments:
        points, labelled = self._labelled(question)
        number = {frame: i for i, frame in enumerate(frames_of(question.classes))}
        seen = new_statistics(self.model, question.sites, len(number))
        self._read(points, torch.tensor([number[pair[0]] for _, pair in labelled], dtype=torch.long), question, seen)
        space = new_statistics(self.model, question.sites)
        retain = subsample(self.data.retain, question.how.max_facts, question.seed)
        self._text(text_sequences(self.model, self.data, retain), question, space)
        return checked(self.name, {site: (seen[site], space[site]) for site in question.sites}, question.minimum)

    def counts(self, question: Question, of: str) -> Tensor:
        """Points behind every mean of "moments" (one per class) or "keys" (one per frame), [k] float64."""
        names = question.classes if of == "moments" else frames_of(question.classes)
        number = {name: i for i, name in enumerate(names)}
        own = [number[pair if of == "moments" else pair[0]] for _, pair in self._labelled(question)[1]]
        return torch.bincount(torch.tensor(own, dtype=torch.long), minlength=len(number)).double()

    def _labelled(self, question: Question) -> tuple[Points, list[tuple[int, tuple[str, str]]]]:
        """The points of the concept, and (number, (frame, label)) of each of them."""
        how = question.how
        forget = subsample(self.data.forget, how.max_facts, question.seed)
        retain = subsample(self.data.retain, how.max_facts, question.seed) if how.target == "membership" else ()
        points = read_points(self.model, (*forget, *retain), how.positions)
        gone = {fact.id for fact in forget}
        pairs = [(group, fact.answer if how.target == "answer" else "forget" if fact.id in gone else "retain")
                 for fact, row in zip(points.facts, points.groups, strict=True) for group in row]  # fmt: skip
        if question.classes and not {frame for frame, _ in pairs} <= {frame for frame, _ in question.classes}:
            pairs = [(group.rpartition("/")[2], label) for group, label in pairs]  # compared across relations
        return points, list(enumerate(pairs))

    def _read(
        self, points: Points, labels: Tensor | None, question: Question, into: Mapping[Site, Statistics]
    ) -> None:
        def note(values: dict[Site, Tensor], numbers: list[int]) -> None:
            for site, x in values.items():
                into[site].update(x, None if labels is None else labels[numbers])

        if points.ids:
            collect(self.model, points, question.sites, note, edits=question.erasers)

    def _text(
        self, rows: Sequence[Sequence[int]], question: Question, into: Mapping[Site, Statistics]
    ) -> None:
        def watch(values: dict[Site, Tensor]) -> None:
            for site, x in values.items():
                into[site].update(x)

        if rows:
            collect_text(self.model, rows, question.sites, watch, edits=question.erasers)


def frames_of(classes: Classes) -> tuple[str, ...]:
    """The frames of classes, in their order."""
    return tuple(dict.fromkeys(frame for frame, _ in classes))


def checked(name: str, told: Moments, minimum: int) -> Moments:
    """``told``, or UsageError where a mean in it is of fewer than ``minimum`` points."""
    for site, pair in told.items():
        for stats in pair:
            few = fewest(stats)
            if few is not None and few < minimum:
                exact = "are that activation itself" if few == 1 else "tell much about each of them"
                raise UsageError(f"Client '{name}' has a mean of {few} points at {site}, fewer than {minimum}: its "
                                 f"moments {exact}; give it more records, sum securely over clients, or allow it with "
                                 f"minimum={few}.")  # fmt: skip
    return told


def fewest(stats: Statistics) -> int | None:
    """The smallest number of points behind a mean that these statistics hold (None: they hold nothing)."""
    if not stats.n:
        return None
    counts: list[int] = (stats.mean_z * stats.n).round().long().tolist()
    return min([stats.n, *(count for count in counts if count)])


def _names(clients: Mapping[str, Reader]) -> list[str]:
    return sorted(name for each in clients.values() for name in each.names)


def bandwidth(d: int, k: int = 0, *, covariance: bool = True) -> int:
    """Bytes of the numbers that one client sends for one site: float64 means [d], [k], cross [k, d] and, once, [d, d].

    The file around them adds at most :data:`HEADER` bytes.  It does not depend on how many records a client has.
    """
    return 8 * (d + k + k * d + (d * d if covariance else 0))


def leace(
    model: LoadedModel, clients: Mapping[str, Reader], *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, target: Target = "answer", positions: Positions = "last",
    sites: Literal["auto"] | list[str] = "auto", top_layers: int = 4, rank: int | Literal["auto", "full"] = "auto",
    affine: bool = True, sequential: bool = True, metric: Metric = "text", shrinkage: Shrinkage = "diagonal",
    max_facts: int = 4096, minimum: int = MINIMUM,
) -> Edit:  # fmt: skip
    """The edit of :func:`repforget.edit.erase.leace.leace` on all clients' facts together, from their moments alone.

    Belrose et al. 2023, arXiv 2306.03819; every quantity it needs is a sum over points, so that the split of the data
    among clients makes no difference beyond rounding (as long as no client has more than ``max_facts`` facts per set,
    or text beyond what :func:`~repforget.edit._collect.text_sequences` takes).  ``sequential`` asks the clients once
    per site, otherwise once.  Settings are the editor's; ``minimum``: points behind every mean that a client sends.

    Raises UsageError, naming the client, below the minimum or for moments of another model; KnowledgeError for a
    concept that does not vary.  Sends :func:`bandwidth` bytes per client and site, independent of their records.
    """
    chosen = choose_sites(model, sites, where, kinds=("attn_in", "mlp_in"), top_layers=top_layers)
    how = Reading(target, positions, sites, top_layers, sequential, max_facts, metric)
    classes = _classes(clients, Question(chosen, how, (), None, seed, minimum))
    frames = {frame: i for i, frame in enumerate(frames_of(classes))}
    concept = Concept(torch.zeros(0, dtype=torch.long), torch.tensor([frames[frame] for frame, _ in classes]),
                      tuple("=".join(pair) for pair in classes))  # fmt: skip
    erasers: dict[Site, Eraser] = {}
    points, sent, many = 0, 0, len(_names(clients))
    groups = [[site] for site in chosen] if sequential else site_groups(model, chosen)
    for group in track(progress, groups, "erasing site by site"):
        question = Question(tuple(group), how, classes, dict(erasers) if sequential else {}, seed, minimum)
        merged = _merged(model, {name: clients[name].moments(question) for name in sorted(clients)}, group)
        for site, (seen, space) in merged.items():
            erasers[site] = fit_eraser(space, cross=concept.cross(seen), shrinkage=shrinkage,
                                       rank=limit(rank, seen.d), affine=affine)  # fmt: skip
            points = seen.n
            sent += bandwidth(seen.d, seen.k, covariance=metric == "concept")
            sent += bandwidth(space.d) if metric != "concept" else 0
    notes = [f"concept of {len(classes)} classes in {len(frames)} frames, from the moments of {points} points at "
             f"{many} clients; each sent {sent} bytes of second moments, and no activation"]  # fmt: skip
    if minimum < 2:
        notes.append("classes of a single point were allowed: their moments are those activations themselves")
    if left := cut(erasers):
        notes.append(f"only the strongest directions were erased (rank={rank}: {left}): the concept is weakened there, "
                     "not linearly erased")  # fmt: skip
    full = {**vars(how), "sites": [str(s) for s in chosen], "rank": rank, "affine": affine, "shrinkage": shrinkage,
            "minimum": minimum, "clients": many}  # fmt: skip
    return as_edit("leace", model, _no_data(clients), erasers, sites != "auto", full, notes)


def null_space(
    model: LoadedModel, clients: Mapping[str, Reader], layers: Sequence[int], *, seed: int = 0,
    progress: Progress | None = None, rank: int = 64, ridge: float = 0.01, keep: float = 1.0,
    positions: Positions = "last", max_facts: int = 6000, minimum: int = MINIMUM,
) -> Edit:  # fmt: skip
    """Make MLP outputs write the same for all forget subjects of a relation, where protected keys hardly have weight.

    ``W -= W S (S + keep A)^-1``: S is the second moment of forget keys about the mean of their relation, A that of the
    keys of everything to keep, plus ``ridge`` of its mean variance; of it the ``rank`` generalised eigenvectors with
    the most forget energy per protected energy, as :func:`~repforget.edit.surgery.null_space_surgery` finds its
    directions.  That editor then optimises what is written along them, row by row of the data, which no moments can
    say; this is the normal equation of MEMIT (Meng et al. 2022, arXiv 2210.07229, equation 14) with the relation's
    mean as the value, and moves kept people along with forgotten ones more than it does (experiments/LOG.md).

    Raises as :func:`leace`.  Sends two m x m matrices per client and layer; one pass over the facts and texts.
    """
    if rank < 1 or not keep > 0 or not ridge > 0:
        raise UsageError(f"null_space was given rank {rank}, keep {keep} and ridge {ridge}: all must be above 0.")
    sites = tuple(choose_sites(model, [f"mlp_post.{layer}" for layer in layers], None, kinds=(), top_layers=1))
    how = Reading("answer", positions, [str(site) for site in sites], len(sites), False, max_facts, "text")
    classes = _classes(clients, Question(sites, how, (), None, seed, minimum))
    operations, sent, many = [], 0, len(_names(clients))
    for site in track(progress, sites, "solving layer by layer"):
        question = Question((site,), how, classes, None, seed, minimum)
        merged = _merged(model, {name: clients[name].keys(question) for name in sorted(clients)}, [site])
        name = f"{site_map(model.module).anatomy.layers[site.layer].down}.weight"
        operations.append(LowRankDelta(name, *_normal(model, name, *merged[site], rank, ridge, keep)))
        seen, space = merged[site]
        sent += bandwidth(seen.d, seen.k) + bandwidth(space.d)
    full = {"layers": list(layers), "rank": rank, "ridge": ridge, "keep": keep, "positions": positions,
            "max_facts": max_facts, "minimum": minimum, "clients": many}  # fmt: skip
    notes = ("values in closed form from moments, not optimised: expect kept people to move with forgotten ones",
             f"{many} clients; each sent {sent} bytes of second moments, and no activation")  # fmt: skip
    return Edit.build("null_space", full, model, _no_data(clients).digest, operations, notes=notes)


def key_directions(forget: Tensor, kept: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Generalised eigenvectors V [r, m] of ``forget`` against ``kept`` (both [m, m]) with ``V kept V' = I``, and the
    energies [r], largest first; those without forget energy are left out."""
    factor, failed = torch.linalg.cholesky_ex(kept)
    if int(failed):
        raise NumericalError("The second moment of protected keys is singular: give a larger ridge, for example 0.01.")
    half = torch.linalg.solve_triangular(factor, forget, upper=False)
    white = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    energies, vectors = torch.linalg.eigh((white + white.mT) / 2)
    energies, vectors = energies.flip(0)[:rank], vectors.flip(1)[:, :rank]
    live = energies > 1e-9 * energies[0].clamp_min(1e-300)
    return torch.linalg.solve_triangular(factor.mT, vectors[:, live], upper=True).mT, energies[live]


def within(seen: Statistics) -> Tensor:
    """Second moment [m, m] of the points about the mean of their class (``seen`` counted one-hot classes)."""
    share = seen.mean_z
    live = share > 0
    factor = (seen.n - 1) / seen.n
    between = seen.cross[:, live] * factor
    return seen.cov * factor - (between / share[live]) @ between.mT


def _normal(
    model: LoadedModel, name: str, forget: Statistics, kept: Statistics, rank: int, ridge: float, keep: float
) -> tuple[Tensor, Tensor]:
    metric = kept.second_moment
    metric = metric + ridge * metric.diagonal().mean() * torch.eye(len(metric)).to(metric)
    v, energies = key_directions(within(forget), metric, rank)
    owner = model.module.get_submodule(name.rpartition(".")[0])
    weight = owner.get_parameter("weight").detach().to(metric)
    weight = weight if weight.shape[1] == len(metric) and not _conv1d(owner) else weight.mT
    return -(weight @ metric @ v.mT) * (energies / (energies + keep)), v


def _conv1d(owner: torch.nn.Module) -> bool:
    from repforget.artifact.weights import is_conv1d

    return is_conv1d(owner)


def _classes(clients: Mapping[str, Reader], question: Question) -> Classes:
    """The union of the clients' classes; frames are joined across relations where no relation has two labels."""
    if not clients:
        raise UsageError("There is no client to ask for moments: name at least one.")
    found = {pair for name in sorted(clients) for pair in clients[name].classes(question)}
    if len(found) == len({frame for frame, _ in found}):
        if question.how.target == "answer":
            raise KnowledgeError("Every relation of the clients' forget facts has a single answer, so that no answer "
                                 "can be told from another: use target 'membership' or facts that differ.")  # fmt: skip
        found = {(frame.rpartition("/")[2], label) for frame, label in found}
    return tuple(sorted(found))


def _merged(model: LoadedModel, told: Mapping[str, Moments], sites: Sequence[Site]) -> Moments:
    """All clients' statistics in one, in the order of their names."""
    found: Moments = {}
    for site in sites:
        for name, each in told.items():
            if site not in each or any(s.meta.get("model") != model.fingerprint for s in each[site]):
                raise UsageError(f"Client '{name}' sent no moments of '{model.name}' at {site}: it must read the same "
                                 "model.")  # fmt: skip
            seen, space = each[site]
            if site not in found:
                found[site] = seen, space
                continue
            before, other = found[site]
            merged = before.merge(seen)
            found[site] = merged, merged if space is seen else other.merge(space)
    return found


def _no_data(clients: Mapping[str, Reader]) -> EditData:
    """What the server knows of the data: whose they are."""
    names = hashlib.sha256("\n".join(_names(clients)).encode()).hexdigest()
    return EditData((), (), (), {}, names)
