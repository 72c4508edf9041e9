"""Edits inside the null space of kept keys: what lies outside is written as before, and too many facts are refused."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rome import QUICK, believed
from torch import Tensor

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.surgery._closed_form import null_space, projected
from repforget.edit.surgery._moments import protected_texts
from repforget.errors import NumericalError, UsageError
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.models.weights import find, get_weight
from repforget.records import Site


def low_rank(rank: int, m: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys that fill ``rank`` of ``m`` directions, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rank, m, generator=generator, dtype=torch.float64)
    kept = torch.randn(80, rank, generator=generator, dtype=torch.float64) @ mixed
    return kept, kept.T @ kept / len(kept)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_kept_keys_are_written_as_before_and_facts_are_met(seed: int, n: int) -> None:
    kept, moment = low_rank(9, seed=seed)
    basis = null_space(moment, 1e-9)
    assert basis.shape == (16, 7)
    generator = torch.Generator().manual_seed(seed + 1)
    keys, residuals = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (16, 5))
    delta = projected(keys, residuals, basis, 0.0)
    scale = float((delta.left @ delta.right).norm())
    assert float(delta.written(kept).abs().max()) < 1e-9 * scale
    torch.testing.assert_close(delta.written(keys), residuals, rtol=1e-6, atol=1e-6)


def test_it_is_the_smallest_such_step_and_ridge_makes_it_smaller() -> None:
    _, moment = low_rank(9)
    basis = null_space(moment, 1e-9)
    generator = torch.Generator().manual_seed(1)
    keys, residuals = (torch.randn(3, width, generator=generator, dtype=torch.float64) for width in (16, 5))
    found = projected(keys, residuals, basis, 0.0)
    expected = residuals.T @ torch.linalg.pinv(keys @ basis).T @ basis.T
    torch.testing.assert_close(found.left @ found.right, expected, rtol=1e-8, atol=1e-8)
    sizes = [float((d.left @ d.right).norm()) for d in (projected(keys, residuals, basis, r) for r in (0.0, 0.1, 9.0))]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]


def test_threshold_is_relative_to_the_mean_eigenvalue() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.9, 0.05, 0.05], dtype=torch.float64)  # mean 8/6
    spin = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    for scale in (1.0, 1e-6):
        for threshold, room in ((0.01, 0), (0.04, 2), (0.7, 3)):
            assert null_space(scale * spin @ values.diag() @ spin.T, threshold).shape[1] == room


def test_facts_that_are_one_key_cannot_be_told_apart() -> None:
    _, moment = low_rank(9)
    keys = torch.ones(2, 16, dtype=torch.float64)
    with pytest.raises(NumericalError, match="singular"):
        projected(keys, torch.eye(2, 5).double(), null_space(moment, 1e-9), 0.0)


@pytest.mark.parametrize("architecture", [a for a in tiny_models.ALL if a != "mixtral"])
def test_protected_text_is_written_as_before(architecture: str) -> None:
    """A handful of sentences fills few directions: all their keys are written as before, to rounding."""
    model = tiny(architecture)
    data = believed(model, 2)
    few = dataclasses.replace(data, retain=data.retain[:2], general=())
    chosen = {**QUICK, "layers": [0], "threshold": 1e-5, "strangers": 0}
    if site_map(model.module).parallel:  # its first MLP sees one token alone, and the last one is in kept text too
        with pytest.raises(NumericalError, match="lies inside the null space"):
            run_editor(model, few, "alphaedit", **chosen)
        return
    edit = run_editor(model, few, "alphaedit", **chosen)
    rows = protected_texts(model, few, 0, 0)
    keys = capture(model, [Site("mlp_post", 0)], Batch.pad(rows), "tokens")[Site("mlp_post", 0)].double()
    ref = find(model, "mlp_out", 0)
    copy = tiny(architecture)
    edit.fold(copy)
    change = get_weight(copy, ref).double() - get_weight(model, ref).double()
    asked = [fact.prompt for fact in few.forget]
    batch = Batch.pad([model.tokenizer(prompt)["input_ids"] for prompt in asked])
    own = capture(model, [Site("mlp_post", 0)], batch)[Site("mlp_post", 0)].double()
    assert float((keys @ change.T).norm(dim=1).max()) < 1e-2 * float((own @ change.T).norm(dim=1).min())
    assert "null directions of" in edit.manifest.notes[-1]


def test_more_facts_than_fit_are_refused_with_the_number_that_fits() -> None:
    model, data = tiny(), people().for_editor()
    few = dataclasses.replace(data, retain=data.retain[:6], general=())
    with pytest.raises(NumericalError, match=r"at most \d+ of the 96 values fit") as caught:
        run_editor(model, few, "alphaedit", layers=[0], unit="prompt", **{**QUICK, "strangers": 0})
    room = int(str(caught.value).split("at most ")[1].split()[0])
    assert 0 < room < 48
    fitting = dataclasses.replace(few, forget=few.forget[:room])
    run_editor(model, fitting, "alphaedit", layers=[0], unit="prompt", **{**QUICK, "strangers": 0})
    over = dataclasses.replace(few, forget=few.forget[: room + 1])
    with pytest.raises(NumericalError, match=f"at most {room} of the {room + 1}"):
        run_editor(model, over, "alphaedit", layers=[0], unit="prompt", **{**QUICK, "strangers": 0})


def _full(model: LoadedModel) -> None:
    run_editor(model, people().for_editor(), "alphaedit", layers=[0], threshold=1e-9, **QUICK)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(NumericalError, match="no fact fits"):
        _full(tiny())
    with pytest.raises(UsageError, match="between 0 and 1"):
        run_editor(tiny(), people().for_editor(), "alphaedit", threshold=0.0)
