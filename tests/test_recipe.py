"""Recipes: what is accepted, every fault at once with its line, schema and digest."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repforget import discover
from repforget.checked_yaml import read_document
from repforget.errors import RecipeError
from repforget.recipe import Choice, Recipe, build_recipe, load_recipe, recipe_schema

REPOSITORY = Path(__file__).parents[1]
METHOD = """
from __future__ import annotations
from typing import Literal

def {name}(model, knowledge, *, seed: int = 0, rank: int = 2, ridge: float = 0.1,
           layers: list[int] | Literal["auto"] = "auto"):
    "A method for tests."
"""


@pytest.fixture(autouse=True)
def rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    """One known method per room, so that these tests need neither torch nor the real rooms."""
    names = {"locate": "probe_sweep", "edit": "leace", "verify": "relearn"}
    monkeypatch.setattr(discover, "names", lambda room: (names[room],))

    def method(room: str, name: str) -> discover.Method:
        scope: dict[str, object] = {"__name__": "stub"}
        exec(METHOD.format(name=name), scope)
        return discover.Method(name, room, room, scope[name])  # type: ignore[arg-type]

    monkeypatch.setattr(discover, "method", method)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    return write


GOOD = """
model: organism:bios
knowledge: bios-people
twins: [organism:bios/twin-0]
locate: probe_sweep
ladder:
  - leace
  - leace: {rank: 3, ridge: 1e-4, layers: [1, 2]}
verify:
  - relearn: {rank: 50}
limits: {utility_drop: 0.03, minutes: 5, memory: 8}
margin: 0.1
seed: 4
"""


def test_a_recipe_is_read_with_names_settings_and_defaults(recipe: Callable[[str], Path]) -> None:
    read = load_recipe(recipe(GOOD))
    assert read.locate == (Choice(name="probe_sweep"),)
    assert read.ladder[1] == Choice(name="leace", settings={"rank": 3, "ridge": 1e-4, "layers": [1, 2]})
    assert read.verify == (Choice(name="relearn", settings={"rank": 50}),)
    assert (read.limits.memory, read.margin, read.seed, read.device, read.dtype) == (8, 0.1, 4, "auto", "auto")


def test_numbers_in_exponent_form_are_numbers(recipe: Callable[[str], Path]) -> None:
    for text, value in {"1e-4": 1e-4, "5E3": 5e3, "-2.5e-07": -2.5e-7, "1e+2": 100.0}.items():
        assert read_document(recipe(f"x: {text}")).value == {"x": value}


def test_every_fault_is_listed_with_its_line_and_the_nearest_name(recipe: Callable[[str], Path]) -> None:
    faulty = """
        modle: organism:bios
        knowledge: bios-people
        locate: [probe_swep]
        ladder:
          - leace: {rnk: 3, ridge: much}
          - {a: 1, b: 2}
        verify: standrd
        limits: {utility_drop: 3, minute: 1}
        seed: -1
        device: tpu
        """
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(faulty))
    text = str(caught.value)
    for words in (
        "11 faults", "line 1: modle: unknown key; did you mean 'model'?", "line 1: model: this key is required",
        "line 3: locate[0]: there is no method 'probe_swep' in locate; did you mean 'probe_sweep'?",
        "line 5: ladder[0].leace.rnk: method 'leace' has no such setting; did you mean 'rank'?",
        "line 5: ladder[0].leace.ridge: input should be a valid number", "line 6: ladder[1]: write a method as",
        "line 7: verify: 'standrd' is no level; did you mean 'standard'?",
        "line 8: limits.utility_drop: input should be less than 1", "line 8: limits.minute: unknown key",
        "line 9: seed: ", "line 10: device: ",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [1, 2\nknowledge: x", r"not valid YAML: line \d, column \d"),
        ("- a\n- b", "holds a list"),
        ("", "holds nothing"),
        ("model: a\nmodel: b", "line 2, column 1: the key 'model' was already given on line 1"),
        ("model: &a x\nknowledge: *a", "line 2, column 12: anchors and aliases are not read"),
        ("model: !!python/object/apply:os.system [ls]\nknowledge: x", "not valid YAML"),
        ("model: a\nknowledge: b\nladder: []", "line 3: ladder: .*at least 1"),
        ("model: a\nknowledge: b\nverify: []", "line 3: verify: the list of verifiers is empty"),
        ("model: a\nknowledge: b\nladder: [{leace: 3}]", "settings of 'leace' must be"),
    ],
)
def test_a_malformed_file_is_one_sentence(recipe: Callable[[str], Path], text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(recipe(text))
    assert caught.value.exit_code == 2


def test_missing_folder_and_binary_files_are_sentences(tmp_path: Path, recipe: Callable[[str], Path]) -> None:
    recipe(GOOD)
    with pytest.raises(RecipeError, match=r"There is no recipe .*recipy\.yaml' \(did you mean 'recipe\.yaml'\?\)"):
        load_recipe(tmp_path / "recipy.yaml")
    with pytest.raises(RecipeError, match="is a folder, not a recipe"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(tmp_path / "binary.yaml")


def test_canonical_form_reads_back_and_has_the_same_digest(recipe: Callable[[str], Path]) -> None:
    read = load_recipe(recipe(GOOD))
    again = build_recipe(read.canonical())
    assert again == read and again.digest == read.digest
    assert read.changed(seed=5).digest != read.digest and read.changed(seed=None) is read


@given(st.permutations(["model: a", "knowledge: b", "margin: 0.2", "seed: 3"]))
def test_digest_does_not_depend_on_the_order_of_keys(lines: list[str]) -> None:
    data = dict(line.split(": ") for line in lines)
    assert build_recipe({**data, "locate": [], "ladder": ["leace"]}).digest == build_recipe(
        {"model": "a", "knowledge": "b", "margin": 0.2, "seed": 3, "locate": [], "ladder": ["leace"]}
    ).digest


def test_flags_alone_make_a_recipe_and_the_organism_brings_its_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "names", lambda room: ("probe_sweep", "attribution_patching", "leace"))
    short = {"ladder": ["leace"]}
    assert Recipe.default(**short).twins == ("organism:bios/twin-0", "organism:bios/twin-1")
    assert Recipe.default(model="some/model", **short).twins == ()
    assert Recipe.default(model="organism:bios/twin-0", **short).twins == ()
    with pytest.raises(RecipeError, match="The recipe is wrong: device: "):
        Recipe.default(device="toaster", **short)


def test_schema_describes_what_the_file_may_say() -> None:
    schema = recipe_schema()
    assert set(schema["required"]) == {"model", "knowledge"} and schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert "leace" in schema["properties"]["ladder"]["default"]


def test_the_quickstart_recipe_is_well_formed() -> None:
    data = read_document(REPOSITORY / "experiments" / "quickstart" / "recipe.yaml").value
    assert set(data) <= set(Recipe.model_fields)
