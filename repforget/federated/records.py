"""What travels between a client and the server of a federated training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from repforget.errors import UsageError

Rule = Literal["fedavg", "fedsgd", "fedadam"]
RULES: tuple[str, ...] = get_args(Rule)
LEFT, RIGHT = ".left", ".right"  # the two factors of an adapter: "<weight>.left" [out, r], "<weight>.right" [r, in]


@dataclass(frozen=True, eq=False)
class Update:
    """The change that ``client`` asks for: its weights after local training minus the global ones before.

    ``records`` is the number of records it trained on, its weight in the average.  ``tensors`` (float32 or float64)
    are named like parameters and shaped like them; an adapter's change of a weight [out, in] is the pair
    ``<weight>.left`` [out, r] and ``<weight>.right`` [r, in], whose product it is.
    """

    client: str
    records: int
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if self.records < 1:
            raise UsageError(f"The update of client '{self.client}' stands for {self.records} records: a client "
                             "without records has nothing to send.")  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, as they travel."""
        return sum(int(t.nbytes) for t in self.tensors.values())
