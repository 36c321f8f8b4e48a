"""Several real processes that communicate by gloo, forked from one that has imported everything."""

import gc
import multiprocessing
import os
import signal
import socket
import traceback
from multiprocessing.connection import wait
from time import monotonic

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pvlf_hf.training.trainer", "pvlf_hf.search.gallery", "pvlf_hf.data.protocols", "transformers.trainer"]
)


def run_in_processes(number, function, *arguments, timeout=200, grace=60):
    """Return what a function returned in each process, by rank, or the text of its error, or how it was killed.

    All processes are killed `timeout` seconds after the start, or `grace` seconds after the first has ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(number):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_run, args=(theirs, rank, number, port, function, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    wait([pipe for _, pipe in started], timeout)
    end, outcomes = monotonic() + grace, []
    for process, pipe in started:
        try:
            outcomes.append(pipe.recv() if pipe.poll(max(0, end - monotonic())) else "not ended in time")
        except EOFError:
            process.join()
            outcomes.append(f"killed by {signal.Signals(-process.exitcode).name}")
    for process, _ in started:
        process.kill()
        process.join()
    return outcomes


def _run(pipe, rank, number, port, function, arguments):
    gc.freeze()  # collections leave what was imported before the fork, and the memory that it shares, alone
    torch.set_num_threads(1)
    if number > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        pipe.send(function(*arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
