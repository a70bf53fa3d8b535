"""Grades a file of exercise.py: a line per piece, "passes" or what is wrong.

python tests/grade.py my_char_gpt.py                    all pieces that were left to write
python tests/grade.py my_char_gpt.py Head get_batch     these pieces
python tests/grade.py --csv marks.csv folder/*.py       a row per file, a column per piece

It reads a notebook (.ipynb), and a file that holds some definitions only, too. The exit status is 0
if all pieces pass. See tests/GRADING.md for what the grader is, and is not."""

import argparse
import ast
import csv
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from graders.judge import judge
from graders.pieces import (
    PIECES,
    SCRIPTS,
    find_piece,
    functions,
    is_stub,
    nearest,
    original_functions,
    parts_of,
    read_header,
)
from graders.process import SECONDS, start_server


class CannotGrade(Exception):  # noqa: N818
    """A file cannot be read. The message says why."""


# --- Read a solution ------------------------------------------------------------------------------
def read_source(path):
    """Return the Python text of a file or a notebook."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CannotGrade(f"cannot read {path}: {error}") from error
    if Path(path).suffix == ".ipynb":
        text = read_notebook(path, text)
    try:
        ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise CannotGrade(f"{path} is no Python: {error}") from error
    return text


def read_notebook(path, text):
    """Return the code cells of a notebook as one text, without magics."""
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise CannotGrade(f"{path} is no notebook: {error!r}") from error
    parts = []
    for number, source in enumerate(sources, 1):
        if source.lstrip().startswith("%%") and not re.match(r"\s*%%(time|capture)", source):
            continue  # a cell of another language
        lines = [comment_magic(line) for line in source.splitlines()]
        parts.append("\n".join([f"# cell {number}", *lines]))
    return "\n\n".join(parts) + "\n"


def comment_magic(line):
    """Return a line of a notebook; a magic like %time or !pip becomes `pass`."""
    indent = line[: len(line) - len(line.lstrip())]
    if re.match(r"\s*([%!]|\?\w)", line):
        return f"{indent}pass  # {line.strip()}"
    return line


def find_script(path, source):
    """Return the script that a file is an exercise of."""
    script, _ = read_header(source)
    if script:
        return script
    for name in SCRIPTS:
        if name in Path(path).stem:
            return name
    found = re.search(r'^NAME = ["\'](?:my_)?(\w+)["\']', source, re.MULTILINE)
    if found and found[1] in SCRIPTS:
        return found[1]
    written = functions(ast.parse(source)).keys()
    known = {name: len(written & original_functions(name).keys()) for name in SCRIPTS}
    return max(SCRIPTS, key=known.get)


def find_pieces(script, source):
    """Return the names of the pieces that a file has to write."""
    _, names = read_header(source)
    if names:
        return names
    ours, written = original_functions(script), functions(ast.parse(source))
    found = []
    for piece in PIECES[script]:
        parts = [part for part in parts_of(script, piece) if part in written]
        if any(differs(written[part], ours[part]) for part in parts):
            found.append(piece.name)
    return [name for name in found if "." not in name or owner_of(name) not in found]


def owner_of(name):
    """Return the class of a piece such as LM.forward."""
    return name.partition(".")[0]


def differs(function, original):
    """Return whether a function is another one than ours, or a stub."""
    return is_stub(function) or ast.unparse(function) != ast.unparse(original)


# --- Grade ----------------------------------------------------------------------------------------
def grade(path, names=(), seconds=SECONDS, script=None):
    """Yield (piece, None or what is wrong) for a file."""
    source = read_source(path)
    script = script or find_script(path, source)
    names = names or find_pieces(script, source)
    if not names:
        raise CannotGrade(f"{path} has no piece of {script}.py that differs from ours")
    for name in names:
        check_name(script, name)

    def one(name):
        return judge(script, name, source, Path(path).name, seconds)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(names, pool.map(one, names), strict=True)


def check_name(script, name):
    """Raise CannotGrade if the script has no such piece."""
    try:
        find_piece(script, name)
    except KeyError:
        known = [piece.name for piece in PIECES[script]]
        raise CannotGrade(f"{script}.py has no piece {name}{nearest(name, known)}") from None


def print_verdicts(path, names, seconds, script):
    """Print a line per piece. Return whether all pass."""
    passed = True
    for name, wrong in grade(path, names, seconds, script):
        print(f"{name}: {wrong or 'passes'}", flush=True)
        passed = passed and not wrong
    return passed


def write_marks(table, paths, names, seconds, script):
    """Write a row per file: points, and for each piece "passes" or what is wrong."""
    rows = []
    for path in paths:
        try:
            verdicts = dict(grade(path, names, seconds, script))
            row = {name: wrong or "passes" for name, wrong in verdicts.items()}
            row["points"] = sum(not wrong for wrong in verdicts.values())
            row["of"] = len(verdicts)
        except CannotGrade as error:
            row = {"points": 0, "of": len(names), "message": str(error)}
        rows.append({"file": str(path)} | row)
        print(f"{path}: {row['points']} of {row['of']} {row.get('message', '')}", flush=True)
    columns = ["file", "points", "of", "message"]
    columns += dict.fromkeys(name for row in rows for name in row if name not in columns)
    with open(table, "w", encoding="utf-8-sig", newline="") as file:  # -sig: for Excel
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def split_arguments(arguments):
    """Return (files, names of pieces)."""
    files = [argument for argument in arguments if argument.endswith((".py", ".ipynb"))]
    return files, [argument for argument in arguments if argument not in files]


def main(argv=None):
    """Grade what the arguments say, and return the exit status."""
    parser = argparse.ArgumentParser(description="Grade an exercise.")
    parser.add_argument("file_or_piece", nargs="+", help="files (.py, .ipynb), and pieces")
    parser.add_argument("--csv", metavar="FILE", help="write a table of marks for several files")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each piece, at most")
    parser.add_argument("--script", choices=SCRIPTS, help="what the file is an exercise of")
    flags = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    files, names = split_arguments(flags.file_or_piece)
    if not files or (len(files) > 1 and not flags.csv):
        parser.error("name one file to grade, or several with --csv FILE")
    start_server()
    if flags.csv:
        write_marks(flags.csv, files, names, flags.seconds, flags.script)
        return 0
    try:
        return 0 if print_verdicts(files[0], names, flags.seconds, flags.script) else 1
    except CannotGrade as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
