"""EK-FAC scores against those of the library kronfluence, where it is installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.influence import curvature, scores
from repforget.models.load import LoadedModel
from repforget.training import Example

WIDE = torch.float64


class Deep(nn.Module):
    """Two linear maps with a bend between them, on what a token stands for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(torch.randn(7, 4, generator=generator, dtype=WIDE))
        self.low, self.high = (nn.Linear(*sizes, bias=False, dtype=WIDE) for sizes in ((4, 5), (5, 7)))
        for part in (self.low, self.high):
            part.weight = nn.Parameter(torch.randn(part.weight.shape, generator=generator, dtype=WIDE))
        self.dtype, self.config = WIDE, SimpleNamespace(max_position_embeddings=8)

    def get_input_embeddings(self) -> Any:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.high(torch.tanh(self.low(self.table(input_ids)))))


@pytest.fixture
def kronfluence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    try:
        import einconv  # noqa: F401
    except ImportError:  # it is needed for convolutions alone
        package = types.ModuleType("einconv")
        utils = types.ModuleType("einconv.utils")
        utils.get_conv_paddings = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "einconv", package)
        monkeypatch.setitem(sys.modules, "einconv.utils", utils)
    yield pytest.importorskip("kronfluence", exc_type=ImportError)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # what it set up is not for the tests that follow


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_kronfluence(kronfluence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on the empirical Fisher, so that no label is drawn: the library draws by another generator."""
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    pairs = [(a, (3 * a + b) % 7) for a in range(7) for b in range(3)]

    class NextToken(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return functional.cross_entropy(model(batch[0][:, None]).logits[:, 0], batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    module, names = Deep(), ("low.weight", "high.weight")
    columns = [torch.tensor(column) for column in zip(*pairs, strict=True)]
    data = torch.utils.data.TensorDataset(*columns)
    prepared = kronfluence.prepare_model(Deep(), NextToken())
    analyzer = kronfluence.Analyzer("oracle", prepared, NextToken(), cpu=True, output_dir=str(tmp_path),
                                    disable_tqdm=True, log_level=40)  # fmt: skip
    wide = {f"{name}_dtype": WIDE for name in ("activation_covariance", "gradient_covariance", "per_sample_gradient",
                                               "lambda")}  # fmt: skip
    analyzer.fit_all_factors("f", data, per_device_batch_size=4,
                             factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True, **wide))
    analyzer.compute_pairwise_scores(
        "s", "f", query_dataset=data, train_dataset=data, per_device_query_batch_size=4, per_device_train_batch_size=4,
        score_args=ScoreArguments(damping_factor=None, per_sample_gradient_dtype=WIDE, precondition_dtype=WIDE,
                                  score_dtype=WIDE))  # fmt: skip
    theirs = analyzer.load_pairwise_scores("s")["all_modules"].double().numpy()

    examples = [Example(pair, (False, True)) for pair in pairs]
    labels = torch.tensor([example.tokens[1] for example in examples])
    monkeypatch.setattr("repforget.influence.ekfac.uniform", lambda rows, seed: labels)
    monkeypatch.setattr("repforget.influence.passes.drawn_labels", lambda logits, numbers: numbers)
    model = LoadedModel("deep", module.eval(), SimpleNamespace(pad_token_id=0, eos_token_id=0), "-")
    ours = scores(model, examples, examples, names, curvature(model, examples, names), damping=0.1) * len(examples)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(theirs).max() > 0
