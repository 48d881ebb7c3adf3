"""What the documents name is there: files, headings, settings, and tests behind every ``pytest`` expression."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

from fastpref.config import load_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "benchmarks" / "README.md", ROOT / "kernels" / "README.md"]
SELECTION = re.compile(r'`(?:pytest )?((?:kernels/)?tests(?:/[\w/]+)?(?:\.py)?)(?: -k (\w+|"[\w ]+"))?`')


def selections(document: Path) -> list[tuple[str, str]]:
    """(path, expression of -k) of everything in backquotes that names tests."""
    return [(path, words.strip('"')) for path, words in SELECTION.findall(document.read_text())]


@functools.cache
def names(path: Path) -> list[str]:
    if not path.is_file():
        return [name for file in path.rglob("test_*.py") for name in names(file)]
    return [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    for path, words in selections(document):
        assert (ROOT / path).exists(), path
        tests = [name for name in names(ROOT / path) if name.startswith("test_")]
        for word in words.split(" or "):
            assert any(word in name or word in path for name in tests), f"{path} -k {words}: nothing called {word}"


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", document.read_text())
    local = [target.partition("#") for target in targets if "://" not in target]
    assert local or document.name == "CONTRIBUTING.md"
    for path, _, anchor in local:
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


RUN = re.compile(r"^ {4,}(?:.*?(?:-m|--module) )?fastpref(?:\.cli)? (.+)$", re.M)
BATCH = re.compile(r"^ {4,}sbatch (\S+) (.+)$", re.M)


def commands() -> dict[str, list[str]]:
    """Lines of the documents' code blocks that run fastpref on a recipe, and the words behind the command."""
    found = {}
    for document in DOCUMENTS:
        text = document.read_text()
        lines = {line: line for line in RUN.findall(text)}
        for script, given in BATCH.findall(text):
            (line,) = RUN.findall((ROOT / script).read_text())
            lines[f"{script} {given}"] = line.replace('"$recipe"', "").replace('"$@"', given)
        for name, line in lines.items():
            words = line.partition(" #")[0].split()
            if any(word.endswith(".yaml") for word in words[1:]):
                found[f"{document.name}: {name}"] = words
    return found


@pytest.mark.parametrize("line", commands())
def test_every_setting_in_a_command_is_one(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is there and takes them; my.yaml stands for one of SDXL, $VARIABLES for a number."""
    monkeypatch.chdir(ROOT)
    words = [re.sub(r"\$\w+", "7", word) for word in commands()[line]]
    (recipe,) = (ROOT / word.replace("my.yaml", "configs/sdxl_rpo.yaml") for word in words if word.endswith(".yaml"))
    overrides = [word for word in words if re.fullmatch(r"[a-z_0-9]+=\S+", word)]
    config = load_config(recipe, overrides)
    assert all(hasattr(config, word.partition("=")[0]) for word in overrides)


def test_the_readme_is_short_and_its_table_is_what_the_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "common", raising=False)
    import headline

    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert headline.table() in text
