"""The shape of the code: everything imports, files and functions stay small, words and paths that must not occur."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "repforget"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
MAX_FILE, MAX_FUNCTION = 400, 60
BANNED = re.compile(r"\b(removed|deleted|guaranteed|certified)\b", re.IGNORECASE)
VERDICT_FILES = [PACKAGE / "verify" / "verdict.py", PACKAGE / "verify" / "_claims.py", PACKAGE / "cli" / "_output.py",
                 *sorted((PACKAGE / "report").glob("*.py")), *sorted((PACKAGE / "report" / "assets").glob("*"))]
MACHINE_PATH = re.compile(r"(?<![\w.<{])/(work|home|root|Users|mnt|private)/\w+|[A-Z]:\\\\Users")
TEXT_ENDINGS = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".j2", ".css", ".js", ".cfg", ""}


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno is not None}
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_swallowed_exceptions_and_nothing_unfinished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"suppress\((Base)?Exception\)|except:\s|raise NotImplementedError|\b(TODO|FIXME|XXX)\b", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name) and node.type.id == "Exception":
            assert not all(isinstance(entry, ast.Pass | ast.Continue) for entry in node.body), f"line {node.lineno}"


def strings(source: str) -> list[str]:
    """Every text constant of a source file that is no docstring."""
    nodes = list(ast.walk(ast.parse(source)))
    documented = (node for node in nodes if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and node.body)
    docs = {id(node.body[0].value) for node in documented if isinstance(node.body[0], ast.Expr)}
    constants = (node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docs)
    return [node.value for node in constants if isinstance(node.value, str)]


@pytest.mark.parametrize("path", VERDICT_FILES, ids=lambda path: path.name)
def test_verdicts_use_the_fixed_words_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    said = strings(text) if path.suffix == ".py" else [text]
    assert [text for text in said if BANNED.search(text)] == []


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("this copy of the sources is not a git repository")
    return [REPOSITORY / name for name in done.stdout.split("\0") if name]


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    texts = [path for path in tracked() if path.suffix in TEXT_ENDINGS and path.is_file() and path != Path(__file__)]
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert len(texts) > 50 and found == []


def test_the_words_test_would_notice_a_banned_word(tmp_path: Path) -> None:
    assert BANNED.search(strings("\"doc\"\nx = f\"was Removed {1}\"")[0]) and not BANNED.search("unremovedly")
    assert MACHINE_PATH.search("see " + "/home" + "/someone/x") and not MACHINE_PATH.search("docs/work/home")
