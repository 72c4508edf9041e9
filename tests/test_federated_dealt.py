"""People dealt to clients, and an edit from the sums of their moments."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import edit_models
import pytest
import torch
from test_federated_moments import distance

from repforget.artifact import Edit
from repforget.edit.erase.leace import leace as leace_of_one
from repforget.errors import UsageError
from repforget.federated.dealt import dealt, fleet_of
from repforget.federated.together import Sums, edit_of_fleet
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return edit_models.double()


@pytest.fixture(scope="module")
def data() -> EditData:
    return edit_models.people().for_editor()


def from_moments(model: LoadedModel, data: EditData, method: Any, clients: int, **more: Any) -> Edit:
    return edit_of_fleet(fleet_of(model, data, clients), model, method, clients, **more)[0]


@pytest.mark.parametrize("clients", [1, 3, 5])
def test_every_fact_is_with_one_client_and_nobody_is_split(data: EditData, clients: int) -> None:
    parts = dealt(data, clients)
    for name in ("forget", "retain", "general"):
        held = Counter(row for part in parts.values() for row in getattr(part, name))
        assert held == Counter(getattr(data, name))
    people = [{f.cluster for f in (*p.forget, *p.retain)} for p in parts.values()]
    assert sum(map(len, people)) == len(set().union(*people)) and max(map(len, people)) - min(map(len, people)) <= 1
    assert len(parts) == clients and dealt(data, clients, seed=1).keys() == parts.keys()


@pytest.mark.parametrize("sums", [Sums(1e6, 1), Sums(None, 1)], ids=["secure", "clear"])
def test_the_edit_is_that_of_all_data_and_the_bytes_do_not_depend_on_who_holds_what(
    model: LoadedModel, data: EditData, sums: Sums
) -> None:  # fmt: skip
    found = {n: from_moments(model, data, "leace", n, sums=sums) for n in (3, 4)}
    central = leace_of_one(model, data)
    assert all(distance(edit, central) < 1e-6 for edit in found.values())
    sent = {re.search(r"each sent (\d+) bytes", " ".join(edit.manifest.notes))[1] for edit in found.values()}  # type: ignore[index]
    assert len(sent) == 1 and {e.manifest.settings["clients"] for e in found.values()} == {3, 4}
    layer = from_moments(model, data, "null_space", 3, layers=[0], sums=sums)
    assert len(layer.operations) == 1 and torch.isfinite(layer.operations[0].u).all()
    assert "3 clients; each sent" in layer.manifest.notes[-1]


def test_what_cannot_be_summed_or_made_is_refused(model: LoadedModel, data: EditData) -> None:
    for clients, given, said in ((2, {}, "at least 3 different clients"), (9999, {}, "cannot share"),
                                 (3, {"layers": [0]}, "leave the layers out")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            from_moments(model, data, "leace", clients, **given)
    with pytest.raises(UsageError, match="give --layers"):
        from_moments(model, data, "null_space", 3)
    with pytest.raises(UsageError, match="mean of .* points"):
        from_moments(model, data, "leace", 3, sums=Sums(None, 10**6))
