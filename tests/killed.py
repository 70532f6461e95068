"""A run that is killed again and again while it writes its answers."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def kill_twenty_times(answer: Callable[[], object], file: Path, size: int) -> None:
    """Run `answer` in processes of its own that are killed at random sizes of `file`, which it fills up to about `size` bytes.

    At least ten of them have not been at their end.
    """
    rng, interrupted = np.random.default_rng(0), 0
    for _ in range(20):
        end = (file.stat().st_size if file.exists() else 0) + rng.uniform(1, size / 12)
        process = multiprocessing.get_context("fork").Process(target=answer)
        process.start()
        while process.is_alive() and (not file.exists() or file.stat().st_size < end):
            time.sleep(0.001)
        interrupted += process.is_alive()
        process.kill()
        process.join()
    assert interrupted >= 10
