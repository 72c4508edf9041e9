"""The editors: one method is one file, grouped by family; ``rf.edit(model, knowledge, method)`` runs one by
name.

Families: ``erase`` (concepts out of representations), ``steer`` (vectors added), ``surgery`` (closed-form
weight changes), ``train`` (objectives and fine-tuning), ``arithmetic`` (weights of models combined).
"""

from __future__ import annotations

from repforget._callable import make_callable

make_callable(__name__, "repforget.edit._dispatch:edit")
