"""Processes that measure one thing at a time, and can be stopped when it takes too long.

A compiled loop cannot be interrupted from within. So contestants that may run for ever run in a
worker; the worker of ours and Pyro's knows torch, that of the others knows JAX, and while one
measures the other waits.
"""

import contextlib
import multiprocessing
import warnings
from collections.abc import Callable
from typing import Any

import torch


class OverBudget(Exception):
    """A run took longer than it may, and was stopped."""


class Worker:
    """A process, started when it is first needed, and again after it had to be stopped.

    Args:
        setup: a module-level function that the process calls first.
        threads: of torch.
    """

    def __init__(self, setup: Callable[[], Any], threads: int = 1):
        self.setup, self.threads = setup, threads
        self._process: Any = None
        self._pipe: Any = None

    def run(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """What a module-level function returns.

        Raises:
            OverBudget: if it takes longer.
            RuntimeError: if it fails; the traceback is on the error stream.
        """
        if self._process is None:
            self._start()
        self._pipe.send((function, args))
        if not self._pipe.poll(seconds):
            self._process.kill()
            self.stop()
            raise OverBudget(f"more than {seconds:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            self.stop()
            raise RuntimeError("a worker failed: its traceback is above") from None

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._pipe.close()  # which it takes for an end
            self._process.join(10)
            self._process.kill()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, self.setup, self.threads), daemon=True
        )
        self._process.start()
        other.close()
        self._pipe.recv()  # it is ready


def _serve(pipe: Any, setup: Callable[[], Any], threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    setup()
    pipe.send("ready")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # nobody asks any more
            return
        answer = function(*args)
        with contextlib.suppress(BrokenPipeError):  # nor waits
            pipe.send(answer)
