"""Two cheap numbers watched while training: how probable forget answers still are, and what retained ones cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repforget.edit.train._data import Row
from repforget.edit.train._pareto import front, lines
from repforget.edit.train._pass import LABELS, Request, Term, read
from repforget.edit.train._processes import Processes
from repforget.edit.train._settings import Settings
from repforget.models.load import LoadedModel

ROWS = 64  # rows per side


@dataclass(frozen=True)
class Look:
    """What was seen after ``step`` steps: mean over forget answers of the (geometric) mean probability of their tokens,
    and the retain loss (nats per token)."""

    step: int
    forget: float
    retain: float


@dataclass
class Watch:
    """Looks at fixed rows of both sides, remembers the last good state, and says when to stop and why."""

    model: LoadedModel
    terms: Sequence[Term]
    shared: Settings
    parameters: Sequence[Tensor]
    originals: Sequence[Tensor]  # what the parameters are at the first look
    kept: Sequence[Row] = ()  # retained facts, looked at whether or not a term keeps them
    looks: list[Look] = field(default_factory=list)
    good: list[Tensor] = field(default_factory=list)
    stopped: str = ""
    processes: Processes = Processes()
    enough: Callable[[], str] = str  # why to stop, if anything

    @torch.no_grad()
    def look(self, step: int) -> bool:
        """Look after ``step`` steps; True where training should go on."""
        forgotten = [row for t in self.terms if t.side == t.objective.role == "forget" for row in t.data.own]
        rows = {"forget": _spread(forgotten), "retain": _spread(self.kept)}
        # Probabilities are averaged, not their logarithms: one answer that is lost would stand for all of them.
        means = [float(self._means(rows["forget"]).exp().mean()), float(self._means(rows["retain"]).mean())] \
            if self.processes.rank == 0 or self.processes.sharded else [0.0, 0.0]  # fmt: skip
        forget, retain = self.processes.first(means)  # so that all processes go on, or none
        now = Look(step, forget if rows["forget"] else math.nan, -retain)
        first = self.looks[0] if self.looks else now
        self.looks.append(now)
        rise = now.retain - first.retain if rows["retain"] else 0.0
        if not math.isfinite(forget) or not rise <= self.shared.max_retain_rise:
            kept = self.looks[-2].step if len(self.looks) > 1 else 0
            why = (f"the retain loss rose from {first.retain:.3g} to {now.retain:.3g} nats per token" if rows["retain"]
                   else f"the mean probability of forget answers became {forget}")  # fmt: skip
            self.stopped = f"diverged by step {step}: {why}; the state of step {kept} is kept"
            self.restore()
            return False
        self._keep()
        if step and now.forget <= self.shared.stop_probability:
            self.stopped = (f"stopped after step {step}: the mean probability of forget answers is {now.forget:.3g}, "
                            f"at most {self.shared.stop_probability:g}")  # fmt: skip
            return False
        said = self.enough() if step else ""
        if said:
            self.stopped = f"stopped after step {step}: {said}"
        return not said

    def _keep(self) -> None:
        """Remember the state; the first one needs no copy."""
        if not self.good:
            self.good = list(self.originals)
        elif self.good[0] is self.originals[0]:
            self.good = [p.detach().to("cpu", copy=True) for p in self.parameters]
        else:
            for state, parameter in zip(self.good, self.parameters, strict=True):
                state.copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the last good state back."""
        for parameter, state in zip(self.parameters, self.good, strict=True):
            parameter.copy_(state)

    def _means(self, rows: Sequence[Row]) -> Tensor:
        """Mean log-probability per answer token of each row (one 0 where there are none)."""
        if not rows:
            return torch.zeros(1)
        (found,) = read(self.model, [Request(tuple(rows), frozenset({LABELS}))])
        assert found.scores is not None  # the request asked for them
        return found.scores.means.double()

    @property
    def notes(self) -> tuple[str, ...]:
        kept = self.looks[:-1] if self.stopped.startswith("diverged") else self.looks
        first, last = kept[0], kept[-1]
        gone = f"mean probability of forget answers {first.forget:.3g} -> {last.forget:.3g}, "
        watched = f"retain loss {first.retain:.3g} -> {last.retain:.3g} nats per token" if self.kept else \
            "no retained facts to watch: what it costs was not seen"  # fmt: skip
        said = f"training rows: {'' if math.isnan(first.forget) else gone}{watched}"
        between = [look for look in front(kept) if self.kept and look.step not in (first.step, last.step)]
        passed = f"trade-offs on the way that neither end beats: {'; '.join(lines(between))}"
        return (said, *((passed,) if between else ()), *((self.stopped,) if self.stopped else ()))


def _spread(rows: Sequence[Row]) -> list[Row]:
    """At most :data:`ROWS` rows, evenly over the whole."""
    step = max(1, math.ceil(len(rows) / ROWS))
    return list(rows[::step])
