"""What the documents name is there: files, and tests behind every ``pytest`` expression."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SELECTION = re.compile(r'`(?:pytest )?((?:kernels/)?tests(?:/[\w/]+)?(?:\.py)?)(?: -k (\w+|"[\w ]+"))?`')


def selections(document: Path) -> list[tuple[str, str]]:
    """(path, expression of -k) of everything in backquotes that names tests."""
    return [(path, words.strip('"')) for path, words in SELECTION.findall(document.read_text())]


def names(path: Path) -> list[str]:
    files = [path] if path.is_file() else path.rglob("test_*.py")
    trees = [ast.parse(file.read_text()) for file in files]
    return [f"{node.name}" for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    for path, words in selections(document):
        assert (ROOT / path).exists(), path
        tests = [name for name in names(ROOT / path) if name.startswith("test_")]
        for word in words.split(" or "):
            assert any(word in name or word in path for name in tests), f"{path} -k {words}: nothing called {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert local and all((document.parent / target).exists() for target in local)
