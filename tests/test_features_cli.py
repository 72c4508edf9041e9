"""``repforget features``: an autoencoder trained, checked where it belongs, refused where it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]


def test_train_then_check(cli: Cli) -> None:
    arguments = ("features", "train", "--site", "mlp_out.2", "--size", "128", "--steps", "40", "--out", "sae", "--json")
    code, out, error = cli(*arguments)
    assert code == 0, error
    made = json.loads(out)
    assert made["site"] == "mlp_out.2" and made["features"] == 128 and 0 < made["unexplained"] < 0.8
    before = {p.name: p.read_bytes() for p in Path("sae").iterdir()}

    code, out, error = cli("features", "check", "sae", "--json")
    found = json.loads(out)["unexplained"]
    assert code == 0 and set(found) == {"mlp_out.1", "mlp_out.2", "mlp_out.3"}
    assert found["mlp_out.2"] < min(found["mlp_out.1"], found["mlp_out.3"])
    code, out, _ = cli("features", "check", "sae")
    assert code == 0 and "128 features fit mlp_out.2" in out

    code, out, error = cli("features", "check", "sae", "--site", "mlp_out.3")
    assert code == 2 and "least variance unexplained at mlp_out.2" in error and not out
    code, _, error = cli("features", "check", "sae", "--site", "mlp_out.0")
    assert code == 2 and "does not fit mlp_out.0" in error

    code, _, error = cli(*arguments)
    assert code == 2 and "never overwritten" in error
    assert {p.name: p.read_bytes() for p in Path("sae").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nothing"], "There is no autoencoder at 'nothing'"),
        (["train", "--site", "mlp_out.9", "--out", "sae"], "has 4 layers"),
        (["train", "--site", "mlp", "--out", "sae"], "'mlp'"),
        (["train", "--out", "sae"], "--site"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(cli: Cli, arguments: list[str], words: str) -> None:
    code, out, error = cli("features", *arguments)
    assert code == 2 and words in error and not out and not Path("sae").exists()
