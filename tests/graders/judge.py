"""Judges a piece: compares what it did with what the original does.

This is the parent's side: it needs no torch, sees plain values only, and runs no student's code."""

import functools
import math
from collections import Counter

from graders.pieces import find_piece
from graders.process import SECONDS, ask

RELATIVE, ABSOLUTE = 1e-4, 1e-5  # how exact numbers must be
SHARE_TOLERANCE = 0.2  # how far the share of a value among random draws may be off
RARE = 0.05  # a value with a smaller share may be missing


# --- Compare values -------------------------------------------------------------------------------
def flatten(value):
    """Return the numbers of a list of lists."""
    if not isinstance(value, list):
        return [value]
    return [number for part in value for number in flatten(part)]


def is_number(value):
    return isinstance(value, int | float)


def is_close(a, b, tolerance=None):
    """Return whether two numbers are about equal; NaN equals NaN."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    relative = RELATIVE if tolerance is None else tolerance
    absolute = ABSOLUTE if tolerance is None else tolerance
    return math.isclose(a, b, rel_tol=relative, abs_tol=absolute)


def is_whole(dtype):
    """Return whether numbers of a type are integers or bools."""
    return not dtype.startswith("float")


def same_tensor(got, right, tolerance):
    """Return whether two tensors have the same shape, the same kind and about equal numbers."""
    if is_number(got):
        got = {
            "tensor": got,
            "shape": [],
            "dtype": "int64" if isinstance(got, int) else "float",
        }
    if not isinstance(got, dict) or "tensor" not in got or got["shape"] != right["shape"]:
        return False
    if is_whole(got["dtype"]) != is_whole(right["dtype"]):
        return False
    pairs = zip(flatten(got["tensor"]), flatten(right["tensor"]), strict=True)
    return all(is_close(a, b, tolerance) for a, b in pairs)


def same_number(got, right, tolerance):
    """Return whether a number, or a tensor of one number, is about right."""
    if isinstance(got, dict):
        got = got.get("tensor", got.get("value"))
        got = flatten(got)[0] if len(flatten(got)) == 1 else None
    return is_number(got) and is_close(got, right, tolerance)


def all_equal(values):
    return all(value == values[0] for value in values)


def shares_of(draws):
    """Return {value: its share} of random draws."""
    counts = Counter(map(str, draws))
    return {value: n / len(draws) for value, n in counts.items()}


def same_shares(got, right):
    """Return whether two lists of random draws have each value about equally often."""
    theirs, ours = shares_of(got), shares_of(right)
    for value in ours.keys() | theirs.keys():
        a, b = ours.get(value, 0), theirs.get(value, 0)
        one_is_missing = min(a, b) == 0 and max(a, b) > RARE
        if one_is_missing or abs(a - b) > SHARE_TOLERANCE:
            return False
    return True


def same(got, right, tolerance=None):
    """Return whether a value is right. The right value says how to compare."""
    if is_number(right) and not isinstance(right, bool):
        return same_number(got, right, tolerance)
    if isinstance(right, list):
        if not isinstance(got, list) or len(got) != len(right):
            return False
        pairs = zip(got, right, strict=True)
        return all(same(a, b, tolerance) for a, b in pairs)
    if not isinstance(right, dict):
        return type(got) is type(right) and got == right
    if "tensor" in right:
        return same_tensor(got, right, tolerance)
    if not isinstance(got, dict) or got.keys() != right.keys():
        return False
    if "note" in right:
        return True
    if "near" in right:
        return same(got["near"], right["near"], right["tolerance"])
    if "varies" in right:
        return all_equal(got["varies"]) == all_equal(right["varies"])
    if "sample" in right:
        return same_shares(got["sample"], right["sample"])
    if "dict" in right:
        right, got = right["dict"], got["dict"]
        if right.keys() != got.keys():
            return False
        return all(same(got[key], right[key]) for key in right)
    return got == right


# --- Say what is wrong ----------------------------------------------------------------------------
def short(value):
    """Return a value as a few words."""
    if isinstance(value, dict):
        if "near" in value:
            return short(value["near"])
        if "varies" in value:
            return "are equal" if all_equal(value["varies"]) else "differ"
        if "sample" in value:
            return f"draws like {short(value['sample'][:9])}"
        if "dict" in value:
            return short(value["dict"])
        if "object" in value:
            return f"a {value['object']}"
    if isinstance(value, dict) and "tensor" in value:
        value = value["tensor"]
        value = round(value, 4) if isinstance(value, float) else value
        return f"the tensor {value!r:.80}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value!r:.80}"


def kind(value):
    """Return what kind of thing a value is, or None where it does not matter."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict) and "tensor" in value:
        return "a tensor"
    if isinstance(value, dict) and "object" in value:
        return f"a {value['object']}"
    if value is None:
        return "None (is `return` missing?)"
    return None


def difference(what, got, right):
    """Return a sentence about a value that is not right, and that no known mistake gives."""
    if isinstance(right, dict) and "near" in right:
        right = right["near"]
        got = got["near"] if isinstance(got, dict) and "near" in got else got
    if isinstance(right, dict) and "tensor" in right and isinstance(got, dict) and "tensor" in got:
        return tensor_difference(what, got, right)
    if kind(got) != kind(right) and kind(got) and not is_number(right):
        return f"{what}: {kind(got)}, where {kind(right) or short(right)} belongs"
    if isinstance(right, dict) and "varies" in right:
        return f"{what} {short(got)}; they should {short(right).replace('are', 'be')}"
    if isinstance(got, list) and isinstance(right, list) and len(got) == len(right):
        for i, (a, b) in enumerate(zip(got, right, strict=True)):
            if not same(a, b):
                return difference(f"{what}, number {i}" if len(right) > 1 else what, a, b)
    return f"{what}: {short(got)} instead of {short(right)}"


def tensor_difference(what, got, right):
    """Return a sentence about a tensor: its shape, its type, or its numbers."""
    a, b = got["shape"], right["shape"]
    if a != b:
        order = " (the dimensions are in another order)" if sorted(a) == sorted(b) else ""
        return f"{what}: its shape is {tuple(a)} instead of {tuple(b)}{order}"
    if is_whole(got["dtype"]) != is_whole(right["dtype"]):
        return f"{what}: its type is {got['dtype']} instead of {right['dtype']}"
    ours, theirs = flatten(right["tensor"]), flatten(got["tensor"])
    if any(math.isnan(number) for number in theirs):
        return f"{what}: some numbers are nan (0 / 0, or a softmax of a row that is all -inf?)"
    factor = common_factor(theirs, ours)
    if factor is not None:
        return f"{what}: every number is {factor:.4g} times what it should be: is a factor lost?"
    in_order = zip(sorted(theirs), sorted(ours), strict=True)
    if all(is_close(x, y) for x, y in in_order):
        return f"{what}: the numbers are right, but in another order"
    numbers = range(len(ours))
    wrong = [i for i in numbers if not is_close(theirs[i], ours[i])]
    first = wrong[0] if wrong else 0
    place = f" at {place_of(first, b)}" if b else ""
    share = f"; {len(wrong)} of {len(ours)} numbers differ" if len(ours) > 1 else ""
    return f"{what}: {theirs[first]:.5g} instead of {ours[first]:.5g}{place}{share}"


def common_factor(theirs, ours):
    """Return the one factor between two lists of numbers, or None."""
    pairs = zip(theirs, ours, strict=True)
    ratios = [x / y for x, y in pairs if abs(y) > 1e-3]
    if len(ratios) < 2 or not is_close(min(ratios), max(ratios), 1e-3):
        return None
    if abs(ratios[0]) < 1e-6 or is_close(ratios[0], 1, 1e-3):
        return None
    return ratios[0]


def place_of(number, shape):
    """Return the indices of the element with this number in a tensor."""
    place = []
    for size in reversed(shape):
        place.insert(0, number % size)
        number //= size
    return place


def error_message(error, piece):
    """Return a sentence about an exception: the student's line, and what was expected."""
    where = f" {error['place']}" if error["place"] else ""
    message = f"{error['type']}{where}: {error['message']}".rstrip(": ")
    if error["type"] == "NotImplementedError":
        message = f"a line `raise NotImplementedError` is still reached{where}: remove it"
    if error["type"] == "NameError":
        message += " (use the arguments, and names that are defined in this file)"
    return f"{message}. Expected: {piece.expects}"


# --- The verdict ----------------------------------------------------------------------------------
def seen(answer, i):
    """Return the i-th value that an answer has, or how it stopped in front of it."""
    if i < len(answer["seen"]):
        return answer["seen"][i][1]
    error = answer.get("error", {})
    stop = [
        answer.get("wrong", ""),
        error.get("type", ""),
        error.get("same", ""),
    ]
    return {"stopped": stop}


def first_difference(answer, right):
    """Return the number of the first value that is not right, or None."""
    for i in range(len(right)):
        if not same(seen(answer, i), right[i][1]):
            return i
    return None if "wrong" not in answer and "error" not in answer else len(right)


def agree(a, b):
    """Return whether two wrong answers have the same value. Here, notes count, too."""
    if isinstance(a, dict) and "note" in a:
        return a == b
    return same(a, b)


def agree_at(answer, other, i):
    """Return whether two wrong answers have the same i-th value."""
    return agree(seen(answer, i), seen(other, i))


def name_mistake(answer, i, mistakes):
    """Return the message of the known mistake that does what the answer has, or None.

    It must give the same i-th value, the first that is wrong. Of several, it is the one that agrees
    most often."""
    best, most = None, 0
    for message, its in mistakes:
        n = max(len(its["seen"]), len(answer["seen"])) + 1
        equal = [agree_at(answer, its, j) for j in range(n)]
        if i < n and equal[i] and sum(equal) > most:
            best, most = message, sum(equal)
    return best


def verdict(piece, answer, right, load_mistakes):
    """Return None if the answer is right, or what is wrong. `load_mistakes` is called if needed."""
    i = first_difference(answer, right)
    if i is None:
        return None
    if answer.get("wrong", "").startswith("not written yet"):
        return answer["wrong"]
    message = name_mistake(answer, i, load_mistakes())
    if message:
        return message
    if i < len(answer["seen"]):
        what, value = right[i]
        return difference(what, seen(answer, i), value)
    if "error" in answer:
        return error_message(answer["error"], piece)
    return answer.get("wrong", "it did not say what it did")


@functools.cache
def references(script, name, with_mistakes=False):
    """Return what the original does, and on demand what known mistakes do, from a clean process."""
    answer = ask("references", script, name, with_mistakes, seconds=120)
    if not answer.get("right"):
        raise RuntimeError(f"the original's {name} cannot be run: {answer}")
    return answer


def judge(script, name, source, file, seconds=SECONDS):
    """Return None if a student's piece is right, or what is wrong with it."""
    answer = ask("observe", script, name, source, file, seconds=seconds)
    right = references(script, name)["right"]

    def load_mistakes():
        return references(script, name, True)["mistakes"]

    return verdict(find_piece(script, name), answer, right, load_mistakes)
