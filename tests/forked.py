"""Python programs that start fast: each is a fork of one process that has imported PyTorch, but nothing of ours.

Half of a program's start is the import of PyTorch and what it draws in; most of the rest is that of Hugging Face's
libraries. These read their variables when they are imported, so that a program imports them itself, unless it asks for
a fork of a process that has done so with its variables. `pvlf_hf` is what the tests are about: no process has it.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace

PRELOADED = """torch torch._dynamo.convert_frame torch.distributed.tensor torch.export scipy.optimize scipy.stats
pandas pyarrow PIL.Image httpx yaml regex tokenizers safetensors.torch""".split()

LIBRARIES = """accelerate datasets transformers.trainer transformers.pipelines ipykernel.kernelapp
transformers.models.blip.modeling_blip transformers.models.clip.modeling_clip""".split()

READ_BY_LIBRARIES = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "ACCELERATE_", "XDG_", "USE_")
"""Beginnings of the names of variables that are read when the libraries are imported."""

WITHOUT_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pvlf_hf":
            raise ImportError("pvlf_hf is hidden")

sys.meta_path.insert(0, Hidden())
"""
"""Start of a program that runs as if `pvlf_hf` were not installed."""


def run_without_package(program, home, *arguments):
    """Run a program as if `pvlf_hf` were not installed, offline, with Hugging Face's caches in the folder `home`."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**known, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = run_python(["-c", WITHOUT_PACKAGE + program, *arguments], env=env, cwd=home)
    assert done.returncode == 0, done.stderr


def run_python(command, *, env=None, cwd=None, timeout=300, libraries=False):
    """Run `python *command` in a fork and return what `subprocess.run` does with `capture_output` and `text`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = Forked(command, files, env=env, cwd=cwd, libraries=libraries)
        code = process.wait(timeout)
        if code is None:
            process.kill()
            process.wait()
        stdout, stderr = (file.read_text() for file in files)
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


class Forked:
    """`python *command` in a fork with a session of its own, as a `subprocess.Popen`; the next starts after its end.

    Args:
        command: begins with `-c` and code, `-m` and a module, or a file.
        files: for its standard output and error, new or appended to.
        env: one OMP thread, unless it says another number.
        cwd: folder that it runs in.
        libraries: whether Hugging Face's libraries are imported already, for a program that is not about importing.
    """

    stdin = stdout = stderr = None  # no pipes

    def __init__(self, command, files, *, env=None, cwd=None, libraries=False):
        env = dict(os.environ if env is None else env)
        threads = env.setdefault("OMP_NUM_THREADS", "1")
        ours = {"PYTHONPATH", *(name for name in os.environ if env.get(name) == os.environ[name])}
        read = {name for name in env if name.startswith("PYTHON")} - ours - {"PYTHONIOENCODING"}
        assert not read, f"{read} are read when Python starts"
        job = {"command": [*map(str, command)], "env": env, "cwd": str(cwd or Path.cwd()), "files": [*map(str, files)]}
        known = {name: value for name, value in env.items() if name.startswith(READ_BY_LIBRARIES)}
        self._server = _server_with_libraries(threads, frozenset(known.items())) if libraries else _server(threads)
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid, self.returncode = int(self._server.stdout.readline()), None

    def wait(self, timeout=None):
        """Return its exit code, None if it has not ended within some seconds."""
        if self.returncode is None and select.select([self._server.stdout], [], [], timeout)[0]:
            self.returncode = int(self._server.stdout.readline())
        return self.returncode

    def poll(self):
        """Return its exit code, None while it runs."""
        return self.wait(0)

    def send_signal(self, number):
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """End it and every process of its session's group."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


@cache
def _server(threads):
    """Start the process that is forked, in which PyTorch has as many threads; it ends with this one."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": threads}
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    # Without buffers: a line that is read ahead would not be seen by `select`.
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, cwd="/", env=env)
    atexit.register(server.communicate)
    return server


@cache
def _server_with_libraries(threads, variables):
    """Let the process with PyTorch fork one that imports `LIBRARIES`, too, with these variables, and is forked."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(READ_BY_LIBRARIES)}
    env = {**known, "OMP_NUM_THREADS": threads, **dict(variables)}
    with tempfile.TemporaryDirectory() as folder:
        pipes = [str(Path(folder, name)) for name in ("jobs", "answers")]
        for pipe in pipes:
            os.mkfifo(pipe)
        server = _server(threads)
        server.stdin.write(json.dumps({"pipes": pipes, "env": env}).encode() + b"\n")
        server.stdout.readline()  # its process, which ends when the pipes are closed
        return SimpleNamespace(stdin=Path(pipes[0]).open("wb", 0), stdout=Path(pipes[1]).open("rb", 0))


def _serve(modules, hidden):
    """Import modules, fork for each job, print the process and how it ended; return the job in the process for it."""
    for name in modules:
        __import__(name)
    ours = [name for name in sys.modules if name.partition(".")[0] in hidden]
    assert not ours, ours
    gc.freeze()  # a child's collections leave these objects, and the memory that it shares, alone
    while line := sys.stdin.readline():
        job = json.loads(line)
        process = os.fork()
        if not process and "pipes" not in job:
            return job
        if not process:
            return _serve_on_pipes(job)
        print(process, flush=True)
        if "pipes" not in job:
            _, status = os.waitpid(process, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)  # as below


def _serve_on_pipes(job):
    """Import `LIBRARIES` with a job's variables and serve on its pipes; the same result."""
    os.environ.clear()
    os.environ.update(job["env"])
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY)):
        opened = os.open(job["pipes"][number], flags)
        os.dup2(opened, number)
        os.close(opened)
    return _serve(LIBRARIES, ("pvlf_hf",))


def _become(job):
    """Make this process the one that Python would have started, and return its code by name."""
    os.setsid()
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND  # output and error may be one file
    for number, file in ((0, os.devnull), *enumerate(job["files"], 1)):
        opened = os.open(file, flags if number else os.O_RDONLY, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    if encoding := job["env"].get("PYTHONIOENCODING"):  # as Python does at its start
        sys.stdout.reconfigure(encoding=encoding)
        sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
    kind, *rest = job["command"]
    first = "" if kind == "-c" else job["cwd"] if kind == "-m" else str(Path(kind).resolve().parent)
    path = job["env"].get("PYTHONPATH")
    sys.path[:1] = [first, *(path.split(os.pathsep) if path else [])]
    sys.argv = ["-c", *rest[1:]] if kind == "-c" else [*rest] if kind == "-m" else [kind, *rest]
    return kind, rest


def _run(kind, rest):
    """Run the program to its end and return its exit code."""
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        else:
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = _run(*_become(_serve(PRELOADED, ("huggingface_hub", "transformers", "pvlf_hf"))))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as multiprocessing does: taking all modules apart takes seconds
