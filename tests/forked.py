"""Python programs that start fast: each is a fork of one process that has imported PyTorch, but nothing of ours.

Half of a program's start is the import of PyTorch and what it draws in. Hugging Face's libraries read their variables
when they are imported, and `pvlf_hf` is what the tests are about; so each program imports these itself.
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

PRELOADED = """torch torch._dynamo.convert_frame torch.distributed.tensor torch.export scipy.optimize scipy.stats
pandas pyarrow PIL.Image httpx yaml regex tokenizers safetensors.torch""".split()


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


def run_python(command, *, env=None, cwd=None, timeout=300):
    """Run `python *command` in a fork and return what `subprocess.run` does with `capture_output` and `text`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = Forked(command, files, env=env, cwd=cwd)
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
    """

    stdin = stdout = stderr = None  # no pipes

    def __init__(self, command, files, *, env=None, cwd=None):
        env = dict(os.environ if env is None else env)
        threads = env.setdefault("OMP_NUM_THREADS", "1")
        ours = {"PYTHONPATH", *(name for name in os.environ if env.get(name) == os.environ[name])}
        read = {name for name in env if name.startswith("PYTHON")} - ours - {"PYTHONIOENCODING"}
        assert not read, f"{read} are read when Python starts"
        job = {"command": [*map(str, command)], "env": env, "cwd": str(cwd or Path.cwd()), "files": [*map(str, files)]}
        self._server = _server(threads)
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


def _serve():
    """Fork for each job, print the process and how it ended; return the job in the process that is to do it."""
    for name in PRELOADED:
        __import__(name)
    ours = [name for name in sys.modules if name.partition(".")[0] in ("huggingface_hub", "transformers", "pvlf_hf")]
    assert not ours, ours
    gc.freeze()  # a child's collections leave these objects, and the memory that it shares, alone
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return json.loads(line)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


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
    code = _run(*_become(_serve()))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as multiprocessing does: taking all modules apart takes seconds
