"""Slow processes: every process times the same small computation, and the one that needs far longer is named.

A step's own time cannot tell: in a synchronous step all processes wait for the slowest, so all look equally slow. The
probe has no collective in it; the engine gathers the times every `guards.ranks.every_steps` steps and judges them:

    times = gather(probe(device))                          # seconds, by rank
    verdict = judge(times, recipe.guards.ranks, hosts)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from sluice.training.guards import Verdict
from sluice.training.recipe_sections import RankGuard

LEAST_S = 1e-4
"""Differences of times below this are the clock's, not the computation's."""


def probe(device: Any, repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` matrix products: 512 x 512 in float32 on a CPU (0.27 GFLOP), 8192 x 8192 in
    bfloat16 on an accelerator (1.1 TFLOP; never run on one here).

    The fastest, because what delays one product (a page fault, the process beside it) does not make a process slow. A
    random generator of its own: the training's state must not move, or a resumed run would differ.
    """
    import torch

    on_cuda = torch.device(device).type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_cuda else (512, torch.float32)
    generator = torch.Generator(device=device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = math.inf
    with torch.no_grad():
        left @ left
        for _ in range(repeats):
            if on_cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                left @ left
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1000
            else:
                begun = time.perf_counter()
                left @ left
                seconds = time.perf_counter() - begun
            best = min(best, seconds)
    return best


def judge(times: Sequence[float], section: RankGuard, hosts: Sequence[str] = (), *, step: int = 0) -> Verdict:
    """`warn` or `stop`, as the recipe says, when a process needed more than `factor` x the median of the others.

    `times` in seconds, by rank; one that is no positive finite number is judged as slow as can be. Of the others, not
    of all: with two processes the median of all is half the slow one's own time, and no factor of 2 would ever be seen.
    `hosts`, by rank, are named where given.
    """
    if section.policy == "off" or len(times) < 2:
        return Verdict()
    measured = [seconds if math.isfinite(seconds) and seconds > 0 else math.inf for seconds in times]
    slow: list[tuple[float, int, float]] = []
    for rank, seconds in enumerate(measured):
        middle = max(median(measured[:rank] + measured[rank + 1 :]), LEAST_S)
        if math.isfinite(middle) and seconds > section.factor * middle:
            slow.append((seconds / middle, rank, middle))
    if not slow:
        return Verdict()
    named = []
    for factor, rank, _ in sorted(slow, reverse=True)[:4]:
        where = f" ({hosts[rank]})" if rank < len(hosts) else ""
        named.append(f"rank {rank}{where} {factor:.1f} x" if math.isfinite(factor) else f"rank {rank}{where} no time")
    more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
    done = "training goes on at its pace" if section.policy == "warn" else "training stops, as the recipe says"
    return Verdict(
        section.policy,
        "slow_rank",
        f"Step {step}: slower than {section.factor:g} x the other processes' median {slow[0][2] * 1000:.2f} ms in the "
        f"fixed probe: {', '.join(named)}{more}; {done}. {CAUSES}",
    )


CAUSES = (
    "Every step waits for the slowest. Look for thermal or power throttling (nvidia-smi -q -d PERFORMANCE), another "
    "process on the same cores or accelerator, or a failing device (dmesg: Xid, ECC)."
)
