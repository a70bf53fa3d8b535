"""Writes an exercise: a copy of a script, in which some pieces are left to you.

python tests/exercise.py char_gpt.py --list            list the pieces
python tests/exercise.py char_gpt.py Head get_batch    write my_char_gpt.py: these two are yours
python tests/exercise.py char_gpt.py Block             once more: blank another piece in it
python tests/grade.py my_char_gpt.py                   grade what you wrote"""

import argparse
import ast
import re
import sys
import textwrap
from pathlib import Path

from graders.pieces import (
    PIECES,
    SCRIPTS,
    body_of,
    find_piece,
    functions,
    is_stub,
    nearest,
    original_functions,
    parts_of,
    read_header,
    read_original,
    write_header,
)


# --- Blank a piece --------------------------------------------------------------------------------
def stub_of(name, hints):
    """Return the lines that stand in place of a function's body: hints, and an error."""
    hints = textwrap.dedent(hints).strip().splitlines()
    lines = [f"# {line}".rstrip() for line in hints]
    return [*lines, f'raise NotImplementedError("{name}: yours to write")']


def blank(script, source, piece):
    """Return the source in which the parts of a piece that are still ours are left to write.

    Also returns the names of the parts that are not ours: they stay as they are."""
    ours, theirs = original_functions(script), functions(ast.parse(source))
    lines, kept = source.splitlines(keepends=True), []
    parts = [part for part in parts_of(script, piece) if part in theirs]
    with_hints = max(parts, key=lambda part: ours[part].lineno, default="")
    for part in sorted(parts, key=lambda part: -theirs[part].lineno):  # from the end
        function = theirs[part]
        if ast.unparse(function) != ast.unparse(ours[part]):
            kept.append(part)
            continue
        stub = stub_of(part, piece.hints if part == with_hints else "")
        indent = " " * function.body[0].col_offset
        end = "\r\n" if lines[0].endswith("\r\n") else "\n"
        first = first_line(function)
        lines[first - 1 : function.end_lineno] = [f"{indent}{line}{end}" for line in stub]
    return "".join(lines), kept


def first_line(function):
    """Return the number of the first line behind the docstring, comments included."""
    if ast.get_docstring(function) is None:
        return function.body[0].lineno
    return function.body[0].end_lineno + 1


def start_exercise(script):
    """Return the script as an exercise in which nothing is left to write yet."""
    source = read_original(script)
    name = f'NAME = "{script}"'
    return source.replace(f"\n{name}", f'\nNAME = "my_{script}"', 1)


def write_exercise(script, source, names):
    """Return (the source in which the pieces are left to write, what to tell about it)."""
    told = []
    _, before = read_header(source)
    for name in names:
        source, kept = blank(script, source, find_piece(script, name))
        stubs = [part for part in kept if is_stub(functions(ast.parse(source))[part])]
        if stubs == kept and kept:
            told.append(f"{name} is left to write already")
        elif kept:
            told.append(f"{', '.join(kept)}: you have changed it, so it stays as it is")
    asked = {*before, *names}
    asked = [piece.name for piece in PIECES[script] if piece.name in asked]
    return write_header(source, script, asked), told


# --- List the pieces ------------------------------------------------------------------------------
def lines_to_write(script, piece):
    """Return how many lines of code a piece has in our version, without comments."""
    ours = original_functions(script)
    bodies = [body_of(ours[part]) for part in parts_of(script, piece)]
    code = [ast.unparse(statement) for body in bodies for statement in body]
    return len("\n".join(code).splitlines())


def section_of(script, piece):
    """Return the section of the script in which a piece stands."""
    source = read_original(script)
    tree = ast.parse(source)
    places = {getattr(node, "name", ""): node.lineno for node in tree.body}
    place = places[piece.owner]
    before = "\n".join(source.splitlines()[:place])
    return re.findall(r"^# --- (\d+\. .*?)\s*-*$", before, re.MULTILINE)[-1].partition(":")[0]


def list_pieces(script):
    """Print the pieces of a script in the order of the file, with the lines to write."""
    section = None
    for piece in PIECES[script]:
        if section_of(script, piece) != section:
            section = section_of(script, piece)
            print(f"{script}.py, {section}")
        known = " (as in char_gpt.py)" if piece.lesson and not piece.changed else ""
        lines = lines_to_write(script, piece)
        print(f"    {piece.name:<26}{lines:>3} lines  {piece.task}{known}")


# --- The command ----------------------------------------------------------------------------------
def check_names(script, names):
    """End with a message if the script has no such piece."""
    known = [piece.name for piece in PIECES[script]]
    for name in names:
        if name not in known:
            sys.exit(f"{script}.py has no piece {name}{nearest(name, known)} (--list: all pieces)")


def main(argv=None):
    """Do what the arguments ask for."""
    parser = argparse.ArgumentParser(description="Write an exercise.")
    parser.add_argument("script", nargs="?", help=f"one of {', '.join(SCRIPTS)}")
    parser.add_argument("piece", nargs="*", help="what is left to write")
    parser.add_argument("--list", action="store_true", help="list the pieces")
    flags = parser.parse_args(argv)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    script = Path(flags.script or "").name.removesuffix(".py")
    if flags.script and script not in SCRIPTS:
        sys.exit(f"there is no script {flags.script}{nearest(script, SCRIPTS)}")
    if flags.list or not flags.piece:
        for name in [script] if script else SCRIPTS:
            list_pieces(name)
        return
    check_names(script, flags.piece)
    path = Path(f"my_{script}.py")
    source = start_exercise(script)
    if path.exists():
        source = path.read_bytes().decode("utf-8")  # bytes: line ends stay as they are
        try:
            ast.parse(source)
        except SyntaxError as error:
            sys.exit(f"{path} is there, and is no Python: {error}. Nothing was changed")
    exists = path.exists()
    source, told = write_exercise(script, source, flags.piece)
    path.write_bytes(source.encode("utf-8"))
    print("\n".join([f"{path}: {'changed' if exists else 'written'}", *told]))
    print(f"grade it: python {Path(__file__).with_name('grade.py')} {path}")


if __name__ == "__main__":
    main()
