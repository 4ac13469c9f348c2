"""Two ways to do one thing, timed in turns, so that the machine's moods fall on both."""
import statistics
import time

import torch


def timed(f):
    """Seconds that f() takes."""
    began = time.perf_counter()
    f()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def pair(ours, theirs, rounds):
    """Seconds of each call of either, after three rounds to warm up: (ours, theirs)."""
    times = [], []
    for r in range(-3, rounds):
        for side in (0, 1) if r % 2 else (1, 0):                         # turns in who goes first
            seconds = timed((ours, theirs)[side])
            if r >= 0:
                times[side].append(seconds)
    return times


def compare(ours, theirs):
    """Medians in ms, and the ratio theirs / ours over the rounds: median, middle half, range."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return dict(ours_ms=1000 * statistics.median(ours), theirs_ms=1000 * statistics.median(theirs),
                ratio=middle, quartiles=[low, high], range=[min(ratios), max(ratios)])
