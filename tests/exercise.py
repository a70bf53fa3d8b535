"""Writes an exercise: a copy of a script, in which the bodies of some functions are left to you.

python tests/exercise.py char_gpt.py                                 list the pieces, in order
python tests/exercise.py char_gpt.py Head LM.forward > my_gpt.py     leave these two to write
python -m pytest tests/test_lessons.py --file my_gpt.py -k Head      grade one of them
"""

import ast
import importlib
import sys
import textwrap
from pathlib import Path

from lessons import SCRIPTS, functions, parse, read_original


def body(node):
    """Return the statements of a function, without its docstring."""
    return node.body[ast.get_docstring(node) is not None :]


def write_exercise(script, pieces, names):
    """Return a script's source in which the bodies of pieces, functions, classes only raise."""
    source = read_original(script)
    lines, nodes = source.splitlines(), functions(parse(source))
    found = [(d, p.task) for p in pieces for d in p.definitions.split()
             if {d, d.partition(".")[0], p.name} & {*names}]  # fmt: skip
    for name, task in sorted(found, key=lambda pair: -nodes[pair[0]].lineno):  # from the end
        start, indent = body(nodes[name])[0].lineno, " " * nodes[name].body[0].col_offset
        stub = f"raise NotImplementedError(\n    {f'{name}: {task}'!r}\n)"
        lines[start - 1 : nodes[name].end_lineno] = textwrap.indent(stub, indent).splitlines()
    return "\n".join(lines) + "\n"


def main(argv):
    """Write what the arguments ask for: an exercise, or the pieces, each with its lines of code."""
    script, names = Path(argv[0]).stem if argv else "", argv[1:]
    if script not in SCRIPTS:
        sys.exit(f"usage: exercise.py FILE [PIECE ...]; FILE: {', '.join(SCRIPTS)}")
    pieces, text = importlib.import_module(f"lessons_{script}").PIECES, ""
    for name in names:
        text = write_exercise(script, pieces, [name])
        if text == read_original(script):
            sys.exit(f"{script}.py has no piece {name}: {', '.join(p.name for p in pieces)}")
    nodes = functions(parse(read_original(script)))
    for piece in pieces:
        code = [ast.unparse(part) for d in piece.definitions.split() for part in body(nodes[d])]
        text += f"{piece.name:<26}{len(chr(10).join(code).splitlines()):>3} lines   {piece.task}\n"
    sys.stdout.reconfigure(encoding="utf-8")  # where a Windows terminal has another encoding
    sys.stdout.write(write_exercise(script, pieces, names) if names else text)


if __name__ == "__main__":
    main(sys.argv[1:])
