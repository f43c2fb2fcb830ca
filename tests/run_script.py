"""How the tests run a script of the project."""
import contextlib
import gc
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def run(script, cwd, *args, code=0):
    """What `python <script>.py <args>` does in `cwd`, in this process, which has imported everything already: a new one takes
    5 to 10 s for that. For what needs processes of its own (ranks, signals, variables), see `start`.

    Returns:
        what it wrote to stdout and to stderr.
    """
    def no_ranks():
        raise AssertionError("ranks need a process of their own")

    path, out, err, ended = str(ROOT / f"{script}.py"), io.StringIO(), io.StringIO(), 0
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    kept = sys.argv, os.fork, os.getcwd(), torch.get_num_threads()
    try:
        sys.argv, os.fork = [path, *map(str, args)], no_ranks
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        ended = end.code or 0
    finally:
        sys.argv, os.fork, folder, threads = kept
        os.chdir(folder)
        torch.set_num_threads(threads)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        gc.collect()  # scenes refer to each other
    out, err = out.getvalue(), err.getvalue()
    assert ended == code, f"exit code {ended}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def start(script, cwd, *args, launcher=(), env=None):
    """The running process of `python <launcher> <script>.py <args>`."""
    return subprocess.Popen([sys.executable, *launcher, str(ROOT / f"{script}.py"), *map(str, args)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ, **(env or {})))


def run_process(script, cwd, *args, code=0, env=None, launcher=()):
    """`run` in a process of its own."""
    process = start(script, cwd, *args, env=env, launcher=launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err
