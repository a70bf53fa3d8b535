"""Runs a student's piece, and writes down what it does. Nothing is judged here.

A piece is run inside our original script: what it needs from other pieces is ours. A grader is a
function watch_PIECE(gpt) of graders/watch_SCRIPT.py. It calls the piece and yields pairs
(what, value). judge.py compares the values with those of the original."""

import ast
import functools
import importlib
import random
import re
import symtable
import traceback
import types
from dataclasses import dataclass

import torch

from graders import judge
from graders.pieces import (
    PIECES,
    ROOT,
    SCRIPTS,
    all_statements,
    find_piece,
    functions,
    is_stub,
    original_functions,
    parse_original,
    parts_of,
    read_original,
)

# What differs in two messages of the same error: addresses, and what depends on random numbers.
ERASED = re.compile(r"0x[0-9a-f]+|index \d+|at entry \d+|got \[\d+\]")


class Wrong(Exception):  # noqa: N818 - it is the student's solution that is wrong
    """A solution is wrong, and the message says how. It can only refuse: nobody passes by it."""


# --- Values ---------------------------------------------------------------------------------------
@dataclass
class Near:
    """A value that need not be exact: random, or of few digits."""

    value: object
    tolerance: float


@dataclass
class Varies:
    """Results of the same call. Only this counts: are they all equal, or not?"""

    values: list


@dataclass
class Note:
    """A value that may be anything: it helps only to tell apart what is wrong."""

    value: object


@dataclass
class Sample:
    """Random draws. What counts is how often each value comes."""

    values: list


def plain(value):
    """Return a value as JSON can hold it, with the kind of everything that JSON does not know."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype in (torch.bfloat16, torch.float16):
            value = value.float()
        dtype = str(value.dtype).removeprefix("torch.")
        return {
            "tensor": value.tolist(),
            "shape": list(value.shape),
            "dtype": dtype,
        }
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        parts = {str(key): plain(part) for key, part in value.items()}
        return {"dict": parts}
    if isinstance(value, Near):
        return {"near": plain(value.value), "tolerance": value.tolerance}
    if isinstance(value, Note):
        return {"note": plain(value.value)}
    if isinstance(value, Varies):
        return {"varies": [plain(part) for part in value.values]}
    if isinstance(value, Sample):
        return {"sample": [plain(part) for part in value.values]}
    if hasattr(value, "tolist"):  # a number or an array of NumPy
        return {
            "object": f"{type(value).__name__} of NumPy",
            "value": value.tolist(),
        }
    return {"object": type(value).__name__}


def kind(value):
    """Return what a value is, in words: "a tensor of shape (2, 3)"."""
    if value is None:
        return "None (is `return` missing?)"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def tensor(value, name, *shape):
    """Return the value if it is a tensor (of this shape). Otherwise it is Wrong."""
    wanted = f"a tensor of shape {shape}" if shape else "a tensor"
    if not isinstance(value, torch.Tensor) or (shape and value.shape != shape):
        raise Wrong(f"{name} returned {kind(value)}: return {wanted}")
    return value


def two(value, name, what):
    """Return the value if it can be unpacked into two. Otherwise it is Wrong."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Wrong(f"{name} returned {kind(value)}: return {what}")
    return value


def entry(value, name, key):
    """Return value[key] of a dict. Otherwise it is Wrong."""
    if not isinstance(value, dict) or key not in value:
        keys = list(value) if isinstance(value, dict) else kind(value)
        raise Wrong(f"{name} returned {keys}: return a dict with {key!r}")
    return value[key]


def outcome(function, *arguments):
    """Return the result of a call, or the name of the exception that it raised."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"raised {type(error).__name__}"


def numbers(*shape, seed=0):
    """Return normal random numbers of this shape, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


# --- Parameters that do not depend on how a student names or splits the layers --------------------
@torch.no_grad()
def fill(module, value):
    """Fill every matrix of a module with value(rows, columns), and every other bias with 0.

    LayerNorm keeps its 1 and 0. Returns the module, in float32."""
    module.float()
    for name, p in module.named_parameters():
        if p.dim() >= 2:
            p.copy_(value(*p.shape[-2:]).expand(p.shape))
        elif name.endswith("bias"):
            p.zero_()
    return module


def equal_numbers(rows, columns):
    """For `fill`: all numbers of all matrices are the same."""
    return torch.full((rows, columns), 0.3)


def numbers_by_size(rows, columns):
    """For `fill`: matrices of the same size are the same, and symmetric up to a transposition."""
    small, large = sorted([rows, columns])
    matrix = 0.5 * numbers(small, large, seed=small * large)
    if small == large:
        matrix = (matrix + matrix.T) / 2
    return matrix if rows == small else matrix.T


def size_of_matrices(module):
    """Return how many numbers the matrices of a module have."""
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def random_parameters(module):
    """Fill all parameters with random numbers. Returns the module, in float32."""
    module.float()
    for i, p in enumerate(module.parameters()):
        p.data = 0.5 * numbers(*p.shape, seed=i)
    return module


def watch_dropout(make, *inputs):
    """Call modules make(rate) twice, in training and in evaluation."""

    def twice(module):
        calls = [module(*inputs), module(*inputs)]
        return Varies([call[0] if isinstance(call, tuple) else call for call in calls])

    torch.manual_seed(0)
    yield "two calls in training with dropout 0.5", twice(make(0.5).train())
    yield "two calls in evaluation with dropout 0.5", twice(make(0.5).eval())
    yield "two calls in training with dropout 0", twice(make(0.0).train())


# --- Load a solution into the original ------------------------------------------------------------
@functools.cache
def compile_original(script):
    """Return the code of a script."""
    return compile(read_original(script), f"{script}.py", "exec")


def load_original(script):
    """Return the script as a module of its own, in float32 on every machine."""
    module = types.ModuleType(script)
    module.__file__ = str(ROOT / f"{script}.py")
    exec(compile_original(script), vars(module))
    module.has_bfloat16 = lambda device: False
    return module


@functools.cache
def original_statements(script):
    """Return the statements of a script, as text."""
    return {ast.dump(statement) for statement in parse_original(script).body}


def names_bound(statement):
    """Return the names that a statement at the top of a file defines or changes."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    names = set()
    for part in ast.walk(statement):
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            names.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, ast.alias):
            names.add((part.asname or part.name).partition(".")[0])
        elif isinstance(part, ast.Attribute | ast.Subscript):  # table[i] = ..., table.append(...)
            inner = ast.walk(part.value)
            names |= {name.id for name in inner if isinstance(name, ast.Name)}
    return names


def names_used(statement):
    """Return the global names that a statement reads, also inside its functions."""
    tables = [symtable.symtable(ast.unparse(statement), "piece", "exec")]
    symbols = tables[0].get_symbols()
    names = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    while tables:
        for child in tables.pop().get_children():
            names |= {symbol.get_name() for symbol in child.get_symbols() if symbol.is_global()}
            tables.append(child)
    return names


def is_harmless(statement):
    """Return whether a statement may run: it is no docstring, and not for a script's start."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call)
    is_start = isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)
    return not is_start


def needed_statements(script, piece, tree):
    """Return the statements of a student's file that the piece needs: itself, its helpers, imports.

    Other pieces are those of the original."""
    originals = original_statements(script)
    others = {other.owner for other in PIECES[script]} - {piece.owner}
    candidates = [statement for statement in tree.body if is_harmless(statement)]
    wanted, chosen = {piece.owner, "*"}, []  # *: from module import *

    def is_needed(statement):
        names = names_bound(statement)
        is_ours = piece.owner not in names and ast.dump(statement) in originals
        return bool(names & wanted) and not is_ours

    while True:
        found = [s for s in candidates if s not in chosen and is_needed(s)]
        if not found:
            return [statement for statement in tree.body if statement in chosen]
        chosen += found
        for statement in found:
            wanted |= names_used(statement) - others


def bases_of(script, name):
    """Return what a class of the script is built on."""
    tree = parse_original(script)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = [node for node in classes if node.name == name]
    return [ast.dump(base) for node in found for base in node.bases]


def complete_class(script, piece, node):
    """Put our methods into a student's class for those that are missing or not yet written."""
    ours = original_functions(script)
    asked = parts_of(script, piece)
    if [ast.dump(base) for base in node.bases] != bases_of(script, node.name):
        return  # built on another class: it may have them from there
    methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    for name, method in ours.items():
        owner, _, short = name.partition(".")
        if owner != node.name or not short or name in asked:
            continue
        if short not in methods:
            node.body.append(method)
        elif is_stub(methods[short]):
            node.body[node.body.index(methods[short])] = method


def check_written(script, piece, tree, file):
    """Raise Wrong if the piece is missing, still a stub, or made of what is not allowed."""
    bound = set().union(*(names_bound(statement) for statement in tree.body))
    if piece.owner not in bound:
        raise Wrong(f"not written yet: {file} has no {piece.owner}")
    written = functions(tree)
    for name in parts_of(script, piece):
        if name in written and is_stub(written[name]):
            raise Wrong(f"not written yet: {name}")


def check_allowed(piece, statements):
    """Raise Wrong if the code imports the original, or a whole part of the lesson from PyTorch."""
    text = "\n".join(ast.unparse(statement) for statement in statements)
    whole = re.search(
        r"\b(MultiheadAttention|Transformer\w*|scaled_dot_product_attention)\b",
        text,
    )
    allowed = {"MultiHead": ("MultiheadAttention", "scaled_dot_product_attention")}
    allowed["Head"] = ("scaled_dot_product_attention",)
    if whole and whole[1] not in allowed.get(piece.name, ()):
        raise Wrong(f"{whole[1]} is not allowed here: use the classes of this file")
    imported = re.search(rf"\b(?:import|from) ({'|'.join(SCRIPTS)})\b", text)
    if imported:
        raise Wrong(f"it imports {imported[1]}: write it yourself")


def load(script, piece, source, file):
    """Return the original as a module, with a student's piece and what this needs."""
    module = load_original(script)
    tree = ast.parse(source)
    check_written(script, piece, tree, file)
    for node in all_statements(tree.body):
        if isinstance(node, ast.ClassDef) and node.name == piece.owner:
            complete_class(script, piece, node)
    statements = needed_statements(script, piece, tree)
    check_allowed(piece, statements)
    for statement in statements:
        code = compile(ast.Module([statement], []), file, "exec")
        try:
            exec(code, vars(module))
        except Exception as error:
            if piece.owner in names_bound(statement):
                raise
            names = ", ".join(sorted(names_bound(statement)))
            reason = f"{piece.name} uses {names} from outside, which fails: {error!r:.99}"
            raise Wrong(f"{reason}. Use the arguments only") from error
    return module


# --- Watch ----------------------------------------------------------------------------------------
def watch_function(script, piece):
    """Return the grader of a piece."""
    module = importlib.import_module(f"graders.watch_{script}")
    return module.WATCH[piece.name]


def observe(script, name, source=None, file="my_gpt.py", right=None):
    """Return what a piece does: {"seen": [[what, value], ...]}, and "wrong" or "error".

    Without a source, it is the original's piece. With the values that are right, it ends early: if
    one is wrong, random draws are not needed."""
    piece = find_piece(script, name)
    answer = {"seen": []}
    torch.manual_seed(0)
    random.seed(0)  # some students draw with Python's own
    try:
        gpt = load_original(script)
        if source is not None:
            gpt = load(script, piece, source, file)
        for what, value in watch_function(script, piece)(gpt):
            answer["seen"].append([what, plain(value)])
            if right and enough_is_seen(answer["seen"], right):
                break
            torch.set_default_dtype(torch.float32)  # what a piece sets, it sets for itself
            torch.set_grad_enabled(True)
    except Wrong as wrong:
        answer["wrong"] = str(wrong)
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too
        answer["error"] = describe_error(error, source, file)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    return answer


def enough_is_seen(seen, right):
    """Return whether a value is wrong, and random draws come next: they take long."""
    if len(seen) >= len(right):
        return False
    if not is_sample(right[len(seen)][1]):
        return False
    for (_, value), (_, wanted) in zip(seen, right, strict=False):
        if not is_sample(wanted) and not judge.same(value, wanted):
            return True
    return False


def is_sample(value):
    return isinstance(value, dict) and "sample" in value


def describe_error(error, source, file):
    """Return {"type", "message", "place"} of an exception. The place is the student's line."""
    lines = (source or "").splitlines()
    place = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == file and number <= len(lines):
            where = f"in {frame.f_code.co_name}, line {number} of {file}"
            place = f"{where}: `{lines[number - 1].strip()}`"
    message = " ".join(str(error).split())
    short = {
        "type": type(error).__name__,
        "message": message[:200],
        "place": place,
    }
    return short | {"same": ERASED.sub("", message)[:150]}


# --- References: the original, and known mistakes -------------------------------------------------
def references(script, name, with_mistakes):
    """Return {"right": what the original does, "mistakes": [[message, what it does], ...]}."""
    right = observe(script, name)
    if "wrong" in right or "error" in right:
        raise RuntimeError(f"our own {name} of {script}.py cannot be graded: {right}")
    answer = {"right": right["seen"], "mistakes": []}
    if with_mistakes:
        for message, source in mistakes_of(script, name):
            its = observe(script, name, source, right=right["seen"])
            answer["mistakes"].append([message, its])
    return answer


# --- Files of solutions ---------------------------------------------------------------------------
def read_sections(path):
    """Return [(name, words, code), ...] of a file with sections "# --- NAME: words".

    More words can follow in comments below. The code in front of the first section is put in front
    of each."""
    text = path.read_text(encoding="utf-8")
    start, *sections = re.split(r"^# --- ", text, flags=re.MULTILINE)
    found = []
    for section in sections:
        header, *lines = section.split("\n")
        name, _, words = header.partition(":")
        while lines and lines[0].startswith("# "):
            words += lines.pop(0)[1:]
        code = start + "\n".join(lines)
        found.append((name.strip(), words.strip(), code))
    return found


@functools.cache
def mistakes_of(script, name):
    """Return [(message, code), ...] of the known mistakes of a piece."""
    found = own_mistakes(script, name)
    lesson = find_piece(script, name).lesson
    return found + own_mistakes(lesson, name) if lesson else found


@functools.cache
def own_mistakes(script, name):
    """Return those that are in the file of this script."""
    path = ROOT / "tests" / "graders" / f"mistakes_{script}.py"
    return [(words, code) for part, words, code in read_sections(path) if part == name]
