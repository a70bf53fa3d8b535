"""The autograder, what its lessons share: how a student's code is loaded, judged and diagnosed.

Each piece of a script is judged alone. The module under test is our original, in which only the
functions of that piece are the student's, and what the student's file has under new names: helper
functions, imports, constants. So a mistake in `Head` does not spoil `FeedForward`.
"""

import ast
import copy
import functools
import signal
import textwrap
import traceback
import types
from collections import namedtuple
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("char_gpt", "word_gpt", "gpt2")
OURS = 10**6  # is added to the line numbers of our own code: a smaller number is the student's
SECONDS = 10  # a solution that takes longer is stopped: it may be an endless loop


class Wrong(Exception):  # noqa: N818 - it is the student's solution that is wrong
    """A solution is wrong. The message is "name of the mistake: what it did to the numbers"."""


# One exercise. `definitions` is "LM.__init__ LM.forward"; `grade(module)` raises Wrong or returns
# None; `task` says in a few words what to write.
Piece = namedtuple("Piece", "name definitions grade task")


# --- Source code ----------------------------------------------------------------------------------
@functools.cache
def read_original(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


@functools.lru_cache(8)
def parse(source, offset=0):
    """Return the syntax tree of a source, which nobody may change; line numbers plus an offset."""
    return ast.increment_lineno(ast.parse(source), offset)


def functions(tree):
    """Return {"get_batch": node, "Head.forward": node, ...}: a file's functions and methods."""
    owners = [("", tree), *((f"{n.name}.", n) for n in tree.body if isinstance(n, ast.ClassDef))]
    found = [(part.lineno, owner + part.name, part) for owner, node in owners for part in node.body
             if isinstance(part, ast.FunctionDef)]  # fmt: skip
    return {name: node for _, name, node in sorted(found, key=lambda row: row[0])}


def plant(script, piece, old, new):
    """Return the original's source with `old`, which is there once within the piece, replaced.

    If it is not there as it is written, it is looked for in the code without comments."""
    source, places = read_original(script), []
    for node in (functions(parse(source))[name] for name in piece.definitions.split()):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        written = "".join(source.splitlines(keepends=True)[first : node.end_lineno])
        plain = textwrap.indent(ast.unparse(node), " " * node.col_offset) + "\n"
        text = written if old in written else plain
        places += [(written, text.replace(old, new))] * text.count(old)
    assert len(places) == 1, f"{piece.name} has {old!r} {len(places)} times"
    return source.replace(*places[0])


def table(text):
    """Return the rows of "cell | cell | cell": ∅ is nothing, ¶ a new line; indented: it goes on."""
    rows = text.strip().replace("\n    ", " ").replace("∅", "").splitlines()
    return [[cell.replace("¶", "\n") for cell in row.split(" | ")] for row in rows]


# --- Loading --------------------------------------------------------------------------------------
def bound_names(node):
    """Return the names that a statement defines; none for statements that a grader must not run."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    parts = ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ()
    return {p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}


def merge(ours, theirs, wanted, owner=""):
    """Return our statements, with the `wanted` functions of theirs, and theirs with new names.

    A new statement comes before the next one that both have, as in the student's file."""
    where = {name: i for i, node in enumerate(ours) for name in bound_names(node)}
    parts, place = [[node] for node in [*ours, ast.Pass(lineno=1, col_offset=0)]], len(ours)
    for node in reversed(theirs):
        names = bound_names(node)
        for name in names & {*where}:
            place = where[name]
            if owner + name in wanted:
                parts[place][-1] = wanted[owner + name]
            elif isinstance(node, ast.ClassDef) and any(w.startswith(f"{name}.") for w in wanted):
                whole = parts[place][-1] = copy.copy(ours[place])
                whole.body = merge(whole.body, node.body, wanted, f"{name}.")
        if not names & {*where} and names:
            parts[place].insert(0, node)
    return sum(parts, [])


def load(script, source, definitions, file="my_gpt.py"):
    """Return our script as a module, with these definitions of the student's source.

    `definitions` is "Head.forward get_batch": functions and methods, separated by spaces. Line
    numbers of the student's functions remain those of the student's file."""
    ours, theirs = copy.copy(parse(read_original(script), OURS)), parse(source)
    written, names = functions(theirs), definitions.split()
    for name in names:
        require(name in written, f"not written yet: {file} has no {name}")
        if (stub := ast.unparse(written[name].body[-1])).startswith("raise NotImplementedError"):
            exec(stub)  # what tests/exercise.py writes
    imports = [node for node in theirs.body if isinstance(node, ast.Import | ast.ImportFrom)
               and getattr(node, "module", "") != "__future__"]  # fmt: skip
    ours.body = imports + merge(ours.body, theirs.body, {name: written[name] for name in names})
    module = types.ModuleType(script)
    module.__file__ = str(ROOT / f"{script}.py")
    exec(compile(ours, file, "exec"), module.__dict__)
    module.has_bfloat16 = lambda device: False  # float32 everywhere: the references are exact
    return module


# --- Judging --------------------------------------------------------------------------------------
def judge(piece, script, source, file="my_gpt.py", definitions=None):
    """Return what is wrong with a piece of a student's source, or None. It never raises."""

    def stop(signum, frame):
        raise TimeoutError(f"it did not end within {SECONDS} s: an endless loop?")

    alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has none
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)
    try:
        alarm(SECONDS)
        torch.manual_seed(0)
        piece.grade(load(script, source, definitions or piece.definitions, file))
    except Wrong as wrong:
        return str(wrong)
    except NotImplementedError as error:
        return f"not written yet: {error}"
    except (Exception, SystemExit) as error:
        calls = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        calls = [(c.co_qualname, line) for c, line in calls if c.co_filename == file]
        theirs = [f" in {name}, line {line} of {file}" for name, line in calls if line < OURS]
        return f"error: {type(error).__name__}{''.join(theirs[-1:])}: {error}".split("\n")[0]
    finally:
        alarm(0)
    return None


def require(condition, message):
    """Raise Wrong with the message, unless the condition holds."""
    if not condition:
        raise Wrong(message)


def close(a, b, rtol=1e-4, atol=1e-5):
    """Return whether two tensors have the same shape and, nearly, the same numbers."""
    near = dict(rtol=rtol, atol=atol, equal_nan=True)
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), **near)


def diagnose(got, right, wrong=(), rtol=1e-4, atol=1e-5, what="result"):
    """Return None if `got` has the right numbers. Otherwise raise Wrong, and say why.

    `right` is a tensor, a number or a list; a tuple has several forms that are right. `wrong` is
    {name of a mistake: (its numbers or a tuple of forms, explanation)}. `what` names the thing."""
    forms = lambda x: [torch.as_tensor(f).detach() for f in (x if isinstance(x, tuple) else (x,))]  # noqa: E731
    try:
        got, rights = torch.as_tensor(got).detach(), forms(right)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f"type: the {what} is {got!r:.60}, not numbers") from error
    right, same = rights[0], lambda form: close(got, form, rtol, atol)
    kind = got.is_floating_point() == right.is_floating_point()
    if kind and any(map(same, rights)):
        return
    for name, (numbers, explanation) in dict(wrong).items():
        require(not any(map(same, forms(numbers))), f"{name}: {explanation}")
    require(got.shape == right.shape and kind, f"shape or type: the {what} is {tuple(got.shape)}, "
            f"{got.dtype}; it should be {tuple(right.shape)}, {right.dtype}")  # fmt: skip
    differ = ~torch.isclose(got.double(), right.double(), rtol=rtol, atol=atol, equal_nan=True)
    place = tuple(differ.nonzero()[0].tolist())
    at = f" at {list(place)} ({differ.sum()} of {differ.numel()} differ)" if place else ""
    raise Wrong(f"{what}: {got[place].item():.5g} instead of {right[place].item():.5g}{at}")


def numbers(*shape, seed=0):
    """Return normal random numbers of this shape, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module, std=0.5):
    """Fill all parameters with random numbers, so that each part shows in the result; return it."""
    for i, p in enumerate(module.parameters()):
        p.data = numbers(*p.shape, seed=i) * std
    return module
