"""Adapter: option log-probabilities as EleutherAI's lm-evaluation-harness computes them, for comparable numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from repforget.bench._choices import Scores
from repforget.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

Rows = Sequence[Mapping[str, Any]]


def harness_scores(
    model: LoadedModel, tasks: Mapping[str, Mapping[str, Rows]], *, shots: int, batch_size: int = 8
) -> dict[str, Scores]:
    """Log-probabilities [n][K] per harness task, scored on our rows: task name -> split name -> rows.

    The prompts, the worked examples and the scoring are the harness's own (0.4.13 or later 0.4); the rows are handed
    over, so nothing is downloaded.  Its samples hold the texts: only the numbers leave this function.
    """
    try:
        import datasets

        harness = import_module("lm_eval")
        wrapper = import_module("lm_eval.models.huggingface")
    except ImportError:
        raise MissingExtraError("engine='lm-eval' needs the package lm-eval: pip install 'repforget[eval]', or use "
                                "engine='own'.") from None  # fmt: skip

    def table(splits: Mapping[str, Rows]) -> dict[str, Any]:
        return {name: datasets.Dataset.from_list([dict(row) for row in rows]) for name, rows in splits.items()}

    # A task inside a group is the registered one with these overrides; a bare dict would replace it.
    entries = [{"task": name, "custom_dataset": lambda splits=splits, **_: table(splits)}
               for name, splits in tasks.items()]  # fmt: skip
    lm = wrapper.HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=batch_size)
    found = harness.simple_evaluate(model=lm, tasks=[{"group": "repforget", "task": entries}], num_fewshot=shots,
                                    log_samples=True, bootstrap_iters=0, random_seed=None,
                                    numpy_random_seed=None, torch_random_seed=None)  # fmt: skip
    samples = {} if found is None else found["samples"]
    out: dict[str, Scores] = {}
    for name, splits in tasks.items():
        key = next((k for k in samples if k == name or k.endswith(f"::{name}")), None)
        mine = sorted(samples.get(key, ()), key=lambda sample: sample["doc_id"])
        if len(mine) != len(splits["test"]):
            raise UsageError(f"lm-eval returned {len(mine)} of the {len(splits['test'])} questions of '{name}': its "
                             "version may not be supported, so use engine='own'.")  # fmt: skip
        out[name] = [np.array([float(logprob) for logprob, _ in sample["filtered_resps"]]) for sample in mine]
    return out
