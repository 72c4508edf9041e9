"""Questions about moments as messages: what a client tells, in the clear or masked, and how the server reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from repforget.edit._collect import new_statistics
from repforget.edit.erase._leace_math import Eraser
from repforget.edit.erase._scrub import Reading
from repforget.errors import UsageError
from repforget.federated.messages import Kind, Task, Told, shown
from repforget.federated.moments import Classes, Local, Moments, Question, frames_of
from repforget.federated.secure import Agreement, Party, flattened
from repforget.models.load import LoadedModel
from repforget.records import Site
from repforget.stats import Statistics

if TYPE_CHECKING:
    from repforget.federated.clients import Client

MOST = 10_000  # classes that a client may tell
NO_FACTS = ("has no facts to read moments from: give --data JSON lines that each say by 'set' whether they are to "
            "forget, retain or general, with 'relation'")  # fmt: skip
Arrays = Mapping[str, np.ndarray]


def told(client: Client, task: Task) -> Told:
    """A client's answer to a task that is no training; UsageError where it has no facts, or will not tell."""
    if task.kind not in get_args(Kind):
        raise UsageError(f"Client '{client.name}' was asked for '{shown(task.kind)}', which it does not know: use the "
                         "same release as the server.")  # fmt: skip
    if client.data is None:
        raise UsageError(f"Client '{client.name}' {NO_FACTS}.")
    words = task.words
    if task.kind == "key":
        party = Party(client.name, Agreement(tuple(words["clients"]), float(words["bound"]), str(words["purpose"])))
        client.parties[party.agreement.purpose] = party
        return Told({}, {"public": np.frombuffer(party.public, np.uint8)})
    local = Local(client.name, client.model, client.data)
    question = unpacked(words["question"], task.state)
    if task.kind == "classes":
        return Told({"classes": local.classes(question)})
    read = {"moments": local.moments, "keys": local.keys}[words["of"]]
    if task.kind == "moments":
        return Told({}, parts(read(replace(question, minimum=max(question.minimum, client.minimum)))))
    if words["purpose"] not in client.parties:
        raise UsageError(f"Client '{client.name}' was asked for a sum without an exchange of keys: start again.")
    party = client.parties.pop(words["purpose"])
    _same_clients(client, party.agreement)
    if words["counts"]:
        vector = local.counts(question, words["of"]).numpy()
    else:
        vector = flattened(sums(read(replace(question, minimum=0))))
    return Told({}, {"sum": party.masked(vector, {who: bytes.fromhex(key) for who, key in words["public"].items()})})


def _same_clients(client: Client, agreement: Agreement) -> None:
    """UsageError where another run of a server, which may have ended in any way, was told a sum over other clients.

    Within a run the server alone knows which totals it has seen.
    """
    run = agreement.purpose.partition(":")[0]
    names = frozenset(agreement.clients)
    if other := next((group for was, group in client.summed.items() if was != run and group != names), None):
        raise UsageError(f"Client '{client.name}' has told another run of the server a sum over {len(other)} clients "
                         f"({', '.join(sorted(other))}), and one over others would show by the difference what single "
                         "ones told: bring the same clients, or join again to allow it.")  # fmt: skip
    client.summed[run] = names


def packed(question: Question) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A question as plain words and, for its erasers, tensors."""
    erasers = question.erasers
    tensors = {f"{site}/{part}": value.cpu().numpy() for site, eraser in (erasers or {}).items()
               for part in ("left", "right", "center") if (value := getattr(eraser, part)) is not None}  # fmt: skip
    words = {"sites": [str(site) for site in question.sites], "how": asdict(question.how),
             "classes": question.classes, "seed": question.seed, "minimum": question.minimum,
             "erasers": None if erasers is None else [str(site) for site in erasers]}  # fmt: skip
    return words, tensors


def unpacked(words: Mapping[str, Any], tensors: Arrays) -> Question:
    """The question that was :func:`packed`."""
    erasers = None
    if words["erasers"] is not None:
        erasers = {Site.parse(name): _eraser({part: torch.from_numpy(np.array(tensors[f"{name}/{part}"]))
                                              for part in ("left", "right", "center") if f"{name}/{part}" in tensors})
                   for name in words["erasers"]}  # fmt: skip
    return Question(tuple(Site.parse(name) for name in words["sites"]), Reading(**words["how"]),
                    tuple((str(a), str(b)) for a, b in words["classes"]), erasers, int(words["seed"]),
                    int(words["minimum"]))  # fmt: skip


def _eraser(parts: Mapping[str, torch.Tensor]) -> Eraser:
    return Eraser(parts["left"], parts["right"], parts.get("center"), torch.zeros(0), parts["left"].shape[1], False)


def sums(moments: Moments) -> dict[str, np.ndarray]:
    """The plain sums of moments, which can be added up, by site, which of the pair, and part."""
    return {f"{site}/{which}/{part}": values.cpu().numpy() for site, pair in moments.items()
            for which, stats in _different(pair) for part, values in stats.sums().items()}  # fmt: skip


def parts(moments: Moments) -> dict[str, np.ndarray]:
    """The parts of moments, of which the same are made again, bit for bit; named like :func:`sums`."""
    return {f"{site}/{which}/{part}": values.numpy() for site, pair in moments.items()
            for which, stats in _different(pair) for part, values in stats.parts().items()}  # fmt: skip


def _different(pair: tuple[Statistics, Statistics]) -> list[tuple[int, Statistics]]:
    return list(enumerate(pair))[: 1 if pair[0] is pair[1] else 2]


def blank(model: LoadedModel, question: Question, of: str) -> Moments:
    """Moments of nothing, of the shapes that the answer to ``question`` has."""
    own = of == "moments" and question.how.metric == "concept"
    count = len(question.classes if of == "moments" else frames_of(question.classes))
    seen = new_statistics(model, question.sites, count, covariance=own or of == "keys")
    space = seen if own else new_statistics(model, question.sites)
    return {site: (seen[site], space[site]) for site in question.sites}


def moments_of(shape: Moments, found: Arrays, *, summed: bool) -> Moments:
    """Moments from their sums or parts, where ``shape`` says whose."""
    made: Moments = {}
    for site, pair in shape.items():
        both = []
        for which, stats in _different(pair):
            wanted = stats.sums() if summed else stats.parts()
            own = {part: torch.from_numpy(np.array(found[f"{site}/{which}/{part}"])).to(stats.device)
                   for part in wanted}  # fmt: skip
            both.append((Statistics.from_sums if summed else Statistics.from_parts)(own, stats.meta))
        made[site] = both[0], both[-1]
    return made


def strange(found: Arrays, wanted: Arrays) -> str | None:
    """What is wrong with tensors that should be finite and like ``wanted``; None where nothing is."""
    if found.keys() != wanted.keys():
        return "sent other tensors than it was asked for"
    for name, value in wanted.items():
        if found[name].dtype != value.dtype or found[name].shape != value.shape:
            return f"sent '{name}' as {found[name].dtype} {found[name].shape}, not as {value.dtype} {value.shape}"
        if not np.isfinite(found[name]).all():
            return f"sent NaN or infinite numbers in '{name}'"
    return None


def classes_of(words: Mapping[str, Any]) -> Classes:
    """The classes that a stranger told; ValueError for anything else."""
    pairs = words["classes"]
    if len(pairs) > MOST or not all(len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in pairs):
        raise ValueError(f"at most {MOST} pairs of frame and label are expected")
    return tuple((frame, label) for frame, label in pairs)
