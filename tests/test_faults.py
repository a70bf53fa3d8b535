"""Faults, tried for real: where × what × what the user has afterwards, for all three scripts alike.

SOAK=200 python -m pytest tests/test_faults.py -k soak   # seeds are in the tests' names
"""

import builtins
import contextlib
import io
import math
import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    OTHER,
    SCRIPTS,
    TEXT,
    assert_one_line_error,
    assert_same,
    load_fresh,
    run_child,
    run_script,
)

CPU = torch.device("cpu")
BOTH = ("char_gpt", "word_gpt")
ALL = (*BOTH, "gpt2")
SOAK = int(os.environ.get("SOAK", "3"))

# Send a signal in front of the calls of a function that have these numbers. A dot: of a module.
SEND = """
def send(name, numbers, what):
    owner, _, name = name.rpartition(".")
    owner = vars(globals()[owner]) if owner else globals()
    original, calls = owner[name], []
    def wrapper(*args, **more):
        calls.append(name)
        for _ in range(numbers.count(len(calls))):
            os.kill(os.getpid(), getattr(signal, what))
        return original(*args, **more)
    owner[name] = wrapper
"""
# Raise an error when a file whose name ends so is opened to write.
REFUSE = """
import builtins, errno
def open(path, mode="r", *more, **options):
    if "w" in mode and str(path).endswith({end!r}):
        raise OSError(getattr(errno, {number!r}), os.strerror(getattr(errno, {number!r})), path)
    return builtins.open(path, mode, *more, **options)
def train_step(*args, train_step=train_step):
    print("trained a step")
    return train_step(*args)
"""
NO_ROOM = """
def write_file(path, write):
    raise UserError(f"cannot write {path}: no space left")
"""
REMOVED = """
import shutil
def get_lr(step, *more, here=os.getcwd()):
    return 0.01 if step < 2 else shutil.rmtree(here) or 0.01
"""
LIMITED = """
import resource
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
"""
OLD = """
torch.__version__ = torch.torch_version.TorchVersion("2.1.0")
del torch.cpu.get_capabilities, torch.mps
"""
EXPLODES = "def get_lr(step, *more): return 0.01 if step < 4 else 1e30"


class Fault(NamedTuple):
    """A row of the table. `words`, separated by |, are in the one line on stderr."""

    where: str
    what: str
    status: int = 0  # exit status; below 0: died of this signal; above 0: one line on stderr
    words: str = ""
    flags: tuple = ()
    insert: str = ""
    constants: dict = {}  # noqa: RUF012
    text: bytes | None = None  # to train on
    after: str = "same"  # files "same" as before; "resumes": goes on to the same bits; "works"
    finished: bool = False  # the model of an earlier run lies there
    scripts: tuple = ALL


def sent(where, numbers, *whats, status=None, after="resumes", **more):
    """Return a row for each signal."""
    for what in whats:
        died = -getattr(signal, what) if status is None else status
        words = "interrupted" if died > 0 else ""
        insert = f"{SEND}\nsend({where!r}, {numbers}, {what!r})"
        name = what + f" at call {'and '.join(map(str, numbers))}"
        yield Fault(where, name, died, words, insert=insert, after=after, **more)


def full(end, scripts=ALL, number="ENOSPC", **more):
    """Return a row for a disk that refuses the file whose name ends so."""
    refuse, words = REFUSE.format(end=end, number=number), end.removesuffix(".part")
    return Fault(end, number, 1, words, insert=refuse, scripts=scripts, **more)


LINE = TEXT.encode() * 300
# fmt: off
FAULTS = [
    # interruption
    *sent("train_step", [5], "SIGINT", status=0),
    *sent("estimate_loss", [4], "SIGINT", status=0),  # of the evaluation at step 3
    *sent("save_checkpoint", [2], "SIGINT", status=0),
    *sent("find_data", [1], "SIGINT", status=1, after="same"),
    *sent("split_text", [1], "SIGINT", status=1, after="same"),
    *sent("generate", [5], "SIGINT", status=1),  # after training
    *sent("estimate_loss", [9], "SIGINT", status=1),
    *sent("train_step", [5, 5], "SIGINT", status=1),  # twice
    *sent("write_file", [5, 5], "SIGINT", status=1),  # twice, in the save of step 6
    *sent("find_data", [1], "SIGTERM", after="same", finished=True),
    *sent("split_text", [1], "SIGHUP", after="same", finished=True),
    *sent("train_step", [2], "SIGKILL", after="same", finished=True),
    *sent("train_step", [5], "SIGTERM", "SIGHUP", "SIGKILL"),
    *sent("estimate_loss", [4], "SIGTERM"),
    *sent("write_file", [2], "SIGKILL"),
    *sent("write_file", [5], "SIGHUP"),
    *sent("generate", [5], "SIGKILL"),
    *[row for n in range(1, 7)
      for row in sent("os.replace", [n], "SIGKILL", after="works", finished=True)],
    # starvation
    *[full(end, number=n, after="works") for end in (".pt.part", ".resume.pt.part", ".png.part") for n in ("ENOSPC", "EACCES")],  # noqa: E501
    full(".lock", number="EROFS", finished=True),
    full("_attention.png.part", ("word_gpt",), after="works"),
    Fault("token file", "ENOSPC", 1, "tiny.txt.gpt2.bin", insert=NO_ROOM, scripts=("gpt2",)),
    Fault("train_step", "the folder is removed", 1, "No such file", insert=REMOVED, after="gone"),
    Fault("memory", "a limited address space", 1, "out of memory|BATCH_SIZE", insert=LIMITED,
          constants={"N_EMBED": 8192}, finished=True),
    *[Fault("memory", error, 1, "out of memory|BATCH_SIZE", insert=f"def train_step(*a): raise {error}")  # noqa: E501
      for error in ("torch.OutOfMemoryError('CUDA out of memory.')", "MemoryError()")],
    # rubbish
    Fault("text", "empty", 1, "is empty", text=b""),
    Fault("text", "one character", 1, "few", text=b"a"),
    Fault("text", "only \\0", 1, "UTF-8", text=b"\0" * 999),
    Fault("text", "binary", 1, "UTF-8", text=random.Random(1).randbytes(9999)),
    Fault("text", "UTF-16", 1, "UTF-8", text=TEXT.encode("utf-16")),
    Fault("text", "UTF-16 without a mark", 1, "UTF-8", text=TEXT.encode("utf-16-le")),
    Fault("text", "UTF-32", 1, "UTF-8", text=TEXT.encode("utf-32")),
    Fault("text", "Latin-1", 1, "UTF-8", text="café ".encode("latin-1") * 99),
    Fault("text", "cp1252", 1, "UTF-8", text="“quoted” – ".encode("cp1252") * 99),
    Fault("text", "UTF-8 with a mark", text=b"\xef\xbb\xbf" + TEXT.encode(), after="works", scripts=("char_gpt", "gpt2")),  # noqa: E501
    Fault("text", "CRLF", text=(TEXT + "\r\n\r\n").encode() * 20, after="works"),
    Fault("text", "one long line", text=LINE, after="works", scripts=("char_gpt", "gpt2")),
    Fault("text", "one long line", 1, "empty lines", text=LINE, scripts=("word_gpt",)),
    Fault("--data", "missing", 1, "missing.txt|--data", ("--data", "missing.txt")),
    Fault("--data", "a folder", 1, "no file .|--data", ("--data", ".")),
    Fault("--data", "a device", 1, "/dev/null|--data", ("--data", "/dev/null")),
    Fault("--data", "a long name", 1, "xxx|--data", ("--data", "x" * 300)),
    Fault("--prompt", "empty", 1, "prompt has no token", ("--prompt", "")),
    Fault("--prompt", "unknown characters", 1, "'→', '😀'", ("--prompt", "a→😀"), scripts=("char_gpt",)),  # noqa: E501
    Fault("--prompt", "no word", 1, "no token", ("--prompt", "😀"), scripts=("word_gpt",)),
    Fault("--prompt", "emoji", flags=("--prompt", "a→😀"), scripts=("gpt2",), after="works"),
    Fault("--prompt", "half a character", 1, "udce9", ("--prompt", "a\udce9"), scripts=("char_gpt",)),  # noqa: E501
    Fault("--prompt", "half a character", flags=("--prompt", "a\udce9"), scripts=("gpt2",), after="works"),  # noqa: E501
    Fault("--prompt", "100,000 characters", flags=("--prompt", "the cat " * 12_500), after="works"),
    Fault("--prompt", "begins with -", 2, "--prompt", ("--prompt", "-a")),
    Fault("--device", "without such a GPU", 1, "cuda:77|cpu", ("--device", "cuda:77")),
    Fault("--device", "a toaster", 1, "toaster|cpu", ("--device", "toaster")),
    Fault("--max-iters", "0", 1, "--max-iters", ("--max-iters", "0")),
    Fault("--max-iters", "nan", 2, "nan", ("--max-iters", "nan")),
    Fault("--seed", "inf", 2, "inf", ("--seed", "inf")),
    Fault("--seed", "huge", flags=("--seed", str(-(10**30))), after="works"),
    Fault("flags", "unknown", 2, "--nonsense", ("--nonsense",)),
    Fault("flags", "two that exclude each other", 2, "--resume", ("--sample", "--resume")),
    Fault("--sample", "nothing there", 1, "no NAME.pt", ("--sample",)),
    Fault("--resume", "nothing there", 1, "no NAME.resume.pt", ("--resume",)),
    Fault("--resume", "nothing left to do", 1, "9 steps|--max-iters", ("--resume",), finished=True),
    # numbers, and what is no fault of the user
    Fault("train_step", "the loss explodes", 1, "LEARNING_RATE", insert=EXPLODES, after="works",
          constants={"GRADIENT_CLIP": None}),
    Fault("torch", "too old", 1, "PyTorch 2.1.0|2.13.0", insert=OLD),
]
# fmt: on


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        pytest.param(entry, row, id=f"{entry[0]}-{row.where}-{row.what}"[:80])
        for row in FAULTS
        for entry in SCRIPTS
        if entry[0] in row.scripts
    ],
    indirect=["script"],
)
def test_fault(script, fault):
    if fault.finished:
        script.main("--seed", "5")
    before = script.files()
    flags = list(fault.flags)
    if fault.text is not None:
        Path("rubbish.txt").write_bytes(fault.text)
        flags += ["--data", "rubbish.txt"]
    done = script.child(*flags, insert=fault.insert, **fault.constants)
    if fault.status > 0:
        words = fault.words.replace("NAME", script.name).split("|")
        assert_one_line_error(done, *words, status=fault.status)
    else:
        assert (done.returncode, done.stderr) == (fault.status, "")
    if fault.after == "gone":
        return
    after = script.files()
    assert fault.status < 0 or not [name for name in after if name.endswith(".part")]
    for name, content in before.items():  # an earlier model is there, under its name or the other
        assert content in (after.get(name), after.get(f"previous.{name}")), name
    for name in after:
        if name.endswith(".pt"):
            script.gpt.load_checkpoint(name, CPU)
    if fault.after == "same":
        assert {name: after[name] for name in after if not name.endswith(".part")} == before
    elif fault.after == "resumes":
        go_on(script)
    elif fault.status == 0:
        assert f"{script.name}.pt" in after
    assert fault.where != ".lock" or "trained" not in done.stdout


def go_on(script):
    """What a user does after a kill ends with the weights of a run that nobody has killed."""
    started = f"{script.name}.resume.pt" in script.files() and script.state()["weights"]
    if not started or max(script.state()["history"]) < 9:
        done = script.child(*["--resume"] * bool(started and max(script.state()["history"]) % 9))
        assert (done.returncode, done.stderr) == (0, "")
    assert_same(unbroken(script), script.state())


def unbroken(script, kept={}):  # noqa: B006
    """Return what NAME.resume.pt has at the end of a run that nothing has disturbed."""
    if script.name not in kept:
        here = script.folder.name
        script.go_to("unbroken")
        script.main()
        kept[script.name] = script.state()
        script.go_to(here)
    return kept[script.name]


# --- files ----------------------------------------------------------------------------------------


def test_a_kill_at_any_moment_of_a_save_loses_nothing(script):
    """What lies on the disk before and after each create, write, rename and remove."""
    script.main()
    pt, resume = f"{script.name}.pt", f"{script.name}.resume.pt"
    finished = script.files()
    states = {}

    def look():
        states[tuple(sorted(script.files().items()))] = None

    class Unbuffered(io.FileIO):
        def write(self, data):
            look()
            half = super().write(data[: len(data) // 2])
            look()
            return half + super().write(data[half:])

    real_open = open
    with script.patch.context() as patch:
        patch.setattr(builtins, "open", lambda path, mode="r", *args, **more: (
            Unbuffered(path, "w") if "wb" in mode and str(path).startswith(script.name)
            else real_open(path, mode, *args, **more)))  # fmt: skip
        for name in ("replace", "rename", "unlink", "remove"):
            original = getattr(os, name)
            patch.setattr(os, name, lambda *args, f=original: (look(), f(*args), look()))
        script.main("--seed", "3")
    end, best = script.state(), script.state(".pt")
    states = [dict(state) for state in states]
    assert len(states) > 100 and any(f"{pt}.part" in state for state in states)
    loaded, resumed = set(), set()
    for state in states:
        assert finished[pt] in (state.get(pt), state.get(f"previous.{pt}"))
        for path in script.folder.iterdir():
            path.unlink()
        for name, content in state.items():
            Path(name).write_bytes(content)
            if name.endswith(".pt") and content not in loaded:
                script.gpt.load_checkpoint(name, CPU)
                loaded.add(content)
        key = state.get(pt), state.get(resume)
        if key not in resumed and key[1] not in (None, finished[resume]):
            resumed.add(key)
            if max(script.state()["history"]) < 9:
                script.main("--resume", "--seed", "3")
            assert_same(end, script.state())
            assert_same(best, script.state(".pt"))
    assert len(resumed) >= 3


@pytest.mark.parametrize("end", [".pt", ".resume.pt"])
def test_a_disk_that_fills_up_in_the_middle_of_a_file(script, end):
    script.main()
    before = script.files()
    limit = len(before[f"{script.name}{end}"]) - 1000  # so much fits into one file
    insert = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    for flags in (["--resume", "--max-iters", "12"], ["--seed", "2"]):
        assert_one_line_error(script.child(*flags, insert=insert), "cannot write", "full disk")
        after = script.files()
        name = f"{script.name}{end}"
        assert before[name] in (after.get(name), after.get(f"previous.{name}"))
        assert not [name for name in after if name.endswith(".part")]


def test_starting_again_keeps_the_finished_model(script, capsys):
    script.main()
    finished = script.files()
    stopped = script.child("--seed", "2", insert=f"{SEND}\nsend('train_step', [2], 'SIGINT')")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert "the " in stopped.stdout.partition("was written")[2]  # the sample
    assert script.files() == finished
    script.main("--seed", "2")
    after, printed = script.files(), capsys.readouterr().out
    for name, content in finished.items():
        assert after[f"previous.{name}"] == content and f"previous.{name}" in printed
    assert after[f"{script.name}.pt"] != finished[f"{script.name}.pt"]
    second = script.files()[f"{script.name}.pt"]
    script.main("--seed", "3")  # one generation is kept
    assert script.files()[f"previous.{script.name}.pt"] == second
    script.go_to("nothing before")
    stopped = script.child(insert=f"{SEND}\nsend('train_step', [2], 'SIGINT')")
    assert (stopped.returncode, stopped.stderr, script.files()) == (0, "", {})
    assert "the " in stopped.stdout.partition("was written")[2]
    assert script.child("--max-iters", "2").returncode == 0  # its planned last step is saved
    assert set(script.state()["history"]) == {0, 2}


def test_two_runs_in_one_folder(script):
    """The second one says so, while the first is at work; afterwards it may."""
    wait = "def get_lr(step, *more): return os.path.exists('go') and 0.01 or time.sleep(0.1) or get_lr(step)"  # noqa: E501
    first = threading.Thread(target=lambda: done.append(run_child(path, *script.flags)))
    path, done = script.copy(wait), []
    first.start()
    while not Path(f"{script.name}.lock").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    second = run_child(path, *script.flags, "--seed", "2")
    Path("go").touch()
    first.join()
    assert_one_line_error(second, "another run")
    assert done[0].returncode == 0 and set(script.state()["history"]) == {0, 3, 6, 9}
    assert not list(Path().glob("previous*"))
    assert run_child(path, *script.flags, "--seed", "2").returncode == 0


class Hostile:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return (os.system, ("touch owned",))


def test_checkpoints_of_strangers(script):
    script.main()
    path, good = Path(f"{script.name}.pt"), script.state(".pt")
    whole, weights, config = path.read_bytes(), good["weights"], good["config"]
    first, last = next(iter(weights)), [*weights][-1]
    nan = weights["blocks.0.ln1.weight"].index_fill(0, torch.tensor(3), math.nan)
    cases = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "hostile": good | {"more": Hostile()},
        "other script": good | {"name": "other"},
        "a list": [1, 2],
        "vocabulary": good | {"vocabulary": good["vocabulary"][:-1]},
        "not finite": good | {"weights": weights | {"blocks.0.ln1.weight": nan}},
        "complex": good | {"weights": {k: v.to(torch.complex64) for k, v in weights.items()}},
        "weight missing": good | {"weights": {k: weights[k] for k in weights if k != first}},
        "weight too much": good | {"weights": weights | {"more": weights[first]}},
        "2^40 numbers": good | {"weights": weights | {last: torch.ones(1).expand(2**20, 2**20)}},
    }
    cases |= {f"no {k}": {key: good[key] for key in good if key != k} for k in good}
    cases |= {f"hostile {k}": good | {k: Hostile()} for k in good}
    for name, value in (
        ("n_embed", 32), ("n_embed", 4 * 10**9), ("n_layers", 10**12), ("n_layers", 2),
        ("n_heads", "2"), ("n_heads", -2), ("n_heads", 2.0), ("n_heads", 0), ("dropout", 2.0),
        ("block_size", 15), ("block_size", 16.0),
    ):  # fmt: skip
        cases[f"{name} {value!r}"] = good | {"config": config | {name: value}}
    accepted = []
    for name, content in cases.items():
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        try:
            script.main("--sample")
            accepted.append(name)
        except script.gpt.UserError as error:
            assert path.name in str(error) and "trust" not in str(error), name
        except Exception as error:
            accepted.append(f"{name}: {error!r:.60}")
        if name in ("hostile", "truncated", "n_layers 1000000000000"):
            assert_one_line_error(script.child("--sample"), path.name)
    assert not accepted
    path, good = Path(f"{script.name}.resume.pt"), script.state()
    entry = good["history"][9]
    for damage in (
        {"optimizers": []}, {"optimizers": 5}, {"optimizers": Hostile()}, {"history": {}},
        {"history": 5}, {"history": [1, 2]}, {"history": {"a": entry}}, {"history": {3: {}}},
        {"history": {math.nan: entry}}, {"history": {3: {"val": {"loss": math.nan}}}},
        {"text_id": Hostile()}, good["optimizers"][0],
    ):  # fmt: skip
        torch.save(good | damage if damage is not good["optimizers"][0] else damage, path)
        with pytest.raises(script.gpt.UserError, match=r"resume\.pt"):
            script.main("--resume", "--max-iters", "12")
    assert not Path("owned").exists()


# --- constants ------------------------------------------------------------------------------------
DERIVED = "F LM ON_GPU IN_GROUP N_RANKS RANK DEVICES REPLACEMENTS SIZES MODEL COMPILE"
BAD = [-1, "x", True, math.nan, math.inf, [], np.float64(0.5)]  # for any number
VALUES = [*BAD, 0, 1.5, None]
BETAS = [0.9, (0.9,), (2, 3), (0.9, 1.0), ("a", "b"), (0.9, math.nan)]
NONE = ("TOP_K", "TOP_P", "GRADIENT_CLIP")  # may be None


def run_or_named(script, **constants):
    """A run works, or ends before its first step in one line that names a constant. Which?"""
    steps, step = [], script.gpt.train_step
    try:
        with script.patch.context() as patch:
            patch.setattr(script.gpt, "train_step", lambda *args: steps.append(1) or step(*args))
            for name, value in constants.items():
                patch.setattr(script.gpt, name, value)
            script.gpt.main([*script.flags, "--prompt", "the "])
            script.gpt.main(["--sample", "--prompt", "the "])
        return True
    except script.gpt.UserError as error:
        named = any(name in str(error).upper() for name in constants)
        assert named and not steps, (constants, error)
    except Exception as error:
        pytest.fail(f"{constants}: {error!r} after {len(steps)} steps")


def constants_of(script):
    script.set(MAX_ITERS=2, EVAL_INTERVAL=1, SAMPLE_TOKENS=2)
    return {k: v for k, v in vars(script.gpt).items() if k.isupper() and k not in DERIVED.split()}


def test_each_constant(script):
    constants = constants_of(script)
    assert len(constants) > 25
    for name, usual in constants.items():
        is_number = type(usual) in (int, float) or name in NONE
        for value in VALUES + BETAS * (name == "BETAS"):
            works = run_or_named(script, **{name: value})
            bad = any(value is x for x in BAD) or (value is None and name not in NONE)
            assert not (works and is_number and bad), (name, value)
            assert not (works and name in ("BETAS", "NAME", "DATA", "PROMPT") and value != "x")
    assert {name.rpartition(".")[2] for name in script.files()} <= {"pt", "png"}


# --- as a library ---------------------------------------------------------------------------------


def test_as_a_library(script):
    script.main()
    model, _ = script.gpt.load_checkpoint(f"{script.name}.pt", CPU)
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
    assert loss.item() == pytest.approx(model(x[:, :1], x[:, 1:2])[1].item(), abs=1e-2)
    generated = [
        list(script.gpt.generate(model, ids, 4, temperature=0))
        for ids in ([3, 4, 5], (3, 4, 5), torch.tensor([3, 4, 5]), np.array([3, 4, 5]))
    ]
    assert generated == generated[:1] * 4 and all(type(i) is int for i in generated[2])
    for wrong, why in (([], "no token"), (torch.tensor([]), "no token"), ("abc", "int"), (x, ".")):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=why):
            list(script.gpt.generate(model, wrong, 4))


def test_a_real_bug_keeps_its_traceback_and_harms_no_later_run(script):
    done = script.child(insert="def train_step(*args): raise RuntimeError('a bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr
    with script.patch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script.gpt, "train_step", lambda *args: 1 / 0)
        script.main()
    handler = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(script.main).result()["text"] == script.main()["text"]
    assert signal.getsignal(signal.SIGINT) is handler


# --- devices that are not there, and processes ----------------------------------------------------


def test_the_branches_of_other_devices(script, monkeypatch):
    cuda = torch.device("cuda")
    for answer in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, x=answer: x)
            assert script.gpt.has_bfloat16(cuda) is answer
    assert not script.gpt.has_bfloat16(torch.device("mps"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert load_fresh(script.name).DEVICES == ["mps", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpt = load_fresh(script.name)
    assert gpt.DEVICES == ["cuda", "mps", "cpu"] and gpt.DEVICE == "cuda" and gpt.ON_GPU
    gpt.check_constants()  # those of a GPU make sense
    assert script.tiny["BATCH_SIZE"] < gpt.BATCH_SIZE
    if script.name != "gpt2":
        return
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert gpt.memory_used(cuda) == 123
    seen = []
    monkeypatch.setattr(gpt.dist, "init_process_group", lambda kind, timeout: seen.append(kind))
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpt, "N_RANKS", 2)
    for place in ("1", "2"):
        monkeypatch.setenv("LOCAL_RANK", place)
        with contextlib.suppress(gpt.UserError):  # there is no third GPU
            assert gpt.join_processes(cuda) == torch.device("cuda", 1)
    assert [str(x) for x in seen] == ["cuda:1", "nccl"]
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(gpt, "has_bfloat16", lambda device: True)
    for kind, dtype in (("cuda", torch.bfloat16), ("mps", torch.float32)):
        there = SimpleNamespace(device=torch.device(kind))
        monkeypatch.setattr(torch.nn.Linear, "parameters", lambda self, there=there: iter([there]))
        assert gpt.for_generation(model).weight.dtype is dtype


@pytest.mark.parametrize("half", ["WORLD_SIZE=2", "WORLD_SIZE=x", "RANK=1", "LOCAL_RANK=7"])
def test_an_environment_that_is_set_by_half(tmp_path, monkeypatch, half):
    """Only what torchrun sets counts: it always sets all."""
    monkeypatch.setenv(*half.split("="))
    gpt = load_fresh("gpt2")
    assert (gpt.N_RANKS, gpt.RANK) == (1, 0)
    assert gpt.join_processes(CPU) is CPU


def test_streams_that_fail(script):
    path = script.copy(MAX_ITERS=3)
    command = shlex.join([sys.executable, str(path), *script.flags])

    def run(end):
        return subprocess.run(
            command + end, shell=True, cwd=script.folder, capture_output=True, text=True
        )

    closed = run(" >&- <&-")  # a whole run, and the plot is real
    assert (closed.returncode, closed.stderr) == (0, "")
    assert Path(f"{script.name}.png").read_bytes().startswith(b"\x89PNG")
    assert_one_line_error(run(" --sample >/dev/full"), "No space left")
    seen_enough = run(" --sample | head -c 10")
    assert (len(seen_enough.stdout), seen_enough.stderr) == (10, "")


def test_switches_and_an_empty_environment(script):
    keep = {
        key: os.environ[key] for key in ("LD_LIBRARY_PATH", "OMP_NUM_THREADS") if key in os.environ
    }
    path = script.copy(MAX_ITERS=2)
    command = [sys.executable, "-O", "-u", "-I", "-X", "dev", str(path), *script.flags]
    done = subprocess.run(command, env=keep | {"LANG": "C"}, cwd=script.folder, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"best" in done.stdout


def test_a_text_and_a_terminal_of_two_languages(script, tmp_path):
    greek = "\ufeff" + TEXT.replace("a", "α").replace("e", "ж")  # Windows marks UTF-8 at the start
    flags = script.write_data(tmp_path, greek)
    path = script.copy(MAX_ITERS=2)
    for encoding in ("cp1252", "ascii"):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = run_script(path, *flags, "--prompt", "thж cαt", env=environment, encoding=encoding)
        assert (done.returncode, done.stderr) == (0, "")
        assert "th? c?t" in done.stdout
    assert "\ufeff" not in "".join(script.state()["vocabulary"])


def test_a_narrow_terminal(script, monkeypatch):
    """The progress line never wraps: it would stay there, once for each time."""
    master, slave = pty.openpty()
    with open(slave, "w") as terminal, contextlib.suppress(OSError):
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(os, "get_terminal_size", lambda *fd: os.terminal_size((20, 5)))
        script.gpt.show_progress(10, torch.tensor(2.5), 1234.0, 5678)
        assert len(os.read(master, 999)) == 20  # 19 characters, and the return to the start
    os.close(master)


# --- random faults: SOAK=200 for many -------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SOAK))
def test_soak_kills(script, seed):
    """Killed at a random time, again and again: at the end, the bits of an unbroken run."""
    rng, path = random.Random(seed), script.copy()
    for _ in range(3):
        what = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        flags = ["--resume"] if f"{script.name}.resume.pt" in script.files() else []
        insert = f"signal.setitimer(signal.ITIMER_REAL, {rng.random() * 0.4 + 0.001})\n"
        insert += f"signal.signal(signal.SIGALRM, lambda *a: os.kill(os.getpid(), {int(what)}))"
        if flags and max(script.state()["history"]) >= 9:
            break
        done = run_child(script.copy(insert), *script.flags, *flags)
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 1, done.stderr
    assert path.exists()
    go_on(script)


@pytest.mark.parametrize("seed", range(SOAK))
def test_soak_constants(script, seed):
    """Pairs, and huge values: a run works, or one line names one of them."""
    rng = random.Random(seed)
    numbers = [k for k, v in constants_of(script).items() if type(v) in (int, float)]
    for _ in range(20):
        run_or_named(script, **{name: rng.choice(VALUES) for name in rng.sample(numbers, 2)})


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
