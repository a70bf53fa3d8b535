"""The three scripts stand alone, are documented, and are the same wherever nothing differs."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["char_gpt", "word_gpt", "gpt2"]

# What differs on purpose: {(first script, second script): {reason: definitions}}. A definition that
# is not named here is the same in both, to the letter, comments included.
INTENDED = {
    ("char_gpt", "word_gpt"): {
        "words, and those that are unknown": "Tokenizer Tokenizer.__init__ Tokenizer.encode "
        "Tokenizer.decode choose_prompt write_sample",
        "documents: they end, and <pad> fills what is missing": "split_text get_batch "
        "estimate_loss measure generate",
        "a large softmax stands where lm_head stands, and embeds": "LM LM.__init__ LM.forward",
        "cleaning and cutoffs belong to a run": "new_run load_run",
        "a verified download": "find_data",
        "documents, beams, a picture": "parse_flags prepare main",
    },
    ("char_gpt", "gpt2"): {
        "byte pairs, and a text that stays in a file": "Tokenizer Tokenizer.__init__ "
        "Tokenizer.encode Tokenizer.decode split_text name_text",
        "one fused function": "Head.forward",
        "biases on q, k, v; keys and values go through a cache": "MultiHead.__init__ "
        "MultiHead.forward Block.forward generate",
        "gelu": "FeedForward FeedForward.forward",
        "tied weights, GPT-2's start": "LM LM.__init__ LM.forward",
        "AdamW alone": "make_optimizers",
        "accumulation, several processes": "train_step train show_progress",
        "OpenAI's weights, and --init": "new_run list_runs",
        "a verified download": "find_data",
        "a sample while it is made: a character can have several tokens": "write_sample",
        "--init, processes, bits per character": "parse_flags prepare measure main",
    },
}


def source_of(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def definitions(script):
    """Return {name: source} of every function and class of a script; methods as Class.method.

    The source of a class is what it has outside its methods: its docstring and attributes."""
    source = source_of(script)
    lines = source.splitlines()

    def text(node):
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return "\n".join(lines[start - 1 : node.end_lineno])

    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text(node)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                found[f"{node.name}.{method.name}"] = text(method)
                found[node.name] = found[node.name].replace(text(method), "")
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_class_and_function_has_a_docstring(script):
    tree = ast.parse(source_of(script))
    assert ast.get_docstring(tree)
    tops = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in [*tops, *(m for top in tops if isinstance(top, ast.ClassDef) for m in top.body)]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name != "__init__":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_can_be_run_where_nothing_is_installed(script):
    """The PEP 723 block pins what the script imports, as requirements.txt does."""
    source = source_of(script)
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", source, flags=re.M)
    assert '# requires-python = ">=3.11"\n' in block
    pins = ast.literal_eval(re.search(r"^# dependencies = (\[.*\])$", block, flags=re.M)[1])
    assert set(pins) <= set((ROOT / "requirements.txt").read_text().split())
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert {pin.partition("==")[0] for pin in pins} == imported - sys.stdlib_module_names
    assert re.search(r"^# SPDX-License-Identifier: MIT$", source, flags=re.M)


@pytest.mark.parametrize("pair", INTENDED, ids="-".join)
def test_shared_definitions_are_the_same_to_the_letter(pair):
    first, second = map(definitions, pair)
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    intended = {name for names in INTENDED[pair].values() for name in names.split()}
    assert differing - intended == set(), "copies that drifted apart"
    assert intended - differing == set(), "listed as different, but they are the same"


def test_the_later_two_share_what_the_first_has_not():
    """The verified download."""
    second, third = map(definitions, SCRIPTS[1:])
    shared = ["find_data", "download", "fetch_rest", "can_pass"]
    assert [name for name in shared if second[name] != third[name]] == []


def test_only_what_belongs_there_lies_at_the_top():
    command = ["git", "ls-files", "--cached"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"README.md", "requirements.txt", "input.txt", "LICENSE", "tests"}
    assert {name for name in top if name[0] != "."} == allowed | {f"{s}.py" for s in SCRIPTS}


def test_nothing_is_left_to_be_filled_in():
    for name in ("README.md", "tests/RESULTS.md", *(f"{script}.py" for script in SCRIPTS)):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"TODO|FIXME|@[A-Z_]+@", text) == [], name
