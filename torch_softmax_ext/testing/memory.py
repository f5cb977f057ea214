"""Peak memory of a call, as torch's allocator counts it."""

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function, device="cpu") -> int:
    """The peak of allocated bytes during ``function()``, minus those allocated before; on CUDA, of its second call."""
    if torch.device(device).type == "cuda":
        function()  # the first matrix product allocates a workspace that stays
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
