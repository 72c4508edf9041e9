"""An unembedding trained on records: taking them out ends where training without them ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import contract_tools
import numpy as np
import pytest
import torch

from repforget.artifact import DenseDelta, Untie
from repforget.edit.exact import _unembedding as unembedding
from repforget.edit.exact._features import answer_rows, probe_rows
from repforget.edit.exact.head_removal import head_removal
from repforget.errors import ArtifactError, NoEffectError, SiteError, UsageError
from repforget.guarantee import unearned
from repforget.models.capture import Batch, forward
from repforget.models.load import LoadedModel
from repforget.records import Site
from repforget.training import Record, encoded, records_of

LAM = 1.0


def training(model: LoadedModel) -> unembedding.Tuned:
    seen = contract_tools.tiny_knowledge()
    few = dataclasses.replace(seen, forget=seen.forget[:12], retain=seen.retain[:6])
    return unembedding.train(model, records_of(few, ("forget", "retain"), "statements"), LAM)


def without(tuned: unembedding.Tuned, clusters: set[str]) -> list[Record]:
    return [record for record in tuned.records if record.cluster not in clusters]


def delta(edit: Any) -> np.ndarray:
    return next(op.delta for op in edit.operations if isinstance(op, DenseDelta)).double().numpy()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_taking_records_out_is_training_without_them(architecture: str, tmp_path: Path) -> None:
    model = contract_tools.tiny_model(architecture)
    tuned = training(model)
    folder = unembedding.save(tuned, tmp_path / "tuned")
    name = tuned.records[0].cluster
    edit = head_removal(model, contract_tools.tiny_data(), folder=str(folder), names=[name])
    again = unembedding.train(model, without(tuned, {name}), LAM)
    claim = edit.manifest.guarantee
    assert claim is not None and claim.kind == "exact" and claim.numbers["records taken out"] == 4
    assert np.linalg.norm(delta(edit) - again.change.T) <= 2 * claim.numbers["distance bound"] < 1e-4
    assert np.linalg.norm(tuned.change - again.change) > 100 * claim.numbers["distance bound"]
    assert unearned(" ".join(text for line in claim.lines() for text in line), [claim]) == ()
    assert any(isinstance(op, Untie) for op in edit.operations) == (architecture == "gpt2")


def test_the_model_itself_is_at_the_minimum_of_what_is_left(tmp_path: Path) -> None:
    """The gradient by automatic differentiation through the model's own logits: zero for the records that are left."""
    model = contract_tools.tiny_model("llama")
    tuned = training(model)
    name = tuned.records[0].cluster
    edit = head_removal(model, contract_tools.tiny_data(), folder=str(unembedding.save(tuned, tmp_path)), names=[name])
    start = model.module.get_output_embeddings().weight.detach().clone()
    served = edit.applied_to(model)
    weight = served.module.get_output_embeddings().weight.requires_grad_(True)

    def gradient(records: list[Record]) -> float:
        loss = LAM / 2 * ((weight - start) ** 2).sum()
        for example in encoded(served, records):
            chances = forward(served, Batch.pad([example.tokens]), grad=True)[0].log_softmax(-1)
            for k, counts in enumerate(example.labelled):
                loss = loss - chances[k - 1, example.tokens[k]] if counts else loss
        return float(torch.autograd.grad(loss, weight)[0].norm())

    assert gradient(without(tuned, {name})) < 1e-3
    assert gradient(list(tuned.records)) > 0.1


def test_requests_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = contract_tools.tiny_model("llama")
    data = contract_tools.tiny_data()
    tuned = training(model)
    folder = str(unembedding.save(tuned, tmp_path / "tuned"))
    with pytest.raises(UsageError, match="never trained on"):
        head_removal(model, data, folder=folder, names=["nobody"])
    with pytest.raises(UsageError, match="is not the model whose unembedding was trained"):
        head_removal(contract_tools.tiny_model("gpt2"), data, folder=folder, names=[tuned.records[0].id])
    with pytest.raises(NoEffectError, match="changes nothing"):
        head_removal(model, data, folder=folder, names=[r.id for r in tuned.records])
    with pytest.raises(ArtifactError, match="no training of an unembedding"):
        head_removal(model, data, folder=str(tmp_path / "none"))
    path = tmp_path / "tuned" / unembedding.JSON
    path.write_text(path.read_text().replace(tuned.records[0].prompt, "somebody else"))
    with pytest.raises(ArtifactError, match="damaged"):
        head_removal(model, data, folder=folder, names=[tuned.records[0].id])
    capped = dataclasses.replace(model, module=model.module)
    capped.module.config.final_logit_softcapping = 30.0
    with pytest.raises(SiteError, match="caps its logits"):
        training(capped)


def test_a_training_is_continued_and_no_other_folder_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = contract_tools.tiny_model("llama")
    records = training(model).records
    first = unembedding.train_into(tmp_path / "a", model, records, LAM)
    (tmp_path / "a" / unembedding.JSON).unlink()  # stopped before its last file
    unembedding.train_into(tmp_path / "a", model, records, LAM)
    with pytest.raises(ArtifactError, match="other records, penalty or base"):
        unembedding.train_into(tmp_path / "a", model, records, 2 * LAM)
    with pytest.raises(ArtifactError, match="other records, penalty or base"):
        unembedding.train_into(tmp_path / "a", model, records[1:], LAM)
    monkeypatch.setattr(unembedding, "train", None)
    assert np.array_equal(unembedding.train_into(tmp_path / "a", model, records, LAM).change, first.change)
    for name, content in (("notes.txt", b"mine"), ("rows.npz", b"mine"), ("y", b""), ("rows.old", b"PK\x03\x04")):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        (other / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="is no training of an unembedding"):
            unembedding.train_into(other, model, records, LAM)
        assert (other / name).read_bytes() == content
    np.savez(tmp_path / "rows-npz" / "rows.npz", X=np.ones(3))
    with pytest.raises(ArtifactError, match="is no training of an unembedding"):
        unembedding.save(first, tmp_path / "rows-npz")


def test_features_are_what_the_unembedding_reads() -> None:
    model = contract_tools.tiny_model("llama")
    records = records_of(contract_tools.tiny_knowledge(), ("forget",), "statements")[:5]
    x, tokens = answer_rows(model, records)
    weight = model.module.get_output_embeddings().weight.detach().double().numpy()
    row = 0
    for example in encoded(model, records):
        logits = forward(model, Batch.pad([example.tokens]))[0].double().numpy()
        for k, counts in enumerate(example.labelled):
            if counts:
                assert tokens[row] == example.tokens[k]
                assert np.abs(x[row] @ weight.T - logits[k - 1]).max() < 1e-4
                row += 1
    assert row == len(x)


def test_rows_of_a_probe_have_ids_clusters_and_labels() -> None:
    model, seen = contract_tools.tiny_model("llama"), contract_tools.tiny_knowledge()
    found = probe_rows(model, seen, Site.parse("resid_post.1"), sets=("forget",), label="answer", relation="job")
    items = [item for item in seen.forget if item.relation == "job"]
    assert list(found.ids[:2]) == [f"{items[0].id}#s0", f"{items[0].id}#s1"]
    assert found.clusters[0] == items[0].cluster and found.y[0] == items[0].answer
    assert found.x.shape == (2 * len(items), model.width)
    with pytest.raises(UsageError, match="no relation 'jo'.*did you mean 'job'"):
        probe_rows(model, seen, Site.parse("resid_post.1"), relation="jo")
    with pytest.raises(UsageError, match="did you mean 'retain'"):
        probe_rows(model, seen, Site.parse("resid_post.1"), sets=("retained",))
