"""Calls repeated on several numbers of threads, for ops whose bits must not depend on it."""

import torch


def by_threads(function):
    """The results of a call on 1, 2 and 3 threads."""
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results
