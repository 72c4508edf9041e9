"""Second moments of keys: right, mergeable, kept by content, and never believed when damaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people

from repforget.artifact import AddVector, Edit
from repforget.edit.surgery._moments import FOLDER, cache_folder, key_moments, protected_texts
from repforget.errors import KnowledgeError
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel, wrap
from repforget.records import Site
from repforget.stats import Statistics

ROWS = [tuple(row) for row in tiny_models.sample_ids(40, 9)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path / "moments"


def wide() -> LoadedModel:
    """float64, so that the sizes of batches leave no trace."""
    return wrap(tiny_models.build("llama").double(), tiny_models.tiny_tokenizer(), "wide")


def test_it_is_the_second_moment_of_all_tokens_but_first_ones(folder: Path) -> None:
    model = wide()
    keys = [capture(model, [Site("mlp_post", 1)], Batch.pad([row]), "all")[Site("mlp_post", 1)][0, 1:] for row in ROWS]
    x = torch.cat(keys)
    found = key_moments(model, ROWS, [1])[1]
    assert found.n == len(x)
    torch.testing.assert_close(found.second_moment, x.T @ x / len(x), rtol=1e-12, atol=1e-14)


def test_two_halves_merged_are_the_whole(folder: Path, tmp_path: Path) -> None:
    model = wide()
    whole = key_moments(model, ROWS, [0, 1])
    parts = [key_moments(model, half, [0, 1]) for half in (ROWS[:13], ROWS[13:])]
    for layer in (0, 1):
        for number, part in enumerate(parts):  # as two processes would hand them over
            part[layer].save(tmp_path / f"{layer}-{number}.safetensors")
        first, second = (Statistics.load(tmp_path / f"{layer}-{number}.safetensors") for number in (0, 1))
        both = first.merge(second)
        assert both.n == whole[layer].n
        torch.testing.assert_close(both.second_moment, whole[layer].second_moment, rtol=1e-12, atol=1e-12)


def test_what_is_known_is_not_run_again_and_the_same_to_the_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    first = key_moments(model, ROWS, [0])[0].second_moment
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(type(model.module), "forward", None)  # any forward pass would fail
    assert torch.equal(key_moments(model, ROWS, [0])[0].second_moment, first)


def test_other_weights_text_layer_or_dtype_are_other_moments(folder: Path) -> None:
    model = tiny()
    key_moments(model, ROWS, [0])
    changed = tiny()
    with torch.no_grad():
        changed.module.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0  # its recorded fingerprint is now stale
    key_moments(changed, ROWS, [0])
    key_moments(model, ROWS[1:], [0])
    key_moments(model, ROWS, [1])
    key_moments(dataclasses.replace(model, module=model.module.double()), ROWS, [0])
    assert len(list(folder.iterdir())) == 5


def test_an_attached_edit_has_moments_of_its_own_that_are_not_kept(folder: Path) -> None:
    model = tiny()
    push = Edit.build("push", {}, model, "x", [AddVector(Site("resid_post", 0), torch.ones(model.width), 1.0)])
    plain = key_moments(model, ROWS, [1])[1]
    kept = sorted(path.name for path in folder.iterdir())
    with push.attach(model):
        pushed = key_moments(model, ROWS, [1])[1]
    assert not torch.allclose(pushed.second_moment, plain.second_moment)
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert torch.equal(key_moments(model, ROWS, [1])[1].second_moment, plain.second_moment)


@pytest.mark.parametrize("damage", ["cut", "flip", "swap"])
def test_a_damaged_file_is_refused_and_made_again(folder: Path, damage: str) -> None:
    model = tiny()
    right = key_moments(model, ROWS, [0])[0].second_moment
    (place,) = folder.iterdir()
    data = bytearray(place.read_bytes())
    if damage == "cut":
        place.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-9] ^= 1
        place.write_bytes(data)
    else:
        key_moments(model, ROWS, [1])
        (other,) = set(folder.iterdir()) - {place}
        place.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="refused and computed again"):
        again = key_moments(model, ROWS, [0])[0].second_moment
    assert torch.equal(again, right)
    assert torch.equal(key_moments(model, ROWS, [0])[0].second_moment, right)  # without a warning


def test_none_keeps_nothing_and_the_default_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "none")
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key_moments(tiny(), ROWS, [0])
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv(FOLDER)
    assert cache_folder() == tmp_path / "repforget" / "moments"


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert key_moments(tiny(), ROWS, [0])[0].n > 0


def test_strangers_add_text_and_no_text_is_refused() -> None:
    data, model = people().for_editor(), tiny()
    plain, more = (protected_texts(model, data, count, 0) for count in (0, 40))
    assert more[: len(plain)] == plain
    assert len(more) == len(plain) + 40
    with pytest.raises(KnowledgeError, match="no retained and no general text"):
        protected_texts(model, dataclasses.replace(data, retain=(), general=()), 0, 0)
