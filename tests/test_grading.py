"""The exercises and the autograder: what is accepted, what is refused, and with which words.

Solutions are in graders/right_*.py, mistakes as students make them in graders/wrong_*.py."""

import csv
import functools
import json
import subprocess
import sys
import time

import exercise
import grade
import pytest
from graders import process, student
from graders.judge import judge, verdict
from graders.pieces import (
    PIECES,
    ROOT,
    SCRIPTS,
    find_piece,
    original_functions,
    parts_of,
    read_header,
    read_original,
)

GRADERS = ROOT / "tests" / "graders"
ALL_PIECES = [(script, piece.name) for script in SCRIPTS for piece in PIECES[script]]


@functools.cache
def references(script, name):
    return student.references(script, name, True)


def judge_here(script, name, source):
    """Judge without a process of its own: faster, where isolation is not what is tested."""
    answer = student.observe(script, name, source)
    known = references(script, name)
    return name_of(find_piece(script, name), answer, known)


def name_of(piece, answer, known):
    return verdict(piece, answer, known["right"], lambda: known["mistakes"])


def sections(kind):
    """Return pytest's parameters for all sections of the files KIND_*.py."""
    found = []
    for script in SCRIPTS:
        for i, section in enumerate(student.read_sections(GRADERS / f"{kind}_{script}.py")):
            found.append(pytest.param(script, *section, id=f"{script}-{section[0]}-{i}"))
    return found


# --- Verdicts -------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, name, words, source", sections("right"))
def test_a_correct_solution_in_its_own_style_passes(script, name, words, source):
    assert judge_here(script, name, source) is None


@pytest.mark.parametrize("script, name, words, source", sections("wrong"))
def test_a_mistake_of_a_student_is_named(script, name, words, source):
    message = judge_here(script, name, source)
    assert message and words in message, message


@pytest.mark.parametrize("script, name", ALL_PIECES)
def test_the_original_passes_and_each_known_mistake_does_not(script, name):
    assert judge_here(script, name, read_original(script)) is None
    known = references(script, name)
    ours = student.own_mistakes(script, name)
    for message, _ in ours:
        answers = [its for words, its in known["mistakes"] if words == message]
        piece = find_piece(script, name)
        names = [name_of(piece, its, known) for its in answers]
        assert None not in names, message
        assert message in names, names


def test_an_exception_is_shown_with_the_students_line_and_what_was_expected():
    source = (
        "class Head(nn.Module):\n    def forward(self, q, k, v):\n        return q / 0 @ undefined"
    )
    message = judge_here("char_gpt", "Head", source)
    assert "NameError in forward, line 3 of my_gpt.py: `return q / 0 @ undefined`" in message
    assert "Expected: Head()(q, k, v) returns a tensor of the shape of v" in message
    source = "def get_batch(tokens, batch_size, block_size, device):\n    return [tokens]"
    message = judge_here("char_gpt", "get_batch", source)
    assert "get_batch returned a list of 1: return two tensors x, y" in message


def test_what_no_known_mistake_does_is_described():
    message = judge_here("char_gpt", "FeedForward", TRIPLED)
    assert "result: every number is 3 times what it should be" in message


TRIPLED = """
class FeedForward(nn.Module):
    def __init__(self, n_embed, dropout):
        super().__init__()
        self.a, self.b = nn.Linear(n_embed, 4 * n_embed), nn.Linear(4 * n_embed, n_embed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(3 * self.b(F.relu(self.a(x))))
"""


# --- What a student's file cannot do --------------------------------------------------------------
WRONG_HEAD = """
class Head(nn.Module):
    def forward(self, q, k, v):
        {first}
        return v
"""
CHEATS = {
    "a patched judge": "import graders.judge as j; j.verdict = j.same = lambda *a: None",
    "patched comparisons": "torch.allclose = torch.equal = lambda *a, **k: True",
    "patched builtins": "import builtins; builtins.all = builtins.any = lambda x: True",
    "a patched json": "import json; json.dumps = lambda *a, **k: '{\"seen\": []}'",
    "exit": "import os; os._exit(0)",
    "sys.exit": "import sys; sys.exit(0)",
    "printed": "print('{\"seen\": []}', flush=True)",
    "interrupted": "raise KeyboardInterrupt",
    "a patched observe": "import graders.student as s; s.plain = lambda value: None",
    "a skipped grader": "import graders.student as s; s.watch_function = lambda *a: iter([])",
    "an import": "from char_gpt import Head as H; return H()(q, k, v)",
    "forked": "import os; os.fork() if hasattr(os, 'fork') else None",
}


@pytest.mark.parametrize("trick", CHEATS)
def test_a_trick_does_not_pass(trick):
    source = WRONG_HEAD.format(first=CHEATS[trick])
    assert judge("char_gpt", "Head", source, "my.py")
    outside = f"class Trick:\n    {CHEATS[trick]}\n" if "return" not in CHEATS[trick] else ""
    source = outside + WRONG_HEAD.format(first="Trick" if outside else "pass")
    assert judge("char_gpt", "Head", source, "my.py")


@pytest.mark.parametrize(
    "body, words",
    [
        ("while True: pass", "did not end within 2 s"),
        ("try:\n            while True: pass\n        except: pass", "did not end within 2 s"),
        ("import ctypes; ctypes.string_at(0)", "ended without an answer"),
        ("x = torch.ones(10**10)", "memory"),
    ],
)
def test_a_piece_that_hangs_crashes_or_is_greedy_is_stopped(body, words):
    if "memory" in words and sys.platform != "linux":
        pytest.skip("only Linux limits the memory of a process")
    start = time.monotonic()
    message = judge("char_gpt", "Head", WRONG_HEAD.format(first=body), "my.py", seconds=2)
    assert words in message
    assert time.monotonic() - start < 60


def test_what_one_piece_does_touches_no_other(tmp_path):
    source = read_original("char_gpt").replace("return weights @ v", "import os; os._exit(0)")
    source = source.replace(
        "warmup = max(1,", "torch.set_default_dtype(torch.float64)\n    warmup = max(1,"
    )
    path = tmp_path / "my_char_gpt.py"
    path.write_text(source, encoding="utf-8")
    verdicts = dict(grade.grade(path, ["Head", "get_lr", "MultiHead", "LM.forward"]))
    assert verdicts.pop("Head").startswith("its process ended without an answer")
    assert set(verdicts.values()) == {None}


# --- The exercise ---------------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_exercise_leaves_out_the_pieces_and_says_so(script):
    for piece in PIECES[script]:
        source, told = exercise.write_exercise(
            script, exercise.start_exercise(script), [piece.name]
        )
        assert not told
        assert read_header(source) == (script, [piece.name])
        message = judge_here(script, piece.name, source)
        assert message == f"not written yet: {parts_of(script, piece)[0]}"
        for line in piece.hints.split("\n"):
            assert line.strip() in source
    assert f'NAME = "my_{script}"' in source


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_function_of_the_lesson_is_in_a_piece(script):
    lesson = read_original(script).partition("The lesson ends here")[0]
    parts = {part for piece in PIECES[script] for part in parts_of(script, piece)}
    functions = {
        name for name in original_functions(script) if f"def {name.split('.')[-1]}(" in lesson
    }
    functions = {
        name for name in functions if original_functions(script)[name].lineno < lesson.count("\n")
    }
    assert functions - parts <= UNGRADED


# Short, or engineering: in the tests of the scripts.
UNGRADED = {
    "replacement",
    "LM.tie_weights",
    "load_tokens",
    "is_turned",
    "join_processes",
    "average",
}
UNGRADED |= {"bits_per_character", "for_generation", "Muon.__init__"}


def run(tmp_path, *arguments, status=0):
    """Run a script of tests/ as a student does; returns what it printed."""
    script, *arguments = arguments
    command = [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == status, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def test_the_loop_of_an_exercise_from_outside(tmp_path):
    text = run(tmp_path, "exercise.py", "char_gpt.py", "--list")
    assert "char_gpt.py, 3. Model\n    Head " in text
    text = run(tmp_path, "exercise.py", "char_gpt.py", "Heads", status=1)
    assert "no piece Heads. Did you mean Head?" in text
    assert "my_char_gpt.py: written" in run(
        tmp_path, "exercise.py", "char_gpt.py", "Head", "get_lr"
    )
    path = tmp_path / "my_char_gpt.py"
    stub = 'raise NotImplementedError("Head.forward: yours to write")'
    mine = "return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # é"
    path.write_text(path.read_text("utf-8").replace(stub, mine), encoding="utf-8")
    text = run(tmp_path, "exercise.py", "char_gpt.py", "Block", "Head")
    assert "my_char_gpt.py: changed" in text
    assert "Head.forward: you have changed it, so it stays as it is" in text
    source = path.read_text("utf-8")
    assert mine in source and "Block.forward: yours to write" in source
    assert read_header(source) == ("char_gpt", ["Head", "Block", "get_lr"])
    text = run(tmp_path, "grade.py", path, status=1)
    assert text.splitlines() == [
        "Head: passes",
        "Block: not written yet: Block.__init__",
        "get_lr: not written yet: get_lr",
    ]
    assert run(tmp_path, "grade.py", path, "Head") == "Head: passes\n"
    assert "Did you mean get_lr?" in run(tmp_path, "grade.py", path, "get_lrr", status=1)


def test_a_notebook_and_a_part_of_a_file_are_graded(tmp_path):
    cells = [
        "%matplotlib inline\n!pip list\nimport torch",
        "%%bash\nls",
        WRONG_HEAD.format(first="pass"),
    ]
    cells = [{"cell_type": "code", "source": cell.splitlines(True)} for cell in cells]
    cells.append({"cell_type": "markdown", "source": ["# text"]})
    path = tmp_path / "char_gpt_hand_in.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    ((name, message),) = grade.grade(path)
    assert name == "Head" and "result" in message
    part = tmp_path / "part.py"
    part.write_text("def get_lr(step, max_iters, peak):\n    return peak\n", encoding="utf-8")
    ((name, message),) = grade.grade(part)
    assert name == "get_lr" and message.startswith("the rate is constant")
    for content in ("def f(:", "x = 1"):
        part.write_text(content, encoding="utf-8")
        with pytest.raises(grade.CannotGrade, match=r"no Python|no piece"):
            list(grade.grade(part))


def test_a_folder_is_graded_into_a_table(tmp_path):
    for name, wide in (("ann", 4), ("bob", 2)):
        code = TRIPLED.replace("3 * ", "").replace("4", str(wide))
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    (tmp_path / "eve.py").write_text("def f(:", encoding="utf-8")
    files = sorted(tmp_path.glob("*.py"))
    run(tmp_path, "grade.py", "--csv", "marks.csv", *files, "FeedForward")
    with open(tmp_path / "marks.csv", encoding="utf-8-sig", newline="") as file:
        ann, bob, eve = csv.DictReader(file)
    assert (ann["points"], ann["FeedForward"]) == ("1", "passes")
    assert (bob["points"], bob["FeedForward"][:22]) == ("0", "the middle has 2 C num")
    assert (eve["points"], eve["of"]) == ("0", "1") and "no Python" in eve["message"]


def test_the_server_of_processes_starts_and_answers():
    process.start_server()
    answer = process.ask("observe", "char_gpt", "get_lr", read_original("char_gpt"), "my.py")
    assert len(answer["seen"]) == 3
