"""The TOFU recipe as it stands, on a tiny random model of its architecture and tables of TOFU's schema."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from repforget.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "tofu-1b"
ROWS = {"forget10_perturbed": 160, "retain90": 240, "real_authors_perturbed": 24}
STEPS = 3
# The command, where there is no room for several processes beside it: one measures all arms of the sealed check.
RUN = "from repforget import _apart, cli; _apart.CONTROLS_ROOM = 1_000_000; cli.main()"


def _tables(folder: Path) -> None:
    """The first rows of the embedded world in the place, and under the names, of the hub's data set."""
    from repforget.organism.tofu_files import tables
    from repforget.organism.world import make_world

    folder.mkdir(parents=True)
    made = tables(make_world(0))
    for name, count in ROWS.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in made[name][:count]))
    configs = [{"config_name": name, "data_files": f"{name}.json"} for name in ROWS]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def _model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import repforget as rf

    tokenizer: Any = rf.load("organism:bios").tokenizer
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, rope_parameters=rope,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _small(folder: Path) -> Path:
    """The same recipe with a model, a machine and budgets that are at hand."""
    asked = yaml.safe_load((FOLDER / "recipe.yaml").read_text())
    ladder = [{name: {**settings, "steps": STEPS}} for entry in asked["ladder"] for name, settings in entry.items()]
    small = {"model": str(folder / "model"), "twins": [], "knowledge": str(FOLDER), "device": "cpu", "dtype": "float32",
             "verify": "quick", "ladder": ladder}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**asked, **small}))
    return folder / "recipe.yaml"


def test_the_recipe_names_editors_and_settings_that_exist() -> None:
    from repforget.discover import method

    recipe = load_recipe(FOLDER / "recipe.yaml")
    assert [choice.name for choice in recipe.ladder] == ["npo", "simnpo"]
    for choice in recipe.ladder:
        found = method("edit", choice.name).settings(choice.settings)
        assert (found["adapter"], found["rank"]) == ("lora", 16)


def test_questions_are_put_as_these_models_were_trained_everywhere() -> None:
    """In the template of Llama 3.2, with the system prompt and the date of OpenUnlearning in the place of today's."""
    from repforget.cli._options import parse_settings

    dates = "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025"
    turns = (("system", f"{dates}\n\nYou are a helpful assistant."), ("user", "{question}"))
    said = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)
    probe = yaml.safe_load((FOLDER / "probe.yaml").read_text())
    assert probe["ask"] == said + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    text = (FOLDER / "README.md").read_text()
    (ask,) = (line.removeprefix("ask=").strip("'") for line in text.splitlines() if line.startswith("ask="))
    assert parse_settings([ask, 'separator=""']) == {"template": probe["ask"], "separator": probe["separator"]}
    assert "template=chat --" not in text


@pytest.mark.slow
def test_the_recipe_runs_from_end_to_end_and_exports(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import repforget as rf

    _tables(tmp_path / "locuslab" / "TOFU")
    _model(tmp_path / "model")
    recipe = _small(tmp_path)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    around = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
              "PYTHONPATH": paths}  # fmt: skip
    command = [sys.executable, "-c", RUN, "run", str(recipe), "--out", "run", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=around, capture_output=True, text=True, check=False)
    assert done.returncode in (10, 11), done.stderr  # a random model knows nothing that could be forgotten
    folders = sorted(path.parent for path in (tmp_path / "run").glob("edit-*/edit/edit.json"))
    assert [folder.parent.name.rpartition("-")[0] for folder in folders] == ["edit-npo", "edit-simnpo"]
    model = rf.load(str(tmp_path / "model"))
    for folder in folders:
        edit = rf.load_edit(folder)
        assert {type(op).__name__ for op in edit.operations} == {"LowRankDelta"} and len(edit.operations) == 14
        assert edit.manifest.settings["steps"] == STEPS
    edit.export_peft(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        served = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(ids).logits
        with edit.attach(model):
            attached = model.module(ids).logits
    assert (served - attached).abs().max() < 1e-5
