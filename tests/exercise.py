"""Writes an exercise: a copy of a script, in which the bodies of some functions are left to you.

python tests/exercise.py char_gpt.py                                 list the pieces, in order
python tests/exercise.py char_gpt.py Head LM.forward > my_gpt.py     leave these two to write
python -m pytest tests/test_lessons.py --file my_gpt.py -k Head      grade one of them
"""

import ast
import importlib
import json
import sys
import textwrap
from pathlib import Path

from lessons import SCRIPTS, functions, parse, read_original


def body(node):
    """Return the statements of a function, without its docstring."""
    return node.body[ast.get_docstring(node) is not None :]


def find_definitions(name, pieces):
    """Return {definition: its piece} that a name means: a piece, a function, or a whole class."""
    known = {d: piece for piece in pieces for d in piece.definitions.split()}
    return {d: p for d, p in known.items() if name in (d, d.partition(".")[0], p.name)}


def write_exercise(script, definitions):
    """Return the source of a script in which these {definition: piece} raise an error.

    Signatures, docstrings, and comments between them and the body, are kept."""
    source = read_original(script)
    lines, nodes = source.splitlines(), functions(parse(source))
    for name in sorted(definitions, key=lambda name: -nodes[name].lineno):  # from the end
        first, indent = body(nodes[name])[0], " " * nodes[name].body[0].col_offset
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))])
        task = textwrap.wrap(f"{name}: {definitions[name].task}", 80, drop_whitespace=False)
        task = [f"{indent}    {json.dumps(part, ensure_ascii=False)}" for part in task]
        stub = [f"{indent}raise NotImplementedError(", *task, f"{indent})"]
        lines[start - 1 : nodes[name].end_lineno] = stub
    return "\n".join(lines) + "\n"


def list_pieces(script, pieces):
    """Return a table: for each piece, how many lines of code it has, and what to write."""
    nodes, rows = functions(parse(read_original(script))), []
    for piece in pieces:
        code = [ast.unparse(part) for d in piece.definitions.split() for part in body(nodes[d])]
        n = len("\n".join(code).splitlines())
        rows.append(f"{piece.name:<26}{n:>3} lines   {piece.task}\n")
    return "".join(rows)


def main(argv):
    """Write what the arguments ask for."""
    script, found = Path(argv[0]).stem if argv else "", {}
    if script not in SCRIPTS:
        sys.exit(f"usage: exercise.py FILE [PIECE ...]; FILE: {', '.join(SCRIPTS)}")
    pieces = importlib.import_module(f"lessons_{script}").PIECES
    for name in argv[1:]:
        found |= (new := find_definitions(name, pieces))
        if not new:
            sys.exit(f"{script}.py has no piece {name}: {', '.join(p.name for p in pieces)}")
    sys.stdout.reconfigure(encoding="utf-8")  # where a Windows terminal has another encoding
    sys.stdout.write(write_exercise(script, found) if found else list_pieces(script, pieces))


if __name__ == "__main__":
    main(sys.argv[1:])
