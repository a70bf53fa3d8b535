"""What several test files need: the scripts as strangers run them, and a server that misbehaves."""

import ast
import contextlib
import http.server
import importlib
import itertools
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True
os.environ["OMP_NUM_THREADS"] = "1"  # small models gain nothing from threads, and share the cores
torch.set_num_threads(1)
# Children of this server start in a tenth of a second: it has imported what takes long.
CHILDREN = multiprocessing.get_context("forkserver")
PRELOAD = "pytest requests tiktoken torch._dynamo torch.ao.nn.quantized.dynamic matplotlib.figure"
CHILDREN.set_forkserver_preload(PRELOAD.split())

# GPT-2's vocabulary cannot be had without a network: 256 bytes and 3 merges, with its pattern. This
# code runs inside gpt2.py.
SMALL_BPE = r"""
words = [bytes([i]) for i in range(256)] + [b"th", b" a", b" th"]
small = tiktoken.Encoding(
    "gpt2",
    pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    mergeable_ranks={word: i for i, word in enumerate(words)},
    special_tokens={"<|endoftext|>": len(words)},
)
tiktoken = argparse.Namespace(get_encoding=lambda name: small, Encoding=tiktoken.Encoding)
Tokenizer.vocab_size = 260
"""


# --- scripts, copied and run ----------------------------------------------------------------------


def edited_copy(script, folder, insert="", **constants):
    """Copy a script to `folder`, with constants edited as a person would; returns the new path.

    `insert` is code to put in front of the `__main__` block: it can replace definitions."""
    source = (ROOT / script).read_text(encoding="utf-8")
    for name, value in constants.items():
        (place,) = (node for node in ast.parse(source).body if assigns(node, name))
        lines = source.splitlines(keepends=True)
        lines[place.lineno - 1 : place.end_lineno] = [f"{name} = {value!r}\n"]
        source = "".join(lines)
    path = Path(folder) / script
    source = source.replace("\nif __name__ ==", f"\n{insert}\nif __name__ ==")
    path.write_text(source, encoding="utf-8")
    return path


def assigns(statement, name):
    """Return whether a statement, an `if` for example, assigns to a name."""
    parts = [node for node in ast.walk(statement) if isinstance(node, ast.Assign)]
    is_constant = isinstance(statement, ast.Assign | ast.If)
    return is_constant and any(getattr(part.targets[0], "id", None) == name for part in parts)


def give_signals_back():
    """Undo nohup, and a shell that starts jobs in the background: both let a signal be ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_script(path, *flags, cwd=None, timeout=300, **more):
    """Run a script as a process of its own, in its own folder; returns the finished process."""
    command = [sys.executable, str(path), *flags]
    more = {"capture_output": True, "text": True, "encoding": "utf-8", "check": False} | more
    more["preexec_fn"] = give_signals_back
    return subprocess.run(command, cwd=cwd or Path(path).parent, timeout=timeout, **more)


def run_child(path, *flags):
    """Run a script like run_script, but as a forked process: ten times as fast. No plot."""
    with tempfile.TemporaryDirectory() as folder:
        process = CHILDREN.Process(target=_child, args=(str(path), flags, folder))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("1", "2"))
    return subprocess.CompletedProcess(path, process.exitcode, out, err)


def _child(path, flags, streams):
    give_signals_back()
    os.chdir(Path(path).parent)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{streams}/{number}", os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
    Figure.savefig = plot_nothing
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def plot_nothing(figure, path, **options):
    """In place of Figure.savefig, which takes most of the time of a small run."""
    Path(path).write_bytes(b"plot")


def drawn(monkeypatch, draw):
    """Call `draw`, which writes one picture, and return the axes of that picture."""
    figures = []
    write = Figure.savefig
    both = lambda self, *a, **k: (figures.append(self), write(self, *a, **k))  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", both)
    draw()
    (figure,) = figures
    return figure.axes


def assert_one_line_error(process, *words, status=1):
    """The process failed as the contract says: its status, one line on stderr, no traceback."""
    assert process.returncode == status, (process.returncode, process.stderr)
    assert "Traceback" not in process.stderr
    lines = process.stderr.strip().splitlines()
    assert status == 2 or len(lines) == 1, process.stderr
    for word in words:
        assert word in lines[-1], (word, process.stderr)


def load_fresh(name):
    """Import a script anew, so that no test sees the constants of another."""
    sys.modules.pop(name, None)
    return importlib.import_module(name)


# --- the three scripts, small ---------------------------------------------------------------------
WORDS = ["the", "cat", "and", "a", "dog", "sat", "on", "mats", "by", "an", "old", "house", "."]
TEXT, OTHER = (" ".join(random.Random(seed).choices(WORDS, k=700)) for seed in (0, 1))


def write_text(folder, text):
    """Write a text for a script that reads plain text; returns the flags that name it."""
    (folder / "tiny.txt").write_text(text, encoding="utf-8")
    return ["--data", str(folder / "tiny.txt")]


def write_documents(folder, text):
    """The same for a script that reads paragraphs: 20 words each."""
    words = text.split()
    parts = [" ".join(words[i : i + 20]) for i in range(0, len(words), 20)]
    return write_text(folder, "\n\n".join(parts))


TINY = {
    "DEVICE": "cpu", "N_EMBED": 16, "N_LAYERS": 1, "N_HEADS": 2, "BLOCK_SIZE": 16, "BATCH_SIZE": 4,
    "EVAL_ITERS": 2, "SAMPLE_TOKENS": 20, "PROMPT": "the ", "MAX_ITERS": 9, "EVAL_INTERVAL": 3,
    "DROPOUT": 0.2,
}  # fmt: skip
WORDS_TINY = {"DATA": "words.txt", "MIN_FREQ": 2, "CUTOFFS": (8,)}
GPT2_TINY = {"INIT": "scratch", "VOCAB_SIZE": 260, "WINDOW": 8, "TOKENS_PER_STEP": 64}
SCRIPTS = [  # name, constants, how to write data, code to put into the script
    ("char_gpt", TINY, write_text, ""),
    ("word_gpt", TINY | WORDS_TINY, write_documents, ""),
    ("gpt2", TINY | GPT2_TINY, write_text, SMALL_BPE),
]


class Killed(BaseException):
    """Ends a run that shares the tests' process. The script does not expect it, like a kill."""


class Script:
    """One script, imported anew, with tiny constants, data, and a folder to run in."""

    def __init__(self, entry, folder, patch):
        self.name, self.tiny, self.write_data, self.insert = entry
        self.gpt, self.folder, self.patch = load_fresh(self.name), folder / "run", patch
        self.edit(self.insert)
        self.flags = self.write_data(folder, TEXT)
        self.set(**self.tiny)
        self.go_to("run")

    def go_to(self, name):
        """Work in another folder from now on."""
        self.folder = self.folder.parent / name
        self.folder.mkdir(exist_ok=True)
        self.patch.chdir(self.folder)

    def set(self, **values):
        """Replace names of the module, which must exist."""
        for name, value in values.items():
            self.patch.setattr(self.gpt, name, value)

    def edit(self, code):
        """Run code inside the module, as if it stood in front of its `__main__` block."""
        exec(code, vars(self.gpt))

    def main(self, *flags, **constants):
        """Call main with some constants changed; they stay changed."""
        self.set(**constants)
        return self.gpt.main([*self.flags, *flags])

    def main_killed_at(self, step, *flags, **constants):
        """Call main, and end it in front of the training step of this number."""
        self.set(**constants)
        steps = itertools.count(1)
        train_step = self.gpt.train_step

        def killed(*args):
            if next(steps) == step:
                raise Killed
            return train_step(*args)

        self.set(train_step=killed)
        with contextlib.suppress(Killed):
            self.main(*flags)
        self.set(train_step=train_step)

    def copy(self, insert="", **constants):
        """Write a copy of the script with these constants; returns its path."""
        insert = self.insert + insert
        return edited_copy(f"{self.name}.py", self.folder, insert, **self.tiny | constants)

    def child(self, *flags, insert="", **constants):
        """Run such a copy as a process of its own."""
        return run_child(self.copy(insert, **constants), *self.flags, *flags)

    def files(self):
        """Return {name: content} of what runs have written so far."""
        found = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        return {name: found[name] for name in found if name.endswith((".pt", ".png", ".part"))}

    def path(self, number):
        """Return the name of a run's file."""
        return f"{self.name}-{number}.pt"

    def run(self, number=None):
        """Return what the file of a run holds; without a number, of the newest run."""
        path = self.gpt.saved_runs()[-1] if number is None else self.path(number)
        return torch.load(path, weights_only=True)


@pytest.fixture(params=SCRIPTS, ids=lambda entry: entry[0])
def script(request, tmp_path, monkeypatch):
    """Each of the three scripts."""
    if "def find_runs" not in (ROOT / f"{request.param[0]}.py").read_text():
        pytest.skip("not in the new form yet")
    monkeypatch.setattr(Figure, "savefig", plot_nothing)
    return Script(request.param, tmp_path, monkeypatch)


def is_same(a, b):
    """Return whether two values are the same; tensors in them to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


RESULT = "step last best best_step history optimizers seed max_iters config vocabulary text_id"


def assert_same(run, other):
    """Two runs have come to the same result: weights, optimizers and losses, to the bit."""
    names = [name for name in RESULT.split() if name in run]
    assert [name for name in names if not is_same(run[name], other[name])] == []


# --- a server -------------------------------------------------------------------------------------


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves `files` ({"/path": bytes}), and commits one of `faults` per request, in that order.

    A fault is a status, an address (it redirects there), "stall" (half the body, then silence),
    "cut" (half the body, then the end), "wrong" (other bytes), "lie" (a Content-Length that is too
    small), or None. `seen` lists (path, headers) of every
    request. Byte ranges are honoured where `ranges` is True."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.faults, self.seen, self.ranges = {}, [], [], True
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.seen.append((self.path, dict(self.headers)))
        fault = server.faults.pop(0) if server.faults else None
        content = server.files.get(self.path.partition("?")[0])
        if isinstance(fault, int) or content is None:
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        if ":" in str(fault):
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and server.ranges:
            start = int(wanted[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        payload = content[start:]
        if fault == "wrong":
            payload = bytes(byte ^ 1 for byte in payload[:64]) + payload[64:]
        length = len(payload) // 2 if fault == "lie" else len(payload)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault in ("stall", "cut"):
            payload = payload[: len(payload) // 2]
        try:
            self.wfile.write(payload)
            self.wfile.flush()
            if fault == "stall":
                time.sleep(5)
        except OSError:
            pass  # the client has gone

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def server():
    """A `FaultyServer` on this machine, for one test."""
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


# --- pytest ---------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist
    if not is_worker and config.args_source.name == "TESTPATHS" and not config.option.keyword:
        config.option.numprocesses = 2  # all tests: two at a time
