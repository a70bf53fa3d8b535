"""The autograder: `python -m pytest tests/test_lessons.py --file my_gpt.py` grades all pieces.

With `-k Head`, it grades one. Without --file, the tests of the autograder itself run."""

import ast
import importlib
import re
import subprocess
import sys

import exercise
import pytest
from lessons import ROOT, SCRIPTS, functions, judge, parse, plant, read_original

LESSONS = {script: importlib.import_module(f"lessons_{script}") for script in SCRIPTS}
PIECES = {(script, piece.name): piece for script in LESSONS for piece in LESSONS[script].PIECES}


def read_solution(path):
    """Return (script, source) of a student's file, or ("", why it cannot be graded)."""
    try:
        source = path.read_text(encoding="utf-8-sig")
        parse(source)
    except (OSError, SyntaxError, ValueError) as error:
        return "", f"cannot read {path} as Python in UTF-8: {error}"
    name = re.search(r'^NAME = "(\w+)"', source, re.MULTILINE)
    if not name or name[1] not in SCRIPTS:
        return "", f"{path} is no exercise: its NAME is none of {', '.join(SCRIPTS)}"
    return name[1], source


def pytest_generate_tests(metafunc):
    """Give test_piece the pieces of the student's file, or those of our three originals."""
    if metafunc.function is test_piece:
        option, script, source = metafunc.config.option, None, None
        if option.file:
            script, source = read_solution(metafunc.config.invocation_params.dir / option.file)
        cases = [(s, name, source or read_original(s)) for s, name in PIECES if script in (s, None)]
        if option.file:  # only the grading runs; -k with a piece's name means just that piece
            only = option.keyword if script else ""
            cases = [case for case in cases if case[1] == only] or cases or [("", "file", source)]
            option.keyword = f"test_piece and ({only or 'test_piece'})"
        metafunc.parametrize("script, name, source", cases, ids=["-".join(c[:2]) for c in cases])


def test_piece(script, name, source, pytestconfig):
    piece, file = PIECES.get((script, name)), pytestconfig.option.file or f"{script}.py"
    if message := judge(piece, script, source, file) if piece else source:
        pytest.fail(message, pytrace=False)


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
    written = {*piece.definitions.split()} & {*functions(parse(source))}
    assert written and judge(piece, script, source, definitions=" ".join(written)) is None


@pytest.mark.parametrize("script", LESSONS)
def test_an_exercise_leaves_out_the_bodies_of_the_lesson(script):
    source, pieces = read_original(script), LESSONS[script].PIECES
    written = exercise.write_exercise(script, pieces, [piece.name for piece in pieces])
    lesson = source[source.index("# --- 2.") : source.index("# --- 6.")]
    lesson, before, after = (functions(ast.parse(text)) for text in (lesson, source, written))
    changed = [d for d in before if ast.unparse(after[d]) != ast.unparse(before[d])]
    assert {*changed} == {*lesson} - getattr(LESSONS[script], "UNGRADED", {"Replacements.__init__"})
    assert sorted(changed) == sorted(d for p in pieces for d in p.definitions.split())
    assert all(ast.get_docstring(after[d]) == ast.get_docstring(before[d]) for d in changed)
    for piece in pieces:
        message = judge(piece, script, written)
        assert re.match(f"not written yet: .*: {re.escape(piece.task)}", message), message


def test_a_broken_piece_does_not_fail_another(monkeypatch):
    head, broken = PIECES["char_gpt", "Head"], "return 1 / 0"
    source = plant("char_gpt", head, "return weights @ v", broken)
    place = f"Head.forward, line {source.partition(broken)[0].count(chr(10)) + 1} of my_gpt.py"
    assert f"error: ZeroDivisionError in {place}: " in judge(head, "char_gpt", source)
    for name in ("MultiHead", "FeedForward", "LM.forward", "generate"):
        assert judge(PIECES["char_gpt", name], "char_gpt", source) is None
    monkeypatch.setattr("lessons.SECONDS", 1)
    message = judge(head, "char_gpt", source.replace(broken, "while True: pass"))
    assert "TimeoutError in Head.forward" in message


def test_the_loop_of_an_exercise_from_outside(tmp_path):
    def run(*arguments):
        command, how = [sys.executable, *arguments], dict(encoding="utf-8", stdout=subprocess.PIPE)
        return subprocess.run(command, cwd=tmp_path, **how).stdout

    text = run(ROOT / "tests/exercise.py", "char_gpt.py", "Head", "LM", "FeedForward")
    stubs = re.findall(r"raise NotImplementedError\(\n.*\n +\)", text)
    assert len(stubs) == 5
    text = text.replace(stubs[0], "return (q @ k.mT / 2).tril().softmax(-1) @ v")
    (tmp_path / "my_gpt.py").write_text(text, encoding="utf-8")
    grade = ["-m", "pytest", ROOT / "tests/test_lessons.py", "--file", "my_gpt.py"]
    text = run(*grade, "-k", "Head or FeedForward")
    assert "mask of 0 instead of -inf: " in text and "Traceback" not in text, text
    assert "not written yet: FeedForward.__init__: two layers" in text, text
    assert "2 failed, 1 passed" in text and "1 passed" in run(*grade, "-k", "MultiHead"), text


def test_what_cannot_be_graded_or_written(tmp_path, capsys):
    path = tmp_path / "my.py"
    for content in (b"def f(:", b"NAME = 1", "NAME".encode("utf-16")):
        path.write_bytes(content)
        assert re.search("cannot read .*my.py|NAME is none of", read_solution(path)[1])
    exercise.main(["char_gpt.py"])
    assert capsys.readouterr().out.startswith("Tokenizer                   7 lines   vocabulary, ")
    with pytest.raises(SystemExit, match="no piece Tail: Tokenizer, split_text"):
        exercise.main(["char_gpt.py", "Head", "Tail"])
