"""A checkout of somebody else's code, parts of which run here exactly as they stand there.

Training scripts keep their loss in the middle of a long ``main``. It is cut out of the parsed file, between two
assignments, and run with tensors of ours under the names it uses. Nothing of it is copied into this repository.
"""

from __future__ import annotations

import ast
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from fastpref.errors import UserError


@dataclass(frozen=True)
class Checkout:
    """A working tree of a public repository."""

    folder: Path

    @property
    def commit(self) -> str:
        """The commit that is checked out, ten digits."""
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=self.folder, capture_output=True, text=True)
        return found.stdout.strip()[:10] or "unknown"

    def statements(self, path: str, first: str, *last: str) -> CodeType:
        """The consecutive statements of one block, from the one that assigns ``first`` to the last that assigns, itself
        or in its branches, one of ``last``.

        Raises:
            UserError: the file has no such block, so it is not the code that this comparison was written for.
        """
        for block in _blocks(self._tree(path)):
            begins = [
                at for at, found in enumerate(block) if isinstance(found, ast.Assign) and first in _assigned(found)
            ]
            ends = [at for at, found in enumerate(block) if _assigned(found).intersection(last)]
            if begins and ends and begins[0] <= ends[-1]:
                chosen = ast.Module(block[begins[0] : ends[-1] + 1], type_ignores=[])
                return compile(chosen, str(self.folder / path), "exec")
        raise self._unknown(path, f"no block that assigns {first} and then {last[0]}")

    def definitions(self, path: str, *names: str, given: dict[str, Any]) -> dict[str, Any]:
        """Functions ``names`` of a module with the module's functions and values they use, but without its imports and
        decorators.

        Args:
            given: what the imports would have bound.
        """
        known: dict[str, ast.stmt] = {}
        for statement in self._tree(path).body:
            if isinstance(statement, ast.FunctionDef):
                statement.decorator_list = []
                known[statement.name] = statement
            elif isinstance(statement, ast.Assign):
                known.update(dict.fromkeys(_assigned(statement), statement))
        missing = [name for name in names if name not in known]
        if missing:
            raise self._unknown(path, f"no function {missing[0]}")
        wanted, kept = list(names), list[ast.stmt]()
        while wanted:
            if (statement := known.pop(wanted.pop(), None)) is not None:
                kept.append(statement)
                wanted += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
        kept = sorted({id(statement): statement for statement in kept}.values(), key=lambda found: found.lineno)
        space = dict(given)
        exec(compile(ast.Module(kept, type_ignores=[]), str(self.folder / path), "exec"), space)
        return space

    def _tree(self, path: str) -> ast.Module:
        try:
            return ast.parse((self.folder / path).read_text())
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise self._unknown(path, str(error)) from None

    def _unknown(self, path: str, reason: str) -> UserError:
        todo = "check out the commit that docs/compared-with-peers.md names"
        return UserError(f"cannot use the code there: {reason}", str(self.folder / path), todo)


def _blocks(tree: ast.Module) -> list[list[ast.stmt]]:
    bodies = [getattr(node, field, None) for node in ast.walk(tree) for field in ("body", "orelse")]
    return [body for body in bodies if isinstance(body, list)]


def _assigned(statement: ast.stmt) -> set[str]:
    """The names that a statement assigns at its own level or inside its branches."""
    found = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {node.id for node in found}
