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

from lessons import SCRIPTS, functions, read_original


def body(node):
    """Return the statements of a function, without its docstring."""
    return node.body[ast.get_docstring(node) is not None :]


def write_exercise(script, pieces, names):
    """Return the source of a script in which what `names` mean (pieces, functions, classes) raises.

    Signatures, docstrings, and comments between them and the body, are kept."""
    source = read_original(script)
    lines, nodes = source.splitlines(), functions(ast.parse(source))
    found = [(d, p.task) for p in pieces for d in p.definitions.split()
             if {d, d.partition(".")[0], p.name} & {*names}]  # fmt: skip
    for name, task in sorted(found, key=lambda pair: -nodes[pair[0]].lineno):  # from the end
        first, indent = body(nodes[name])[0], " " * nodes[name].body[0].col_offset
        start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))])
        parts = textwrap.wrap(f"{name}: {task}", 80, drop_whitespace=False)
        parts = [f"{indent}    {json.dumps(part, ensure_ascii=False)}" for part in parts]
        stub = [f"{indent}raise NotImplementedError(", *parts, f"{indent})"]
        lines[start - 1 : nodes[name].end_lineno] = stub
    return "\n".join(lines) + "\n"


def list_pieces(script, pieces):
    """Return a table: for each piece, how many lines of code it has, and what to write."""
    nodes, rows = functions(ast.parse(read_original(script))), []
    for piece in pieces:
        code = [ast.unparse(part) for d in piece.definitions.split() for part in body(nodes[d])]
        n = len("\n".join(code).splitlines())
        rows.append(f"{piece.name:<26}{n:>3} lines   {piece.task}\n")
    return "".join(rows)


def main(argv):
    """Write what the arguments ask for."""
    script = Path(argv[0]).stem if argv else ""
    if script not in SCRIPTS:
        sys.exit(f"usage: exercise.py FILE [PIECE ...]; FILE: {', '.join(SCRIPTS)}")
    pieces, names = importlib.import_module(f"lessons_{script}").PIECES, argv[1:]
    sys.stdout.reconfigure(encoding="utf-8")  # where a Windows terminal has another encoding
    if not names:
        sys.stdout.write(list_pieces(script, pieces))
        return
    for name in names:
        if write_exercise(script, pieces, [name]) == read_original(script):
            sys.exit(f"{script}.py has no piece {name}: {', '.join(p.name for p in pieces)}")
    sys.stdout.write(write_exercise(script, pieces, names))


if __name__ == "__main__":
    main(sys.argv[1:])
