"""The benchmarks: one file is one benchmark; ``rf.bench(model, "tofu")`` runs one by name.

A benchmark scores one model on published rows (from the hub, or a folder of the same files) and returns per-item
values first, aggregates with limits second.
"""

from __future__ import annotations

from repforget._callable import make_callable

make_callable(__name__, "repforget.bench._run:bench")
