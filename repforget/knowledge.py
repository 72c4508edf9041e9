"""A knowledge probe loaded and checked: what must go, what must stay, and how to ask.

An editor sees :meth:`Knowledge.for_editor` (the forget *statements*, part of the retain items); the judge sees
:meth:`Knowledge.view` (question forms the editor never saw, on clusters split once by seed into dev, gate and
sealed). Clusters (a subject, an author, a document) are never split.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from repforget._callable import make_callable
from repforget.errors import KnowledgeError

Split = Literal["dev", "gate", "sealed"]
SPLITS: tuple[Split, ...] = ("dev", "gate", "sealed")
SHARES = {"dev": 0.25, "gate": 0.25, "sealed": 0.5}
MIN_CLUSTERS = 8  # two per split and two halves for relearning
MAX_ALTERNATIVES = 64


@dataclass(frozen=True)
class Item:
    """One thing to know: how the judge asks (``prompt``, ``paraphrases``) and how an editor may see it.

    ``statements`` are prompt prefixes that the answer completes ("Ada Berg was born in"); where none is given
    the editor sees ``prompt`` and the judge asks the paraphrases.
    """

    id: str
    cluster: str
    prompt: str
    answer: str
    subject: str = ""
    relation: str = ""
    statements: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    wrong_answers: tuple[str, ...] = ()
    entity_span: tuple[int, int] | None = None
    separator: str = " "

    def continuation(self, answer: str | None = None) -> str:
        """The answer as the text that follows a prompt."""
        text = self.answer if answer is None else answer
        return text if text[:1].isspace() else self.separator + text

    @property
    def questions(self) -> tuple[str, ...]:
        """Prompts the judge may ask: never one the editor has seen, unless the item offers no other."""
        if self.statements:
            return (self.prompt, *self.paraphrases)
        return self.paraphrases or (self.prompt,)

    @property
    def editor_prompts(self) -> tuple[str, ...]:
        return self.statements or (self.prompt,)

    @property
    def unseen_forms(self) -> bool:
        """True when every judged prompt differs from everything the editor saw."""
        return not set(self.questions) & set(self.editor_prompts)


@dataclass(frozen=True)
class Fact:
    """One statement an editor may see: ``prompt`` is completed by ``answer`` (continuation, separator included)."""

    id: str
    cluster: str
    subject: str
    relation: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class EditData:
    """Everything an editor may see. ``pool``: relation -> continuations seen on *retain* items, with counts."""

    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...]
    general: tuple[str, ...]
    pool: Mapping[str, Mapping[str, int]]
    digest: str


@dataclass(frozen=True)
class View:
    """What the judge asks on one split. ``support`` holds retain items outside the judged ones, on which the
    judge may fit its own classifiers."""

    split: Split
    forget: tuple[Item, ...]
    retain: tuple[Item, ...]
    neighbours: tuple[Item, ...]
    general: tuple[str, ...]
    support: tuple[Item, ...]
    knowledge: Knowledge

    def halves(self, seed: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
        """Split the forget items by cluster into two halves (relearn on one, test on the other)."""
        clusters = _shuffled({item.cluster for item in self.forget}, f"halves-{seed}-{self.split}")
        first = set(clusters[: len(clusters) // 2])
        return (tuple(i for i in self.forget if i.cluster in first),
                tuple(i for i in self.forget if i.cluster not in first))  # fmt: skip

    def shuffled(self, seed: int) -> View:
        """The same view with the forget answers exchanged between clusters, each within its relation.

        Nobody was ever taught these answers: an attack that elicits them elicits anything.  An item for whose relation
        no other answer is known stays as it is.
        """
        groups: dict[str, list[Item]] = {}
        for item in self.forget:
            groups.setdefault(item.relation, []).append(item)
        wrong: dict[str, str] = {}
        for relation, items in sorted(groups.items()):
            order = list(items)
            random.Random(f"exchange-{seed}-{relation}").shuffle(order)
            for place, item in enumerate(order):
                following = (*order[place + 1 :], *order[:place])
                others = (o.answer for o in following if o.answer not in (item.answer, *item.aliases))
                found = next(others, next(iter(self.knowledge.alternatives(item, 1)), None))
                wrong[item.id] = item.answer if found is None else found
        exchanged = tuple(replace(i, answer=wrong[i.id], aliases=(), wrong_answers=_without(i, wrong[i.id]))
                          for i in self.forget)  # fmt: skip
        return replace(self, forget=exchanged)


def _without(item: Item, answer: str) -> tuple[str, ...]:
    """The item's own wrong answers after ``answer`` took the place of the true one, which joins them."""
    if not item.wrong_answers:
        return ()
    return (item.answer, *(a for a in item.wrong_answers if a != answer))


def _shuffled(names: Iterable[str], salt: str) -> list[str]:
    ordered = sorted(names)
    random.Random(salt).shuffle(ordered)
    return ordered


@dataclass(frozen=True)
class Knowledge:
    """A checked knowledge probe. Build with :meth:`build`, or load one with :func:`load_knowledge`."""

    name: str
    forget: tuple[Item, ...]
    retain: tuple[Item, ...]
    neighbours: tuple[Item, ...] = ()
    general: tuple[str, ...] = ()
    seed: int = 0
    notes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def build(
        cls, name: str, forget: Sequence[Item], retain: Sequence[Item], neighbours: Sequence[Item] = (),
        general: Sequence[str] = (), seed: int = 0,
    ) -> Knowledge:  # fmt: skip
        """Check the sets against each other and freeze them; every fault is reported at once."""
        faults = _faults(forget, retain, neighbours)
        if faults:
            raise KnowledgeError(f"Knowledge probe '{name}' cannot be used: " + "; ".join(faults) + ".")
        return cls(name, tuple(forget), tuple(retain), tuple(neighbours), tuple(general), seed)

    @cached_property
    def digest(self) -> str:
        """sha256 over all items, so that nothing computed for other data is ever reused."""
        sets = (self.forget, self.retain, self.neighbours)
        body = [[vars(item) for item in items] for items in sets]
        text = json.dumps([self.name, self.seed, body, self.general], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def pools(self) -> Mapping[str, Counter[str]]:
        """relation -> answers with counts over retain and neighbour items (the prior); where a relation occurs
        only in the forget set, over the forget items."""
        pools: dict[str, Counter[str]] = {}
        for item in (*self.retain, *self.neighbours):
            pools.setdefault(item.relation, Counter())[item.answer] += 1
        known = set(pools)
        for item in self.forget:
            if item.relation not in known:
                pools.setdefault(item.relation, Counter())[item.answer] += 1
        return pools

    def alternatives(self, item: Item, limit: int = MAX_ALTERNATIVES) -> tuple[str, ...]:
        """Wrong answers of the same relation: the item's own, else those of its relation (a fixed sample)."""
        true = {item.answer, *item.aliases}
        if item.wrong_answers:
            return tuple(a for a in dict.fromkeys(item.wrong_answers) if a not in true)[:limit]
        others = {i.answer for i in self.forget if i.relation == item.relation}
        names = (others | set(self.pools.get(item.relation, ()))) - true
        return tuple(sorted(_shuffled(names, f"alternatives-{self.seed}-{item.id}")[:limit]))

    def prior(self, item: Item, limit: int = MAX_ALTERNATIVES) -> float:
        """Probability of the truth for someone who answers by the prior over {truth} + alternatives."""
        options = self.alternatives(item, limit)
        if item.wrong_answers or not options:
            return 1.0 / (1 + len(options))
        pool = self.pools.get(item.relation, Counter[str]())
        weights = [pool[a] + 1.0 for a in options]  # add-one: no answer is impossible
        truth = pool[item.answer] + 1.0
        return truth / (truth + sum(weights))

    def prior_guess(self, item: Item) -> str:
        """The single most common answer of the item's relation: what the best constant guesser says."""
        pool = self.pools.get(item.relation, Counter[str]())
        return min(pool, key=lambda a: (-pool[a], a)) if pool else ""

    @cached_property
    def _forget_split(self) -> Mapping[str, Split]:
        return _assign({i.cluster for i in self.forget}, f"{self.seed}-forget")

    @cached_property
    def _retain_split(self) -> Mapping[str, str]:
        """Half of the retain clusters is the editor's; the other half is judged, split like the forget set."""
        clusters = _shuffled({i.cluster for i in self.retain}, f"{self.seed}-retain")
        half = len(clusters) // 2
        editor: dict[str, str] = dict.fromkeys(clusters[:half], "editor")
        return {**editor, **_assign(clusters[half:], f"{self.seed}-retain-judged")}

    def view(self, split: Split) -> View:
        """The judge's items on one split."""
        neighbours = _assign({i.cluster for i in self.neighbours}, f"{self.seed}-neighbours")
        judged = self.general[len(self.general) // 2 :]
        thirds = {"dev": judged[0::4], "gate": judged[1::4], "sealed": judged[2::4] + judged[3::4]}
        return View(
            split,
            tuple(i for i in self.forget if self._forget_split[i.cluster] == split),
            tuple(i for i in self.retain if self._retain_split[i.cluster] == split),
            tuple(i for i in self.neighbours if neighbours[i.cluster] == split),
            tuple(thirds[split]),
            tuple(i for i in self.retain if self._retain_split[i.cluster] != split),
            self,
        )

    def for_editor(self) -> EditData:
        """What an editor may see: all forget statements, the editor's half of the retain items as statements."""
        retain = [i for i in self.retain if self._retain_split[i.cluster] == "editor"]
        pool: dict[str, Counter[str]] = {}
        for item in retain:
            pool.setdefault(item.relation, Counter())[item.continuation()] += 1
        general = self.general[: len(self.general) // 2]
        return EditData(_facts(self.forget), _facts(retain), tuple(general), pool, self.digest)


def _assign(clusters: Iterable[str], salt: str) -> dict[str, Split]:
    ordered = _shuffled(clusters, salt)
    first = round(len(ordered) * SHARES["dev"])
    second = first + round(len(ordered) * SHARES["gate"])
    return {c: "dev" if k < first else "gate" if k < second else "sealed" for k, c in enumerate(ordered)}


def _facts(items: Iterable[Item]) -> tuple[Fact, ...]:
    return tuple(
        Fact(f"{item.id}#{k}", item.cluster, item.subject, item.relation, prompt, item.continuation())
        for item in items
        for k, prompt in enumerate(item.editor_prompts)
    )


def _faults(forget: Sequence[Item], retain: Sequence[Item], neighbours: Sequence[Item]) -> list[str]:
    faults = [f"the {name} set is empty" for name, items in (("forget", forget), ("retain", retain)) if not items]
    ids = Counter(item.id for item in (*forget, *retain, *neighbours))
    doubled = sorted(i for i, n in ids.items() if n > 1)
    if doubled:
        faults.append(f"{len(doubled)} ids occur more than once, first '{doubled[0]}'")
    blank = [item.id for item in (*forget, *retain, *neighbours) if not item.answer.strip() or not item.prompt.strip()]
    if blank:
        faults.append(f"{len(blank)} items have an empty prompt or answer, first '{blank[0]}'")
    asked = {(item.prompt, item.answer): item.id for item in forget}
    both = [item.id for item in (*retain, *neighbours) if (item.prompt, item.answer) in asked]
    if both:
        faults.append(f"{len(both)} items are both to forget and to keep, first '{both[0]}'")
    clusters = {item.cluster for item in forget}
    if forget and len(clusters) < MIN_CLUSTERS:
        faults.append(f"the forget set has {len(clusters)} clusters and needs at least {MIN_CLUSTERS} to be split "
                      "into dev, gate and sealed; give each subject its own 'cluster'")  # fmt: skip
    return faults


make_callable(__name__, "repforget.knowledge_files:load_knowledge")  # rf.knowledge("bios-people")
