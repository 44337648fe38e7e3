"""Time, memory and tables, on any device: for the demo and for the programs in bench/."""

import ctypes
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time

import torch

# ---- time


def seconds_per_call(call, calls, device="cpu"):
    if torch.device(device).type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def interleaved(
    calls, rounds=5, min_seconds=0.02, max_seconds=None, device="cpu", pick=statistics.median, on_round=lambda: None
):
    """Seconds a call of each function in the dict `calls`, by name: of several turns the median, or another `pick`.

    They take turns, so that a slow spell of the machine hits all of them, each round in another order, because a busy
    call leaves a warm chip to the next; a turn lasts at least min_seconds. No round is begun after max_seconds, except
    the first.
    """
    repeats = {}
    for name, call in calls.items():
        seconds = seconds_per_call(call, 1, device)
        if seconds < max(min_seconds, 0.5):  # the first call may be slow for reasons of its own
            seconds = seconds_per_call(call, 1, device)
        repeats[name] = max(1, round(min_seconds / seconds))
    samples = {name: [] for name in calls}
    orders = random.Random(0)
    begin = time.perf_counter()
    for done in range(rounds):
        if done == 0 or max_seconds is None or time.perf_counter() - begin < max_seconds:
            for name in orders.sample(list(calls), len(calls)):
                samples[name].append(seconds_per_call(calls[name], repeats[name], device))
        on_round()
    return {name: pick(times) for name, times in samples.items()}


# ---- memory


def peak_memory(make, *args, threads=None):
    """By how many bytes memory grows at its peak while `make(*args)()` runs, its result included; None if unknown.

    make, a function of a module, prepares the inputs and returns the function to measure; it should run it once on
    small inputs, so that code and threads are there. On CPUs this happens in a process of its own, because allocators
    keep memory. Raises RuntimeError where that process dies, as it does when memory runs out.
    """
    threads = threads or torch.get_num_threads()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "flash_ext"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, make, args, threads))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if isinstance(result, int):
        return result
    raise RuntimeError(result or f"the measuring process ended with exit code {process.exitcode}")


def _measure_peak(sender, make, args, threads):
    try:
        torch.set_num_threads(threads)
        call = make(*args)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            torch.cuda.synchronize()
            growth = torch.cuda.max_memory_allocated() - before
        else:
            _give_back_free_memory()
            _reset_peak()
            before = _peak()
            result = call()
            growth = _peak() - before
        del result
        sender.send(growth)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _give_back_free_memory():
    """What making the inputs has left to the allocator would hide as much of the growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # not glibc


def _reset_peak():
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # not Linux: the peak so far, that of making the inputs, is then the base


def _peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def available_memory():
    """Bytes that a process can still take without swapping; None if unknown."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


# ---- words


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def progress(total, title):
    """A progress bar of tqdm; where nobody watches, a line of the log now and then."""
    from tqdm import tqdm

    watched = sys.stderr.isatty()
    return tqdm(total=total, desc=title, leave=not watched, mininterval=0.1 if watched else 30)


def busy(seconds=0.4):
    """A warning where other programs use the processor, found by watching it while we do nothing; else None."""

    def ticks():
        with open("/proc/stat") as file:
            times = [int(word) for word in file.readline().split()[1:]]
        return sum(times[:8]), times[3] + times[4]  # all, idle

    try:
        total, idle = ticks()
        time.sleep(seconds)
        total, idle = (now - before for now, before in zip(ticks(), (total, idle), strict=True))
    except (OSError, ValueError, IndexError):
        return None
    if total and idle < 0.8 * total:
        return (
            f"other programs use {1 - idle / total:.0%} of this machine: times will be too long, and ratios are rough"
        )
    return None


def table(header, rows, markdown=False):
    """Lines of text: the first column to the left, the others to the right. A row None is a gap."""
    cells = [[str(cell) for cell in row] for row in [header, *filter(None, rows)]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row):
        padded = [
            str(cell).rjust(width) if i else str(cell).ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    else:
        rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *("" if row is None else line(row) for row in rows if row or not markdown)])


def milliseconds(seconds):
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def megabytes(count):
    if count is None:
        return "-"
    return f"{count / 2**20:.1f} MB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MB"
