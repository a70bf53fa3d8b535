"""Starts a process for each piece, and stops it when its time is over.

Works on every system: the parent measures the time, and kills. On Linux and macOS, processes are
copies of a server that has imported torch already: they start in a tenth of a second."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

SECONDS = 10  # a piece that takes longer is stopped
START_SECONDS = 120  # to import torch
MEMORY = 4 * 2**30  # bytes that a piece may add to what Python and torch need

method = "spawn" if sys.platform == "win32" else "forkserver"
PROCESSES = multiprocessing.get_context(method)
PRELOAD = ["__main__", "torch", "graders.student", "requests", "tiktoken", "matplotlib.figure"]
TESTS = Path(__file__).resolve().parent.parent


def start_server():
    """Start the server, if there is one on this system. Its imports take two seconds."""
    if method == "forkserver":
        from multiprocessing import forkserver

        PROCESSES.set_forkserver_preload(PRELOAD)
        os.environ["OMP_NUM_THREADS"] = "1"
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for the server
        forkserver.ensure_running()


# --- The parent's side ----------------------------------------------------------------------------
def ask(task, *arguments, seconds=SECONDS):
    """Return what a function of TASKS answers in a process of its own, as plain values.

    If there is no answer, it is {"seen": [], "wrong": why}."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(sender, task, arguments))
    process.start()
    sender.close()
    late = threading.Event()

    def stop():
        late.set()
        kill(process)

    timer = threading.Timer(START_SECONDS, stop)
    timer.start()
    try:
        receiver.recv_bytes()  # it has started
        timer.cancel()
        timer = threading.Timer(seconds, stop)
        timer.start()
        return json.loads(receiver.recv_bytes())
    except (EOFError, OSError, ValueError):
        if late.is_set():
            reason = f"it did not end within {seconds} s: an endless loop?"
        else:
            process.join(1)
            reason = f"its process ended without an answer (status {process.exitcode})"
            reason += ": no exit in the code, please; or did it need too much memory?"
        return {"seen": [], "wrong": reason}
    finally:
        timer.cancel()
        kill(process)
        process.join()
        receiver.close()


def kill(process):
    """End a process and those that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


# --- The child's side -----------------------------------------------------------------------------
def work(connection, task, arguments):
    """Do a task of TASKS, and send its answer as JSON. The first message says that it starts."""
    be_alone()
    import torch

    from graders import student

    torch.set_num_threads(1)
    function = {"observe": student.observe, "references": student.references}[task]
    if task == "observe":
        limit_memory()
    connection.send_bytes(b"ready")
    answer = function(*arguments)
    connection.send_bytes(json.dumps(answer).encode())
    os._exit(0)  # whatever a student's atexit or threads still want


def be_alone():
    """Leave the group of processes, to be killed as a whole; what is printed goes nowhere."""
    if hasattr(os, "setsid"):
        os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    options = {"encoding": "utf-8", "errors": "replace", "closefd": False}
    sys.stdout = open(1, "w", **options)  # noqa: SIM115
    sys.stderr = open(2, "w", **options)  # noqa: SIM115


def limit_memory():
    """Let this process take at most MEMORY more than it has. Only Linux can do that."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
