"""The autograder: `python -m pytest tests/test_lessons.py --file my_gpt.py` grades all pieces.

With `-k Head`, it grades one piece. Without --file, the tests of the autograder itself run.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import exercise
import pytest
from lessons import ROOT, SCRIPTS, functions, judge, plant, read_original

LESSONS = {script: importlib.import_module(f"lessons_{script}") for script in SCRIPTS}
PIECES = {(script, piece.name): piece for script in LESSONS for piece in LESSONS[script].PIECES}
VERDICTS = {"right": [], "wrong": [], "not written yet": []}


# --- Grading --------------------------------------------------------------------------------------
def read_solution(path):
    """Return (script, source) of a student's file. UsageError: it cannot be graded."""
    try:
        source = path.read_text(encoding="utf-8-sig")
        ast.parse(source)
    except (OSError, SyntaxError, ValueError) as error:
        raise pytest.UsageError(f"cannot read {path} as Python in UTF-8: {error}") from error
    script = re.search(f'^NAME = "({"|".join(SCRIPTS)})"', source, re.MULTILINE)
    if not script:
        raise pytest.UsageError(f"{path} is no exercise: its NAME is none of {', '.join(SCRIPTS)}")
    return script[1], source


class Grading:
    """A plugin for --file: only the grading runs, -k with a piece's name means just that piece."""

    def __init__(self, only, error):
        self.only, self.error = f"-{only}", error

    def pytest_collection_modifyitems(self, items):
        if self.error:
            raise self.error
        items[:] = [item for item in items if item.originalname == "test_piece"]
        items[:] = [item for item in items if item.callspec.id.endswith(self.only)] or items

    def pytest_terminal_summary(self, terminalreporter):
        for verdict, names in VERDICTS.items():
            terminalreporter.write_line(f"{verdict:<16}{len(names):>3}  {', '.join(names)}")


def pytest_generate_tests(metafunc):
    """Give test_piece the pieces of the student's file, or those of our three originals."""
    if metafunc.function is test_piece:
        config, script, source, error = metafunc.config, None, None, None
        if file := config.getoption("--file"):
            try:
                script, source = read_solution(config.invocation_params.dir / file)
            except pytest.UsageError as problem:
                error = problem  # raised here, during a collection, it would be a traceback
            config.pluginmanager.register(Grading(config.option.keyword, error))
        cases = [(s, name, source or read_original(s)) for s, name in PIECES if script in (s, None)]
        metafunc.parametrize("script, name, source", cases, ids=["-".join(c[:2]) for c in cases])


def test_piece(script, name, source, pytestconfig):
    file = Path(pytestconfig.getoption("--file") or f"{script}.py").name
    message = judge(PIECES[script, name], script, source, file)
    kind = (message or "right").partition(":")[0]
    VERDICTS[kind if kind in VERDICTS else "wrong"].append(name)
    if message:
        pytest.fail(message, pytrace=False)


# --- Tests of the grader --------------------------------------------------------------------------
def each(kind):
    """Return pytest's parameters for MISTAKES or VARIANTS of all lessons."""
    cases = [(s, *case[:2], case[2:]) for s in LESSONS for case in getattr(LESSONS[s], kind)]
    return [pytest.param(*c, id=f"{c[0]}-{c[1]}-{i}") for i, c in enumerate(cases)]


@pytest.mark.parametrize("script, name, mistake, edit", each("MISTAKES"))
def test_a_planted_mistake_is_named(script, name, mistake, edit):
    message = judge(PIECES[script, name], script, plant(script, PIECES[script, name], *edit))
    assert message and message.startswith(f"{mistake}: "), message


@pytest.mark.parametrize("script, name, source, new", each("VARIANTS"))
def test_a_solution_in_another_way_is_accepted(script, name, source, new):
    piece = PIECES[script, name]  # a variant is (piece, source) or (piece, old, new)
    source = plant(script, piece, source, *new) if new else source
    written = {*piece.definitions.split()} & {*functions(ast.parse(source))}
    assert written and judge(piece, script, source, definitions=" ".join(written)) is None


@pytest.mark.parametrize("script, name", PIECES, ids=map("-".join, PIECES))
def test_an_exercise_keeps_all_but_the_bodies(script, name):
    piece = PIECES[script, name]
    written = exercise.write_exercise(script, [piece], [name])
    before, after = (functions(ast.parse(text)) for text in (read_original(script), written))
    changed = {d for d, node in after.items() if ast.unparse(node) != ast.unparse(before[d])}
    assert changed == {*piece.definitions.split()} and [*after] == [*before]
    assert all(ast.get_docstring(after[d]) == ast.get_docstring(before[d]) for d in changed)
    message = judge(piece, script, written)
    assert message.startswith("not written yet: ") and message.endswith(f": {piece.task}"), message


@pytest.mark.parametrize("script", LESSONS)
def test_every_function_of_the_lesson_is_in_a_piece(script):
    source = read_original(script)
    lesson = functions(ast.parse(source[source.index("# --- 2.") : source.index("# --- 6.")]))
    defined = [d for piece in LESSONS[script].PIECES for d in piece.definitions.split()]
    assert sorted(defined) == sorted({*lesson} - {"Replacements.__init__"})


def test_a_broken_piece_does_not_fail_another(monkeypatch):
    head, plan = PIECES["char_gpt", "Head"], ("char_gpt", PIECES["char_gpt", "Head"])
    source = plant(*plan, "return weights @ v", "return 1 / 0")
    place = f"Head.forward, line {source[: source.index('1 / 0')].count(chr(10)) + 1} of my_gpt.py"
    names = ("MultiHead", "FeedForward", "LM.forward", "generate")
    assert f"error: ZeroDivisionError in {place}: " in judge(head, "char_gpt", source)
    assert not any(judge(PIECES["char_gpt", name], "char_gpt", source) for name in names)
    monkeypatch.setattr("lessons.SECONDS", 1)
    source = plant(*plan, "return weights @ v", "while True: pass")
    assert "TimeoutError in Head.forward" in judge(head, "char_gpt", source)


def test_the_loop_of_an_exercise_from_outside(tmp_path):
    def run(*arguments):
        command, env = [sys.executable, *map(str, arguments)], os.environ | {"PYTHONUTF8": "1"}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout

    text = run(ROOT / "tests/exercise.py", "char_gpt.py", "Head", "LM", "FeedForward")
    stubs = re.findall(r"raise NotImplementedError\(\n(?: +\".*\"\n)+ +\)", text)
    assert len(stubs) == 5
    text = text.replace(stubs[0], "return (q @ k.mT / 2).tril().softmax(-1) @ v")
    (tmp_path / "my_gpt.py").write_text(text, encoding="utf-8")
    grade = ["-m", "pytest", ROOT / "tests/test_lessons.py", "--file", "my_gpt.py"]
    text = run(*grade, "-k", "Head or FeedForward")
    for line in ("right             1  MultiHead", "wrong             1  Head",
                 "not written yet   1  FeedForward"):  # fmt: skip
        assert line in text.splitlines(), text
    assert "mask of 0 instead of -inf: " in text and "Traceback" not in text, text


@pytest.mark.parametrize("content", [None, b"def f(:", b"NAME = 1", "NAME".encode("utf-16")])
def test_a_file_that_cannot_be_graded(content, tmp_path):
    if content is not None:
        (tmp_path / "my.py").write_bytes(content)
    with pytest.raises(pytest.UsageError, match=r"cannot read .*my.py|NAME is none of char_gpt"):
        read_solution(tmp_path / "my.py")


def test_the_list_of_pieces_and_an_unknown_name(capsys):
    for script in SCRIPTS:
        exercise.main([f"{script}.py"])
        rows = capsys.readouterr().out.splitlines()
        assert [row.split()[0] for row in rows] == [p.name for p in LESSONS[script].PIECES]
    with pytest.raises(SystemExit, match="no piece Tail: Tokenizer, split_text"):
        exercise.main(["char_gpt.py", "Head", "Tail"])
    with pytest.raises(SystemExit, match="usage: "):
        exercise.main(["other.py"])
