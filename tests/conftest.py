"""Fixtures that every test may use; the builders behind them are in tiny_models.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

torch.set_num_threads(1)  # tiny models: threads only cost
os.environ["REPFORGET_CACHE"] = "none"  # a test that keeps moments names its own folder


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run one command in an empty folder; returns exit code, stdout, stderr."""
    from repforget.cli._guard import guarded

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = guarded(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(params=tiny_models.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the fifteen proven architectures."""
    return str(request.param)


@pytest.fixture
def module(architecture: str) -> Any:
    """A fresh tiny random model of ``architecture``."""
    return tiny_models.build(architecture)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_models.tiny_tokenizer()


@pytest.fixture
def tiny_llama(tokenizer: Any) -> Any:
    """A LoadedModel around a fresh tiny Llama (grouped-query attention, untied), with the tiny tokenizer."""
    from repforget.models.load import wrap

    return wrap(tiny_models.build("llama"), tokenizer, "tiny-llama")


@pytest.fixture
def tiny_gpt2(tokenizer: Any) -> Any:
    """A LoadedModel around a fresh tiny GPT-2 (tied embeddings, learned positions, Conv1D)."""
    from repforget.models.load import wrap

    return wrap(tiny_models.build("gpt2"), tokenizer, "tiny-gpt2")
