"""A merge of clients' updates from which any is taken off again bit for bit: integers are added, not floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from repforget.errors import NumericalError, UsageError
from repforget.federated.aggregate import dense
from repforget.federated.records import Update

LIMIT = 2.0**62


@dataclass(frozen=True, eq=False)
class ExactSum:
    """``sum_k n_k round(delta_k 2^bits)`` in int64, with the number of records and the names of who is in it.

    Where every client trained by itself from one base (a merge in a single round, as in SIFT-Masks, arXiv 2504.04626),
    no other update knows of the one that leaves, and :meth:`minus` gives exactly the merge that never had it; floats
    do not, for their sums round.  After several rounds the other updates do know of it, and this says nothing.
    Adapters are multiplied out.  ``bits``: binary places; an update is off by at most 2^-(bits + 1) per entry.
    """

    bits: int = 40
    records: int = 0
    clients: frozenset[str] = frozenset()
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def plus(self, update: Update) -> ExactSum:
        """The sum with ``update``; UsageError for a client that is in it already or sends other tensors."""
        if update.client in self.clients:
            raise UsageError(f"Client '{update.client}' is in the sum already: take it off first.")
        return self._with(update, 1, self.clients | {update.client})

    def minus(self, update: Update) -> ExactSum:
        """The sum without ``update``, which must be what was added; UsageError for a client that is not in it."""
        if update.client not in self.clients:
            raise UsageError(f"Client '{update.client}' is not in the sum, so there is nothing to take off.")
        return self._with(update, -1, self.clients - {update.client})

    def mean(self) -> dict[str, np.ndarray]:
        """The mean change weighted by records, float64."""
        if not self.records:
            raise UsageError("The sum holds no client: there is no mean of nothing.")
        return {name: np.ldexp(total / self.records, -self.bits) for name, total in self.tensors.items()}

    def _with(self, update: Update, sign: int, clients: frozenset[str]) -> ExactSum:
        new = dense(update.tensors)
        if self.tensors and {n: t.shape for n, t in new.items()} != {n: t.shape for n, t in self.tensors.items()}:
            raise UsageError(f"Client '{update.client}' sent other tensors than the sum holds: merge the same weights.")
        found = {}
        for name, delta in new.items():
            whole = np.rint(np.ldexp(delta, self.bits)) * update.records
            before = self.tensors.get(name, np.zeros(delta.shape, np.int64))
            room = np.abs(whole) + (np.abs(before) if sign > 0 else 0)  # what was added can always be taken off
            if not np.isfinite(whole).all() or room.max(initial=0) >= LIMIT:
                raise NumericalError(f"The update of client '{update.client}' to '{name}' is too large, or not finite, "
                                     f"for {self.bits} binary places: give fewer.")  # fmt: skip
            found[name] = before + sign * np.rint(np.ldexp(delta, self.bits)).astype(np.int64) * update.records
        return ExactSum(self.bits, self.records + sign * update.records, clients, found if clients else {})
