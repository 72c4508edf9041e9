"""Key moments in parts: their sum is the whole, found by editors; nothing counts twice, nothing strange is added."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_moments import ROWS, folder, wide  # noqa: F401  (folder is a fixture)

from repforget.edit.surgery._moments import FOLDER, key_moments
from repforget.edit.surgery._parts import merge_parts, row_names, write_part
from repforget.errors import ArtifactError, UsageError
from repforget.stats import Statistics

Cli = Callable[..., tuple[int, str, str]]
TEXTS = [*ROWS, ROWS[0], ROWS[3]]  # two are there twice


def parts_of(place: Path) -> list[Path]:
    folders = [place / f"part-{k}" for k in (1, 2, 3)]
    for k, target in enumerate(folders, 1):
        write_part(wide(), TEXTS, (0, 1), k, 3, target)
    return folders


def test_the_sum_of_the_parts_is_the_whole_and_editors_find_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.setenv(FOLDER, "none")
    model, whole = wide(), key_moments(wide(), TEXTS, [0, 1])
    monkeypatch.setenv(FOLDER, str(folder.parent))
    first, second, third = parts_of(tmp_path)
    found = merge_parts([second, first], tmp_path / "two")
    assert not any(m.kept for m in found) and not folder.exists()
    found = merge_parts([tmp_path / "two", third], tmp_path / "all")
    assert [m.site for m in found] == ["mlp_post.0", "mlp_post.1"]
    assert all(m.kept and m.texts == m.total == len(TEXTS) and m.tokens == whole[0].n for m in found)
    monkeypatch.setattr(type(model.module), "forward", None)  # any forward pass would fail
    again = key_moments(model, TEXTS, [0, 1])
    for layer in (0, 1):
        torch.testing.assert_close(again[layer].second_moment, whole[layer].second_moment, rtol=1e-12, atol=1e-13)
    kept = Statistics.load(tmp_path / "all" / "mlp_post.1.safetensors")
    assert sorted(json.loads(kept.meta["texts"])) == sorted(row_names(TEXTS))


def test_no_text_counts_twice(tmp_path: Path) -> None:
    first, second, third = parts_of(tmp_path)
    for wrong in ([first, first], [first, second, first]):
        with pytest.raises(UsageError, match="would count twice"):
            merge_parts(wrong, tmp_path / "out")
    merge_parts([first, second], tmp_path / "two")
    with pytest.raises(UsageError, match="part-2/.* share .* count twice"):
        merge_parts([tmp_path / "two", third, second], tmp_path / "out")
    half = tmp_path / "half"
    write_part(wide(), TEXTS, (0, 1), 1, 2, half)  # of another division of the same texts
    with pytest.raises(UsageError, match="would count twice"):
        merge_parts([first, second, half], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_something_else_are_refused(tmp_path: Path) -> None:
    first, second, _ = parts_of(tmp_path)
    changed = wide()
    with torch.no_grad():
        changed.module.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    write_part(changed, TEXTS, (0, 1), 2, 3, tmp_path / "weights")
    write_part(wide(), TEXTS[1:], (0, 1), 2, 3, tmp_path / "texts")
    write_part(wide(), TEXTS, (1,), 2, 3, tmp_path / "layers")
    (tmp_path / "empty").mkdir()
    for name, words in (("weights", "another model"), ("texts", "other texts"), ("layers", "same sites"),
                        ("empty", "holds no moments")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            merge_parts([first, tmp_path / name], tmp_path / "out")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for a, b in ((0, 1), (1, 0)):
        (swapped / f"mlp_post.{a}.safetensors").write_bytes((second / f"mlp_post.{b}.safetensors").read_bytes())
    with pytest.raises(UsageError, match="another site"):
        merge_parts([first, swapped], tmp_path / "out")
    data = bytearray((second / "mlp_post.1.safetensors").read_bytes())
    data[-3] ^= 1
    (second / "mlp_post.1.safetensors").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        merge_parts([first, second], tmp_path / "out")
    key_moments(wide(), ROWS, [0])[0].save(second / "mlp_post.1.safetensors")
    with pytest.raises(ArtifactError, match="does not say"):
        merge_parts([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for part, count, words in ((4, 3, "no part 4 of 3"), (0, 3, "no part 0"), (1, 10**9, "holds none")):
        with pytest.raises(UsageError, match=words):
            write_part(wide(), TEXTS, (0,), part, count, tmp_path / "new")
    with pytest.raises(UsageError, match="exists already"):
        write_part(wide(), TEXTS, (0,), 1, 3, first)


def test_commands_feed_an_edit(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(Path("cache").absolute()))
    for k in (1, 2):
        code, out, error = cli("moments", "compute", f"{k}/2", "--layer", "2", "--strangers", "40", "--out", f"p{k}")
        assert code == 0, error
    code, out, error = cli("moments", "merge", "p1", "p2", "--out", "both", "--json")
    assert code == 0, error
    (site,) = json.loads(out)["sites"]
    assert site["site"] == "mlp_post.2" and site["kept"] and site["texts"] == site["total"]
    import repforget as rf
    from repforget.edit.surgery import _moments

    monkeypatch.setattr(_moments, "_computed", lambda *_: {})  # nothing is left to compute
    model, data = rf.load("organism:bios"), rf.knowledge("bios-people").for_editor()
    rows = _moments.protected_texts(model, data, 40, 0)
    assert _moments.key_moments(model, rows, [2])[2].n == site["tokens"]
    code, _, error = cli("moments", "merge", "p1", "p1", "--out", "twice")
    assert code == 2 and "count twice" in error
    code, _, error = cli("moments", "compute", "two", "--out", "p3")
    assert code == 2 and "2/4" in error
