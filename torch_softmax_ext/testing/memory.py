"""Peak memory of a call, by what torch's allocator was asked for."""

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function, device="cpu") -> int:
    """The most bytes that were allocated during ``function()``, on CUDA the second, above what was allocated before."""
    if torch.device(device).type == "cuda":
        function()  # the first matrix product of each thread allocates a workspace that stays
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    current = peak = 0
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
