"""Processes that die at a chosen write, at a chosen time, or on a full disk; and what comes after.

A child that is to die counts every call that makes a write durable or visible; at the chosen one it
tears whatever was not yet durable, as a power failure may, and kills itself. Then a second child
runs the same work to its end.
"""

import os
import resource
import signal
import sys
from contextlib import contextmanager

CALLS = ("fsync", "replace", "unlink", "rmdir")


def child(work):
    """Fork, run ``work``; returns the exit status of the child, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(call):
    """Make this process die at the ``call``-th durable write."""
    count = 0

    def wrapped(name, real):
        def run(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                if name == "fsync" and os.fstat(args[0]).st_mode & 0o100000:
                    os.truncate(f"/proc/self/fd/{args[0]}", os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


@contextmanager
def in_place(path):
    """What :func:`hooks.files.atomic_path` must not be: the suite has to notice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def small_files(limit):
    """Let no file of this process grow to ``limit`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 1, resource.RLIM_INFINITY))


def after_death(work, out, want, result, dies):
    """How ``work(out)`` ends that dies by ``dies`` and is started again: ``ok``, or why not."""
    status = child(lambda: (dies(), work(out)))
    if status == 0:
        return "lived"
    if status != -signal.SIGKILL:
        return f"failed before it could die ({status})"
    if child(lambda: work(out)) != 0:
        return "could not go on"
    return "ok" if result(out) == want else "went on to another result"


def at_every_write(work, folder, want, result, first=None):
    """Outcomes by number of the write at which ``work`` died, of all or the first few."""
    outcomes, call = {}, 0
    while outcomes.get(call) != "lived" and call != first:
        call += 1
        dies = lambda n=call: die_at(n)  # noqa: E731
        outcomes[call] = after_death(work, folder / f"call-{call}", want, result, dies)
    return {n: outcome for n, outcome in outcomes.items() if outcome != "lived"}


def on_full_disks(work, folder, whole, want, result):
    """Outcomes by size limit: each file of ``whole`` in turn is the first that does not fit."""
    outcomes = {}
    for limit in sorted({p.stat().st_size for p in whole.rglob("*") if p.is_file()})[1:]:
        out = folder / f"full-{limit}"
        status = child(lambda limit=limit, out=out: (small_files(limit), work(out)))
        again = child(lambda out=out: work(out))
        good = status == 1 and again == 0 and result(out) == want
        outcomes[limit] = "ok" if good else f"ended with {status}, then {again}"
    return outcomes
