"""Faults, tried for real: what goes wrong, where, and what the user has afterwards.

SOAK=200 python -m pytest tests/test_faults.py -k soak   # seeds are in the tests' names
"""

import io
import os
import random
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    OTHER,
    TEXT,
    Killed,
    assert_one_line_error,
    assert_same,
    load_fresh,
    run_child,
    run_script,
)

CPU = torch.device("cpu")
SOAK = int(os.environ.get("SOAK", "3"))


# --- what a run leaves when it is interrupted -----------------------------------------------------


def sends(signal_name, where, call):
    """Return code for a script: it sends itself a signal in front of a function's n-th call.

    The function is one of the script, or of a module: "torch.save"."""
    return f"""
def send_a_signal(owner, name):
    original, calls = owner[name], []
    def wrapper(*args, **more):
        calls.append(name)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.{signal_name})
        return original(*args, **more)
    owner[name] = wrapper
import signal
module, _, name = {where!r}.rpartition(".")
send_a_signal(vars(globals()[module]) if module else globals(), name)
"""


# A run of 9 steps evaluates at 0, 3, 6 and 9: two losses and a sample each. It saves at 3, 6 and 9,
# and with its exact loss after training. Each save writes a run and a picture.
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("find_data", 1), ("split_text", 1), ("generate", 1), ("train_step", 2),
        ("estimate_loss", 1), ("estimate_loss", 3), ("take_number", 1), ("torch.save", 1),
    ],
)  # fmt: skip
def test_ctrl_c_before_the_first_save(script, where, call):
    """One line, exit status 130, and nothing is written."""
    before = an_earlier_run(script)
    done = script.child(insert=sends("SIGINT", where, call))
    assert_one_line_error(done, "interrupted", status=130)
    assert script.files() == before


@pytest.mark.parametrize(
    ("where", "call", "saved"),
    [
        ("train_step", 4, 3), ("train_step", 9, 6), ("estimate_loss", 5, 3), ("generate", 3, 3),
        ("torch.save", 2, 3), ("os.replace", 3, 3), ("draw_run", 1, 3), ("draw_run", 2, 6),
        ("torch.save", 3, 6),
    ],
)  # fmt: skip
def test_ctrl_c_later(script, where, call, saved):
    """The run goes back to its last save: exact loss and sample of that, exit status 0."""
    done = script.child(insert=sends("SIGINT", where, call))
    assert (done.returncode, done.stderr) == (0, "")
    run = script.run(1)
    assert run["step"] == saved and max(run["history"]) == saved
    assert f"{run['val_loss']:.4f}" in done.stdout
    rest = done.stdout.partition("stopped at step ")[2]
    assert int(rest.split(":")[0]) >= saved and script.path(1) in rest
    text = script.main("--sample", "--seed", str(script.gpt.SEED))["text"]
    assert getattr(script.gpt, "printable", str)(text) in rest
    end_as_if_nothing_had_happened(script)


@pytest.mark.parametrize(
    ("where", "call"),
    [("load_run", 1), ("estimate_loss", 9), ("torch.save", 4), ("draw_run", 4), ("generate", 5)],
)
def test_ctrl_c_after_training(script, where, call):
    done = script.child(insert=sends("SIGINT", where, call))
    assert_one_line_error(done, "interrupted", status=130)
    assert_same(unbroken(script), script.run(1))


def test_ctrl_c_in_a_run_that_was_resumed(script):
    script.main_killed_at(5)
    done = script.child("--resume", insert=sends("SIGINT", "train_step", 2))
    assert (done.returncode, done.stderr) == (0, "")
    assert script.run(1)["step"] == 3 and script.run(1)["val_loss"] is not None
    done = script.child("--resume", insert=sends("SIGINT", "split_text", 1))
    assert_one_line_error(done, "interrupted", status=130)
    end_as_if_nothing_had_happened(script)


def test_ctrl_c_in_a_call_of_main(script):
    """As in a notebook: before the first save, it is a KeyboardInterrupt like any other."""

    def stop(*args):
        raise KeyboardInterrupt

    train_step = script.gpt.train_step
    with pytest.raises(KeyboardInterrupt):
        script.main(train_step=stop)
    assert script.files() == {}
    script.main_killed_at(5, train_step=train_step)
    results = script.main("--resume", train_step=stop)
    assert results["steps"] == 3 and results["text"].startswith("the ")


@pytest.mark.parametrize(
    ("signal_name", "where", "call"),
    [
        *[(name, "train_step", 5) for name in ("SIGTERM", "SIGHUP", "SIGKILL")],
        ("SIGTERM", "estimate_loss", 5), ("SIGHUP", "split_text", 1), ("SIGKILL", "take_number", 1),
        *[("SIGKILL", "torch.save", call) for call in (1, 2, 4)],
        *[("SIGKILL", "os.replace", call) for call in (1, 2, 3, 7, 8)],
        ("SIGKILL", "draw_run", 1), ("SIGKILL", "generate", 5),
    ],
)  # fmt: skip
def test_killed(script, signal_name, where, call):
    """The file has the last evaluation, an earlier run is untouched, and the end is the same."""
    before = an_earlier_run(script)
    done = script.child(insert=sends(signal_name, where, call))
    assert (done.returncode, done.stderr) == (-getattr(signal, signal_name), "")
    end_as_if_nothing_had_happened(script)
    assert {name: script.files()[name] for name in before} == before


def end_as_if_nothing_had_happened(script):
    """What a user does after a kill: resume, or start again. It ends like an unbroken run."""
    if not is_saved(script) or script.run()["step"] < 9:
        script.main(*["--resume"] * is_saved(script))
        assert not [name for name in script.files() if name.endswith(".part")]
    assert_same(unbroken(script), script.run())


def is_saved(script):
    """Return whether the newest run is one that the test has begun, not the earlier one."""
    names = [name for name, content in script.files().items() if name.endswith(".pt") and content]
    return names != [] and script.run()["seed"] != EARLIER_SEED


def unbroken(script, kept={}):  # noqa: B006
    """Return what the file has at the end of a run that nothing has disturbed."""
    if script.name not in kept:
        kept[script.name] = run_elsewhere(script)[0]
    return kept[script.name]


EARLIER_SEED = 5


def an_earlier_run(script, kept={}):  # noqa: B006
    """Let the files of a finished run lie in the folder. Return them."""
    if script.name not in kept:
        kept[script.name] = run_elsewhere(script, "--seed", str(EARLIER_SEED))[1]
    for name, content in kept[script.name].items():
        Path(name).write_bytes(content)
    return kept[script.name]


def run_elsewhere(script, *flags):
    """Train in another folder. Return the run, and its files."""
    here = script.folder.name
    script.go_to("elsewhere")
    script.main(*flags)
    run, files = script.run(), script.files()
    script.go_to(here)
    return run, files


def test_a_kill_at_any_moment_of_a_save_loses_nothing(script):
    """What lies on the disk before and after each create, write, rename and remove."""
    first = an_earlier_run(script)
    moments = []

    def look():
        files = script.files()
        if files not in moments:
            moments.append(files)

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*args, **more):
            look()
            result = original(*args, **more)
            look()
            return result

        patch.setattr(owner, name, watched)

    def save_slowly(run, path, save=torch.save):
        save(run, path)
        whole = Path(path).read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            Path(path).write_bytes(whole[:size])
            look()
        Path(path).write_bytes(whole)

    with script.patch.context() as patch:
        patch.setattr(torch, "save", save_slowly)
        for owner, name in ((torch, "save"), (Path, "touch"), (os, "replace"), (os, "unlink")):
            watch(owner, name)
        script.main()
    look()
    name = script.path(2)
    assert {name} < set.union(*map(set, moments)) and len(moments) > 20
    expected, resumed = unbroken(script), []
    for files in moments:
        assert {path: files[path] for path in first} == first
        content = files.get(name)
        if content in resumed:
            continue
        resumed.append(content)
        for path in script.folder.iterdir():
            path.unlink()
        for path in files:
            Path(path).write_bytes(files[path])
        script.gpt.main(["--runs"])
        script.main("--sample")
        if not content:
            assert script.gpt.saved_runs() == [Path(script.path(1))]
            continue
        if script.run(2)["step"] < 9:
            script.main("--resume")
        assert_same(expected, script.run(2))
    assert resumed[:2] == [None, b""] and len(resumed) == 6  # saved at 3, 6, 9, and at the end


@pytest.mark.parametrize("share", [0.1, 0.6, 0.999])
def test_killed_in_the_middle_of_a_write(script, share):
    """The kernel kills it when the new file has this share of its size."""
    script.main_killed_at(5)
    before = script.files()[script.path(1)]
    limit = int(len(before) * share)
    insert = f"""
import resource, signal
def train_step(*args, train_step=train_step):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    return train_step(*args)
"""
    assert script.child("--resume", insert=insert).returncode == -signal.SIGXFSZ
    (part,) = [name for name in script.files() if name.endswith(".part")]
    assert part.startswith(script.path(1)) and len(script.files()[part]) <= limit
    assert script.files()[script.path(1)] == before
    end_as_if_nothing_had_happened(script)


def test_leftovers_of_killed_processes_are_removed(script):
    """Those of a process that is alive are not: it is writing them. Nor are other files."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f"{script.path(1)}.{os.getppid()}.part", "notes.part", f"{script.name}.txt"]
    left = [f"{script.path(2)}.{dead.pid}.part", f"{script.name}-7.png.{dead.pid}.part"]
    for name in kept + left:
        Path(name).write_bytes(b"half")
    script.main("--max-iters", "1")
    names = {path.name for path in script.folder.iterdir()}
    assert names >= {*kept} and not [name for name in names if str(dead.pid) in name]


# --- several processes ----------------------------------------------------------------------------
# Two processes meet: each goes on when the other has come here, too.
MEET = """
def meet(place):
    Path(f"{place}-{os.getpid()}").touch()
    while len([*Path().glob(f"{place}-*")]) < 2:
        time.sleep(0.01)
"""


def test_two_runs_at_once_get_two_numbers(script):
    """Both have looked for the highest number before one of them takes the next."""
    insert = """
def find_runs(find_runs=find_runs):
    found = find_runs()
    meet("looked")
    return found
"""
    path = script.copy(MEET + insert)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(run_child, path, *script.flags, "--seed", seed) for seed in "12"]
    for future in both:
        done = future.result()
        assert (done.returncode, done.stderr) == (0, "")
        assert (script.path(1) in done.stdout) != (script.path(2) in done.stdout)
    assert {script.run(number)["seed"] for number in (1, 2)} == {1, 2}
    assert {script.run(number)["step"] for number in (1, 2)} == {9}
    assert len([*Path().glob("*.pt")]) == 2 and not [*Path().glob("*.part")]


def test_a_run_that_is_resumed_twice_at_once_mixes_nothing(script):
    script.main_killed_at(5)
    insert = """
def write_file(path, write, write_file=write_file, count=[]):
    def together(part):
        write(part)
        count.append(part)
        meet(f"written-{len(count)}")  # both files are whole, and none has its name yet
    write_file(path, together)
"""
    path = script.copy(MEET + insert)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(run_child, path, *script.flags, "--resume") for _ in range(2)]
    for future in both:
        assert (future.result().returncode, future.result().stderr) == (0, "")
    assert_same(unbroken(script), script.run(1))
    assert len([*Path().glob("*.pt")]) == 1 and not [*Path().glob("*.part")]


# --- a disk, a folder or memory that gives no more ------------------------------------------------


@pytest.mark.parametrize("missing", ["1", "30", "300", "size // 2"])
def test_a_full_disk(script, missing):
    """So many bytes of the file do not fit. An earlier run, or the last save, is untouched."""
    insert = f"""
import resource
def limited(run, path, save=torch.save):
    save(run, path)
    size = os.path.getsize(path)
    os.remove(path)
    limit = size - {missing}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(run, path)
torch.save = limited
"""
    script.main_killed_at(5)
    before = script.files()
    for flags in ([], ["--resume"]):
        done = script.child(*flags, insert=insert)
        assert_one_line_error(done, "cannot write", "full disk", script.path(1 if flags else 2))
        assert script.files() == before


@pytest.mark.parametrize(
    ("function", "names"),
    [("Path.touch", ["cannot write", "-2.pt"]), ("os.replace", ["cannot write"])],
)
def test_a_folder_that_cannot_be_written(script, function, names):
    """Nobody may create a file, or (as on Windows, while another program reads it) replace it."""
    before = an_earlier_run(script)
    insert = f"""
def refuse(*args, **more):
    raise PermissionError(13, "Permission denied")
{function} = refuse
"""
    assert_one_line_error(script.child(insert=insert), *names, "Permission denied")
    assert script.files() == before


def test_a_read_only_folder_is_refused_before_anything_is_done(script):
    """Root may write everywhere: then the system's answer is replaced."""
    insert = "os.access = lambda path, mode: path != '.'\n" if os.geteuid() == 0 else ""
    os.chmod(script.folder, 0o755)
    path = script.copy(insert + "def prepare(*args):\n    print('it has begun')\n")
    os.chmod(script.folder, 0o555)
    try:
        done = run_child(path, *script.flags)
    finally:
        os.chmod(script.folder, 0o755)
    assert_one_line_error(done, "cannot write into this folder")
    assert "begun" not in done.stdout


def test_the_folder_is_removed(script):
    insert = """
import shutil
def get_lr(step, *more):
    if step == 4:
        shutil.rmtree(os.getcwd())
    return 0.01
"""
    assert_one_line_error(script.child(insert=insert), "cannot write", script.path(1))


def test_a_picture_that_cannot_be_written(script, capsys):
    """One line, and the run goes on; the next save tries again."""
    expected = unbroken(script)
    picture = Path(f"{script.name}-1.png")
    picture.mkdir()
    get_lr = script.gpt.get_lr

    def later_it_can(step, *more):
        if step == 4:
            picture.rmdir()
        return get_lr(step, *more)

    script.main(get_lr=later_it_can)
    lines = [line for line in capsys.readouterr().out.splitlines() if "no picture" in line]
    assert len(lines) == 1 and "-1.p" in lines[0]
    assert picture.is_file()
    assert_same(expected, script.run(1))


def test_a_plot_that_fails_costs_one_line(script):
    """Whatever it fails on: here, a matplotlib that is broken."""
    insert = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
"""
    done = script.child(insert=insert)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("no picture") >= 4  # one for each save
    assert_same(unbroken(script), script.run(1))


LIMITED = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
"""


@pytest.mark.parametrize(
    ("insert", "constants"),
    [
        (LIMITED, {"N_EMBED": 8192}),
        ("def train_step(*a): raise torch.OutOfMemoryError('CUDA out of memory.')", {}),
        ("def train_step(*a): raise MemoryError()", {}),
    ],
    ids=["address space", "of a GPU", "of Python"],
)
def test_out_of_memory(script, insert, constants):
    before = an_earlier_run(script)
    done = script.child(insert=insert, **constants)
    assert_one_line_error(done, "out of memory", "BATCH_SIZE")
    assert script.files() == before


# --- what a user gives wrongly --------------------------------------------------------------------
LINE = TEXT.encode() * 300
NOT_UTF8 = {
    "binary": random.Random(1).randbytes(9999),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16 without a mark": TEXT.encode("utf-16-le"),
    "UTF-32": TEXT.encode("utf-32"),
    "Latin-1": "café ".encode("latin-1") * 99,
    "cp1252": "“quoted” – ".encode("cp1252") * 99,
    "zeros": b"\0" * 999,
}


def test_a_text_that_is_not_utf8(script):
    for kind, content in NOT_UTF8.items():
        Path(f"{kind}.txt").write_bytes(content)
        with pytest.raises(script.gpt.UserError, match=rf"{kind}\.txt.*UTF-8"):
            script.main("--data", f"{kind}.txt")
    assert_one_line_error(script.child("--data", "binary.txt"), "binary.txt", "UTF-8")
    assert script.files() == {}


def test_one_wrong_byte_is_named_with_its_place(script, tmp_path):
    path = Path(script.write_data(tmp_path, TEXT)[1])
    text = path.read_bytes()
    path.write_bytes(text[:1234] + b"\xe9" + text[1234:])
    assert_one_line_error(script.child(), "tiny.txt", "UTF-8", "1,234")


@pytest.mark.parametrize("content", ["", "a", "the cat and "])
def test_a_text_that_is_too_short(script, content):
    Path("given.txt").write_text(content)
    with pytest.raises(script.gpt.UserError, match=r"is empty|tokens: few|10 paragraphs"):
        script.main("--data", "given.txt")


def test_texts_that_are_unusual(script, tmp_path):
    """With the mark of Windows, its line ends, or the character that stands for an unknown one."""
    flags = script.write_data(tmp_path, TEXT)
    text = Path(flags[1]).read_bytes()
    script.set(MAX_ITERS=1)
    for content in (
        b"\xef\xbb\xbf" + text,
        text.replace(b"\n", b"\r\n"),
        text.replace(b"cat", "c\ufffdt".encode()),
    ):
        Path(flags[1]).write_bytes(content)
        assert script.main()["steps"] == 1
    assert "\ufeff" not in "".join(script.run(1)["vocabulary"])


def test_a_text_of_one_long_line(script, capsys):
    """It becomes no prompt of 700,000 characters."""
    Path("given.txt").write_bytes(LINE)
    if script.name == "word_gpt":
        with pytest.raises(script.gpt.UserError, match="empty lines"):
            script.gpt.main(["--data", "given.txt"])
        return
    text = script.gpt.main(["--data", "given.txt", "--max-iters", "1"])["text"]
    assert len(text) < 200
    if script.name == "char_gpt":
        text = script.main("--data", "given.txt", "--max-iters", "1", PROMPT="ROMEO")["text"]
        assert len(text) < 100 and TEXT.startswith(text[:10])
    assert len(capsys.readouterr().out) < 3000


# Where it is wrong, flags, words of the one line on stderr, exit status
WRONG_FLAGS = [
    ("--data missing.txt", ["missing.txt", "--data"], 1),
    ("--data .", ["."], 1),
    ("--data /dev/null", ["/dev/null", "--data"], 1),
    (f"--data {'x' * 300}", ["xxx", "--data"], 1),
    ("--prompt ''", ["prompt has no token"], 1),
    ("--prompt -a", ["--prompt"], 2),
    ("--device cuda:77", ["cuda:77"], 1),
    ("--device toaster", ["toaster"], 1),
    ("--max-iters 0", ["--max-iters"], 1),
    ("--max-iters -5", ["--max-iters"], 1),
    ("--max-iters nan", ["nan"], 2),
    ("--seed inf", ["inf"], 2),
    ("--seed -1", ["-1", "2**32 - 1"], 1),
    ("--seed 4294967296", ["4294967296", "2**32 - 1"], 1),
    (f"--seed {10**30}", [f"{10**30}", "2**32 - 1"], 1),
    (f"--resume --seed {2**32}", [f"{2**32}", "2**32 - 1"], 1),
    (f"--sample --seed {10**30}", [f"{10**30}", "2**32 - 1"], 1),
    ("--nonsense", ["--nonsense"], 2),
    ("--sample --resume", ["--resume"], 2),
    ("--run missing.pt", ["--run"], 2),
    ("--run missing.pt --sample", ["missing.pt"], 1),
    ("--run missing.pt --resume", ["missing.pt"], 1),
    ("--run . --resume", ["."], 1),
]


def test_wrong_flags(script, capsys):
    script.main_killed_at(5)
    before = script.files()
    for flags, words, status in WRONG_FLAGS:
        capsys.readouterr()
        with pytest.raises((script.gpt.UserError, SystemExit)) as error:
            script.main(*shlex.split(flags))
        line = str(error.value)
        if status == 2:  # argparse prints it, and ends the script
            assert error.value.code == 2, flags
            line = capsys.readouterr().err.splitlines()[-1]
        assert all(word in line for word in words) and "\n" not in line, (flags, line)
        assert script.files() == before, flags
    assert_one_line_error(script.child("--max-iters", "0"), "--max-iters")
    assert_one_line_error(script.child("--max-iters", "x"), "--max-iters", status=2)


@pytest.mark.parametrize("flag", ["--resume", "--sample", "--runs"])
def test_a_folder_without_a_run(script, flag):
    """A file of the former version, or of another script, is none."""
    Path(f"{script.name}.pt").write_bytes(b"of the former version")
    Path("another-1.pt").write_bytes(b"of another script")
    insert = "def download(url, path, digest): raise UserError(f'put {url} there by hand')"
    done = script.child(flag, insert=insert)
    if (script.name, flag) == ("gpt2", "--sample"):  # it takes OpenAI's weights, and says so
        assert "no run here" in done.stdout
        assert_one_line_error(done, "by hand")
    else:
        assert_one_line_error(done, f"no run here: python {script.name}.py first")


def test_prompts(script):
    """Characters that are not in the vocabulary, half a character, and a very long prompt."""
    script.main()
    check = script.gpt.UserError
    strange = ["a→😀", "a\udce9"]
    if script.name == "char_gpt":
        for prompt, words in zip(strange, ("'→', '😀'", "udce9"), strict=True):
            with pytest.raises(check, match=words):
                script.main("--sample", "--prompt", prompt)
        assert_one_line_error(script.child("--prompt", "a→😀"), "'→', '😀'", "tiny.txt")
    elif script.name == "word_gpt":
        with pytest.raises(check, match="no token"):
            script.main("--sample", "--prompt", "😀")
    else:
        for prompt in strange:
            script.main("--sample", "--prompt", prompt)
    text = script.main("--sample", "--prompt", "the cat " * 12_500)["text"]
    assert len(text) > 99_000


def test_new_characters_are_said_to_be_unknown_to_the_earlier_text(tmp_path, script):
    """They are in the text that --data names; it is the earlier one that lacks them."""
    if script.name != "char_gpt":
        pytest.skip("it knows other characters as well")
    script.main()
    Path("new.txt").write_text(TEXT + " é→", encoding="utf-8")
    done = script.child("--resume", "--max-iters", "12", "--data", "new.txt")
    assert_one_line_error(done, "new.txt", "'é', '→'", "tiny.txt")


def test_a_name_with_a_folder(script):
    """Refused before anything is read: the second run would die at its first save."""
    insert = "def find_data(path): raise RuntimeError('it reads')"
    assert_one_line_error(script.child(insert=insert, NAME="runs/a"), "NAME", "runs/a")


def test_constants_that_would_fail_late(script):
    def late(*args):
        raise RuntimeError("training has begun")

    script.set(train_step=late)
    wrong = [("N_EMBED", 15), ("EVAL_INTERVAL", 0), ("SEED", -1), ("SEED", 2**32)]
    edited = [{name: value} for name, value in wrong]
    if script.name == "char_gpt":
        edited.append({"BLOCK_SIZE": 2**20})
    if script.name == "gpt2":
        edited.append(dict.fromkeys(("BLOCK_SIZE", "WINDOW", "TOKENS_PER_STEP"), 2**20))
    for edits in edited:
        with script.patch.context() as patch:
            for name, value in edits.items():
                patch.setattr(script.gpt, name, value)
            with pytest.raises(script.gpt.UserError, match="|".join(edits)):
                script.main()
    assert script.files() == {}


def test_a_loss_that_is_not_finite(script):
    insert = "def get_lr(step, *more): return 0.01 if step < 4 else 1e30"
    done = script.child(insert=insert, GRADIENT_CLIP=None)
    assert_one_line_error(done, "not finite", "rate")
    assert script.run(1)["step"] == 3  # what was saved is kept
    script.main("--sample")


def test_a_batch_of_a_text_as_long_as_the_window(script):
    if script.name == "word_gpt":
        pytest.skip("its windows are those of documents")
    tokens = torch.arange(8)
    with pytest.raises(script.gpt.UserError, match="8 tokens"):
        script.gpt.get_batch(tokens, 1, 8, CPU)
    x, y = script.gpt.get_batch(tokens, 1, 7, CPU)
    assert x.tolist() == [[0, 1, 2, 3, 4, 5, 6]] and y.tolist() == [[1, 2, 3, 4, 5, 6, 7]]


# --- files that are no runs -----------------------------------------------------------------------


class Hostile:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


FORMER = {"name": "{}", "config": {}, "vocabulary": "ab", "weights": {}, "history": {}}


def test_a_file_that_is_no_run_of_this_script(script):
    an_earlier_run(script)
    run = script.run()
    whole = Path(script.path(1)).read_bytes()
    contents = {
        "of another script": run | {"script": "other"},
        "of the former version": FORMER | {"name": script.name, "config": run["config"]},
        "cut off": whole[: len(whole) // 2],
        "a byte less": whole[:-1],
        "empty": b"",
        "hello": b"hello",
        "hostile": Hostile(),
        "hostile within": run | {"seed": Hostile()},
        "a list": [1, 2],
        "of another model": run | {"config": run["config"] | {"n_embed": 32}},
        "without its weights": {key: run[key] for key in run if key != "best"},
    }
    for kind, content in contents.items():
        path = Path(f"{kind}.pt")
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = script.files()
        for flag in ("--sample", "--resume"):
            with pytest.raises(script.gpt.UserError, match="does not fit this script") as error:
                script.main(flag, "--run", path.name)
            line = str(error.value)
            assert path.name in line and "\n" not in line and len(line) < 400, kind
            assert "trust" not in line and "weights_only=False" not in line  # no advice to run it
        assert script.files() == before, kind
    for kind in ("hostile", "of the former version"):
        done = script.child("--sample", "--run", f"{kind}.pt")
        assert_one_line_error(done, f"{kind}.pt", "damaged")
    for kind in ("hello", "hostile", "of another script", "cut off", "a list"):
        Path(f"{kind}.pt").rename(script.path(2))
        script.gpt.main(["--runs"])  # goes on
    assert not Path("owned").exists()


# --- code that a student has edited ---------------------------------------------------------------
EDITS = {
    "no feed-forward": """
Block.forward = lambda self, x, *cache: x + self.attention(self.ln1(x), *cache)
""",
    "no attention": """
Block.forward = lambda self, x, *cache: x + self.feed_forward(self.ln2(x))
""",
    "no projection": """
class MultiHead(MultiHead):
    def __init__(self, *args):
        super().__init__(*args)
        self.unused, self.projection = self.projection, nn.Identity()
""",
    "a block is frozen": """
class LM(LM):
    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        self.blocks[0].requires_grad_(False)
""",
    "all but lm_head is frozen": """
class LM(LM):
    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("lm_head"))
        self.lm_head.requires_grad_(True)
""",
    "a parameter is not used": """
class Block(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.more = nn.Parameter(torch.ones(3, 5))
""",
}
UNUSED = {  # parameters that no loss depends on
    "no feed-forward": "feed_forward",
    "no attention": "attention",
    "no projection": "unused",
    "a block is frozen": "blocks.0",
    "all but lm_head is frozen": "blocks.0",
    "a parameter is not used": "more",
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_class_that_was_edited_trains(script, edit):
    """A parameter without a gradient is left alone; the others learn, also after --resume."""
    script.edit(EDITS[edit])
    script.main_killed_at(5, DROPOUT=0.0)
    early = script.run(1)["last"]
    script.main("--resume")
    run = script.run(1)
    losses = {step: entry["val"]["loss"] for step, entry in run["history"].items()}
    assert [*losses] == [0, 3, 6, 9] and losses[9] < losses[3] < losses[0]
    unused = [name for name in early if UNUSED[edit] in name]
    assert unused and all(torch.equal(early[name], run["last"][name]) for name in unused)
    assert not all(torch.equal(early[name], run["last"][name]) for name in early)
    script.main("--sample")


def test_a_model_that_main_compiles_is_saved_and_loaded(script):
    """torch.compile puts `_orig_mod.` in front of the weights' names."""
    script.main()
    script.edit("""
def train(model, *rest, train=train):
    train(torch.compile(model), *rest)
""")
    torch.compiler.set_stance("force_eager")  # the names are what matters
    try:
        script.main()
        script.main("--resume", "--max-iters", "12")
    finally:
        torch.compiler.set_stance("default")
    assert script.run(1)["last"].keys() == script.run(2)["best"].keys()
    assert script.run(2)["step"] == 12
    script.main("--sample")


def test_an_output_layer_that_is_tied_stays_tied(script):
    """By hand, with one line (GPT-2's is tied from the start): trained, loaded and resumed."""
    if script.name == "word_gpt":
        pytest.skip("its output layer is another matter")
    if script.name == "char_gpt":
        script.edit("""
class LM(LM):
    def __init__(self, *args, **sizes):
        super().__init__(*args, **sizes)
        self.lm_head.weight = self.token_embedding.weight
""")
    seen, train_step = [], script.gpt.train_step

    def listen(model, *args):
        seen.append(model.lm_head.weight is model.token_embedding.weight)
        return train_step(model, *args)

    script.main_killed_at(5, train_step=listen)
    script.main("--resume")
    assert seen == [True] * 10
    run, model, _ = script.gpt.load_run(script.path(1), CPU)
    assert model.lm_head.weight is model.token_embedding.weight
    model.lm_head.weight.data.zero_()
    assert not model.token_embedding.weight.any()
    assert torch.equal(run["last"]["lm_head.weight"], run["last"]["token_embedding.weight"])


def test_a_real_bug_keeps_its_traceback_and_harms_no_later_run(script):
    done = script.child(insert="def train_step(*args): raise RuntimeError('a bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr

    def bug(*args):
        raise Killed

    with script.patch.context() as patch, pytest.raises(Killed):
        patch.setattr(script.gpt, "train_step", bug)
        script.main()
    handler = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor() as pool:  # not in the main thread, as servers do
        assert pool.submit(script.main).result()["text"] == script.main()["text"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_as_a_library(script):
    script.main(has_bfloat16=lambda device: False)
    _, model, _ = script.gpt.load_run(script.path(1), CPU)
    T, V = model.block_size, model.config["vocab_size"]
    model(torch.zeros(1, T, dtype=torch.int64))
    for wrong in (torch.zeros(1, T + 1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)):
        with pytest.raises(script.gpt.UserError, match="block_size"):
            model(wrong)
    x = torch.tensor([[3, 4, 5]])
    for wrong in (V, -1):
        with pytest.raises(IndexError):  # as in PyTorch
            model(torch.tensor([[3, wrong]]))
        with pytest.raises(IndexError):
            model(x, torch.tensor([[4, wrong, 3]]))
    _, loss = model(x, torch.tensor([[4, -100, -100]]))  # PyTorch's mark for no target
    assert loss.item() == pytest.approx(model(x[:, :1], x[:, 1:2])[1].item(), abs=1e-5)
    generated = [
        list(script.gpt.generate(model, ids, 4, temperature=0))
        for ids in ([3, 4, 5], (3, 4, 5), torch.tensor([3, 4, 5]), np.array([3, 4, 5]))
    ]
    assert generated == generated[:1] * 4 and all(type(i) is int for i in generated[2])
    with pytest.raises(script.gpt.UserError, match="no token"):
        list(script.gpt.generate(model, [], 4))


# --- other machines, terminals and streams --------------------------------------------------------


def test_a_torch_that_cannot_name_the_capabilities_of_a_cpu(script):
    """As 2.6; and one with a name like NVIDIA's builds."""
    insert = """
torch.__version__ = torch.torch_version.TorchVersion("2.9.0a0+nv25.9")
del torch.cpu.get_capabilities
"""
    done = script.child(insert=insert, MAX_ITERS=2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bfloat16: False" in done.stdout


@pytest.mark.parametrize("half", ["WORLD_SIZE=2", "WORLD_SIZE=x", "RANK=1", "LOCAL_RANK=7"])
def test_an_environment_that_is_set_by_half(monkeypatch, half):
    """Only what torchrun sets counts: it always sets all."""
    monkeypatch.setenv(*half.split("="))
    gpt = load_fresh("gpt2")
    assert (gpt.N_RANKS, gpt.RANK) == (1, 0)
    assert gpt.join_processes(CPU) is CPU


WITHOUT_INLINE = """
import importlib.metadata, sys
sys.modules["matplotlib_inline"] = None
importlib.metadata.entry_points = lambda **options: []
"""


def test_a_backend_of_a_notebook_that_is_not_installed(script):
    """`!python char_gpt.py` in a notebook: its kernel has set MPLBACKEND for its own plots."""
    blocked = script.folder / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(WITHOUT_INLINE)
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment = os.environ | backend | {"PYTHONPATH": str(blocked)}
    refused = [sys.executable, "-c", "import matplotlib"]
    assert subprocess.run(refused, env=environment, capture_output=True, check=False).returncode
    done = run_script(script.copy(MAX_ITERS=2), *script.flags, env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "no picture" not in done.stdout
    assert Path(f"{script.name}-1.png").read_bytes().startswith(b"\x89PNG")


class Console(io.StringIO):
    """A stdout that says it is a terminal, and has no size: IDLE's, for one."""

    def isatty(self):
        return True


def test_a_terminal_that_has_no_size(script, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = Console()
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "__stdout__", None)
    script.main(MAX_ITERS=12, EVAL_INTERVAL=12)
    monkeypatch.undo()
    progress = [part for part in console.getvalue().split("\n") if "tokens/s" in part]
    assert progress and progress[0].count("\r") == 2  # at steps 0 and 10, on one line
    os.chdir("/")


def test_a_narrow_terminal(script, monkeypatch):
    """The progress line never wraps: it would stay there, once for each time."""
    console = Console()
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stdout", console)
    run = {"max_iters": 100, "config": {"block_size": 16}}
    script.gpt.show_progress(run, 10, torch.tensor(2.5), 1234.0)
    script.gpt.show_progress(run, 11, torch.tensor(2.5), 1235.0)  # only every tenth step
    assert len(console.getvalue()) == 20  # 19 characters, and the return to the start


def test_progress_without_a_terminal(script, capsys):
    """A plain line, at most every 30 s."""
    run = {"max_iters": 100, "config": {"block_size": 16}}
    for seconds in (1, 29, 31, 45, 60, 62):
        script.gpt.show_progress(run, 10, torch.tensor(2.5), seconds)
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 3 and "2.500" in lines[0] and "\r" not in "".join(lines)


def test_control_characters_are_shown_and_not_obeyed(script, capsys, tmp_path):
    """A log with colours as the text: its ESC and BEL never reach the terminal."""
    log = TEXT.replace("the ", "\x1b[31mthe\x1b[0m\x07 ").replace("cat", "c\x9bt")
    flags = script.write_data(tmp_path, log)
    results = script.gpt.main([*flags, "--max-iters", "2", "--prompt", "\x1b[31mthe "])
    script.gpt.main(["--sample", "--prompt", "\x1b[31mthe "])
    assert not set("\x1b\x07\x9b") & set(capsys.readouterr().out)
    if script.name != "word_gpt":  # whose words are cleaned
        assert results["text"].startswith("\x1b[31mthe ")  # as it is


def test_streams_that_fail(script):
    path = script.copy(MAX_ITERS=3)
    command = shlex.join([sys.executable, str(path), *script.flags])

    def run(end):
        return subprocess.run(
            command + end, shell=True, cwd=script.folder, capture_output=True, text=True
        )

    closed = run(" >&- <&-")  # a whole run, and the plot is real
    assert (closed.returncode, closed.stderr) == (0, "")
    assert Path(f"{script.name}-1.png").read_bytes().startswith(b"\x89PNG")
    seen_enough = run(" --sample | head -c 10")
    assert (len(seen_enough.stdout), seen_enough.stderr) == (10, "")


def test_switches_and_an_empty_environment(script):
    needed = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    environment = {key: os.environ[key] for key in needed if key in os.environ} | {"LANG": "C"}
    path = script.copy(MAX_ITERS=2)
    command = [sys.executable, "-O", "-u", "-I", "-X", "dev", str(path), *script.flags]
    done = subprocess.run(command, env=environment, cwd=script.folder, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"best" in done.stdout


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_text_and_a_terminal_of_two_languages(script, tmp_path, encoding):
    greek = "\ufeff" + TEXT.replace("a", "α").replace("e", "ж")  # Windows marks UTF-8 at the start
    flags = script.write_data(tmp_path, greek)
    insert = f"sys.stdout.reconfigure(encoding={encoding!r}, errors='strict')"
    done = run_child(script.copy(insert, MAX_ITERS=2), *flags, "--prompt", "thж cαt")
    assert (done.returncode, done.stderr) == (0, "")
    assert "th? c?t" in done.stdout
    assert "\ufeff" not in "".join(script.run()["vocabulary"])


# --- random faults: SOAK=200 for many -------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SOAK))
def test_soak_kills(script, seed):
    """Killed at a random time, again and again: at the end, the bits of an unbroken run."""
    rng = random.Random(seed)
    unbroken(script)
    for _ in range(3):
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        insert = f"""
import signal
signal.signal(signal.SIGALRM, lambda *args: os.kill(os.getpid(), {int(number)}))
signal.setitimer(signal.ITIMER_REAL, {rng.random() * 0.4 + 0.001})
"""
        if is_saved(script) and script.run()["step"] >= 9:
            break
        done = script.child(*["--resume"] * is_saved(script), insert=insert)
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1, done.stderr
    end_as_if_nothing_had_happened(script)


@pytest.mark.parametrize("seed", range(SOAK))
def test_soak_texts_and_prompts(script, seed, tmp_path):
    rng = random.Random(seed)
    alphabet = rng.choice(["ab \n", "é→😀 \n", "\0\x1b\r\n ", "<|endoftext|> ", "שלום \n", " \n"])
    text = "".join(rng.choices(alphabet + OTHER[:50], k=rng.choice([0, 5, 300, 3000])))
    prompt = "".join(rng.choices(text or "x", k=rng.choice([1, 40])))
    flags = script.write_data(tmp_path, text)
    done = script.child("--prompt=" + prompt.replace("\0", ""), *flags, MAX_ITERS=2)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or len(done.stderr.splitlines()) == 1, done.stderr
