"""Fixtures that every test may use; the builders behind them are in tiny_models.py."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import typer.main

torch.set_num_threads(1)  # tiny models: threads only cost
gc.disable()  # until everything is imported and collected, which drops next to nothing
typer.main.get_command = cache(typer.main.get_command)  # forty commands take 0.05 s to put together, each time
os.environ["REPFORGET_CACHE"] = "none"  # a test that keeps moments names its own folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then the largest: no worker is left with a long file while the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    size = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -size[item.path]))


def pytest_collection_finish() -> None:
    gc.freeze()  # a million objects that live as long as the process: no collection walks over them again
    gc.enable()


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
