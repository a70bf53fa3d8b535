"""The autograder, what its lessons share: how a student's code is loaded, judged and diagnosed.

A piece is judged in our original, with the student's functions of that piece, and no others."""

import ast
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
SECONDS = 10  # a solution that takes longer is stopped: it may be an endless loop
# definitions: "LM.__init__ LM.forward"; grade(module) raises Wrong, unless the piece is right
Piece = namedtuple("Piece", "name definitions grade task")
parse, compile_once = functools.lru_cache(8)(ast.parse), functools.cache(compile)


class Wrong(Exception):  # noqa: N818 - it is the student's solution that is wrong
    """A solution is wrong. The message is "name of the mistake: what it did to the numbers"."""


@functools.cache
def read_original(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def functions(tree):
    """Return {"get_batch": node, "Head.forward": node, ...}: a file's functions and methods."""
    owners = [("", tree), *((f"{n.name}.", n) for n in tree.body if isinstance(n, ast.ClassDef))]
    found = [(owner + f.name, f) for owner, node in owners for f in node.body
             if isinstance(f, ast.FunctionDef)]  # fmt: skip
    return dict(sorted(found, key=lambda pair: pair[1].lineno))


def plant(script, piece, old, new):
    """Return the original with `new` for `old`, which the piece has once, or without comments."""
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
    """Return the rows of "cell | cell": ∅ is nothing, ¶ a new line; an indented line goes on."""
    rows = text.strip().replace("\n    ", " ").replace("∅", "").splitlines()
    return [[cell.replace("¶", "\n") for cell in row.split(" | ")] for row in rows]


def load(script, source, definitions, file="my_gpt.py"):
    """Return our script as a module, with these definitions of the student's source."""

    def bound(node):  # the names that a statement defines; none for those that must not run
        parts = ast.walk(node) if isinstance(node, ast.Assign | ast.AnnAssign) else ()
        found = {p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
        return {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else found

    module, tree, names = types.ModuleType(script), parse(source), definitions.split()
    module.__file__, written = str(ROOT / f"{script}.py"), functions(tree)
    for name in names:
        require(name in written, f"not written yet: {file} has no {name}")
        if (stub := ast.unparse(written[name].body[-1])).startswith("raise NotImplementedError"):
            exec(stub)  # what tests/exercise.py writes
    exec(compile_once(read_original(script), "original", "exec"), vars(module))
    module.has_bfloat16 = lambda device: False  # float32 everywhere: the references are exact
    ours, owners = vars(module).copy(), {name.partition(".")[0] for name in names}
    new = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
           or (bound(node) and bound(node) & {*ours} <= owners)]  # fmt: skip
    exec(compile(ast.Module(new, []), file, "exec"), vars(module))
    for owner in owners - {*names}:  # the student's methods move into our class
        theirs, whole = vars(module)[owner], ours[owner]
        setattr(module, owner, whole)
        for name, value in vars(theirs).items():
            if f"{owner}.{name}" in names or not hasattr(whole, name):
                setattr(whole, name, value)
                cells = getattr(value, "__closure__", None) or ()
                for cell in (cell for cell in cells if cell.cell_contents is theirs):
                    cell.cell_contents = whole  # for super(), which asks for its class
    return module


def judge(piece, script, source, file="my_gpt.py", definitions=None):
    """Return what is wrong with a piece of a student's source, or None. It never raises."""

    def stop(signum, frame):
        raise TimeoutError(f"it did not end within {SECONDS} s: an endless loop?")

    alarm = getattr(signal, "alarm", abs)  # Windows has none
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
        frames = [(f.f_code, line) for f, line in traceback.walk_tb(error.__traceback__)]
        places = [(c.co_qualname, n) for c, n in frames if c.co_filename == file]
        place = " in {}, line {} of {}".format(*places[-1], file) if places else ""
        return f"error: {type(error).__name__}{place}: {error}".split("\n")[0]
    finally:
        alarm(0)


def require(condition, message):
    """Raise Wrong with the message, unless the condition holds."""
    if not condition:
        raise Wrong(message)


def close(a, b, rtol=1e-4, atol=1e-5):
    """Return whether two tensors are nearly equal, or a and one of a tuple b."""
    if isinstance(b, tuple):
        return any(close(a, form, rtol, atol) for form in b)
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    return a.shape == b.shape and torch.allclose(a, b, rtol, atol, equal_nan=True)


def diagnose(got, right, wrong=(), rtol=1e-4, atol=1e-5, what="result"):
    """Return None if `got` has the right numbers. Otherwise raise Wrong, and say why.

    `right` is a tensor, a number or a list; a tuple has several forms that are right. `wrong` is
    {name of a mistake: (its numbers or a tuple of forms, explanation)}. `what` names the thing."""
    require(got is not None, f"type: the {what} is None: is `return` missing?")
    got = torch.as_tensor(got).detach()
    first = torch.as_tensor(right[0] if isinstance(right, tuple) else right).detach()
    kind = got.is_floating_point() == first.is_floating_point()
    if kind and close(got, right, rtol, atol):
        return
    for name, (numbers, explanation) in dict(wrong).items():
        require(not close(got, numbers, rtol, atol), f"{name}: {explanation}")
    require(got.shape == first.shape and kind, f"shape or type: the {what} is {tuple(got.shape)}, "
            f"{got.dtype}; it should be {tuple(first.shape)}, {first.dtype}")  # fmt: skip
    differ = ~torch.isclose(got.double(), first.double(), rtol, atol, equal_nan=True)
    at = tuple(differ.nonzero()[0].tolist())
    where = f" at {list(at)}: {differ.sum()} of {differ.numel()} differ" if at else ""
    raise Wrong(f"{what}: {got[at].item():.5g} instead of {first[at].item():.5g}{where}")


def numbers(*shape, seed=0):
    """Return normal random numbers of this shape, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(module, std=0.5):
    """Fill all parameters with random numbers, so that each part shows in the result; return it."""
    for i, p in enumerate(module.parameters()):
        p.data = numbers(*p.shape, seed=i) * std
    return module
