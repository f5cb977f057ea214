"""How busy the main loop of a kernel keeps a multiprocessor, estimated from its SASS.

The model: an H100 SXM has 132 multiprocessors of four sub-cores at 1.755 GHz, and 3.35 TB/s. While memory moves the 512
bytes that a warp loads or stores with one 16-byte instruction, each sub-core has 4 · 512 / (3.35e12 / 132 / 1.755e9) =
142 cycles for that warp: the budget. A loop needs as many cycles as it has instructions (a sub-core issues one each
cycle), or more where a pipe is narrower than a warp (PIPES). `budget` is the busiest of them over the cycles that the
loop's own 16-byte accesses allow. Above about 0.7 the kernel will hardly reach the memory's bandwidth.

An estimate that finds regressions, not a speed. Among the innermost loops with 16-byte loads the most expensive one is
reported. Where it branches, the cheapest path with all its 16-byte accesses counts: rare branches cost nothing, and
inner loops without global loads count once. Latency, occupancy and the code before and after the loop are left out.
"""

import collections
import re
from dataclasses import dataclass

SUB_CORES, MULTIPROCESSORS, CLOCK, BANDWIDTH = 4, 132, 1.755e9, 3.35e12
CYCLES_PER_ACCESS = 32 * 16 * SUB_CORES / (BANDWIDTH / MULTIPROCESSORS / CLOCK)

# (pipe, cycles that an instruction of a warp occupies it, opcodes); the first match counts. The rest is integer and
# logic: 16 lanes a sub-core.
PIPES = (
    ("mufu", 8, r"MUFU|I2F|F2I|F2F(?!P)|FRND|POPC|FLO|BREV"),
    ("fp64", 2, r"D(?:ADD|MUL|FMA|SETP|MNMX)"),
    ("fma", 1, r"FADD|FMUL|FFMA"),
    ("imad", 2, r"IMAD"),
    ("memory", 4, r"LD[GSL]?(?!C)|ST[GSL]?|ATOM|RED|SHFL|CCTL"),
    ("uniform", 1, r"U[A-Z]|R2UR|S2UR|VOTEU"),
    ("control", 1, r"BRA|BSSY|BSYNC|EXIT|BAR|NOP|CALL|RET|WARPSYNC|DEPBAR|MEMBAR|LDC|YIELD"),
    ("alu", 2, r""),
)


def pipe_of(opcode):
    return next((pipe, cycles) for pipe, cycles, pattern in PIPES if re.match(pattern, opcode))


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!UP1", or nothing
    opcode: str
    operands: str

    @property
    def target(self):
        """Address that a branch jumps to; None for other instructions."""
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(match[1], 16) if match and self.opcode.startswith("BRA") else None

    @property
    def falls_through(self):
        return self.target is None or self.predicate != "" or "," in self.operands

    def wide(self, kinds="LDG|LDGSTS|STG"):
        return re.match(rf"(?:{kinds})\.E\S*\.128", self.opcode) is not None


def instructions_of(sass):
    """Those of one function in the output of cuobjdump -sass."""
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);"
    return [Instruction(int(a, 16), p.strip(), o, rest) for a, p, o, rest in re.findall(pattern, sass, re.M)]


def main_loops(instructions):
    """The instructions of each innermost loop (enclosed by a backward branch) that loads 16 bytes at least half as
    often as the one that does so most: this leaves out the remainder after an unrolled loop."""
    index = {x.address: i for i, x in enumerate(instructions)}
    loops = [
        (index[x.target], i + 1)
        for i, x in enumerate(instructions)
        if x.target is not None and x.target < x.address  # a branch to itself ends the function
    ]
    loads = {(a, b): sum(x.wide("LDG|LDGSTS") for x in instructions[a:b]) for a, b in loops}
    loops = [loop for loop in loops if loads[loop] > 0]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    most = max((loads[loop] for loop in inner), default=0)
    return [instructions[a:b] for a, b in inner if 2 * loads[a, b] >= most]


def cheapest_path(loop):
    """From the head to the backward branch: the path with most wide accesses and, among those, fewest instructions."""
    index = {x.address: i for i, x in enumerate(loop)}
    best = {len(loop) - 1: ((0, -1), None)}  # instruction: (value of the best path from it, its next instruction)
    for i in reversed(range(len(loop) - 1)):
        x = loop[i]
        following = [i + 1] if x.falls_through else []
        if x.target is not None and x.target > x.address:
            following.append(index.get(x.target))
        reachable = [(best[j][0], j) for j in following if j in best]
        if reachable:
            (wide, cost), j = max(reachable)
            best[i] = ((wide + x.wide(), cost - 1), j)
    path, i = [], 0 if 0 in best else None
    while i is not None:
        path.append(loop[i])
        i = best[i][1]
    return path


def accesses_of(path):
    """The number of 16-byte accesses; two under opposite predicates count once."""
    counts = collections.Counter(x.predicate for x in path if x.wide())
    pairs = sum(min(n, counts[p.replace("!", "")]) for p, n in counts.items() if "!" in p)
    return counts.total() - pairs


def need(loop):
    path = cheapest_path(loop)
    accesses = accesses_of(path)
    cycles = collections.Counter(issue=len(path))
    for pipe, count in (pipe_of(x.opcode) for x in path):
        cycles[pipe] += count
    busiest, most = max(cycles.items(), key=lambda item: item[1])
    return {
        "loop": len(path),
        "per16": round(len(path) / max(1, accesses), 1),
        "budget": round(most / (max(1, accesses) * CYCLES_PER_ACCESS), 2),
        "busiest": busiest,
    }


def budget(sass):
    """For one function: length of the main loop, instructions per 16-byte access, cycles over the budget."""
    none = {"loop": 0, "per16": 0.0, "budget": 0.0, "busiest": "–"}
    return max(map(need, main_loops(instructions_of(sass))), key=lambda n: n["budget"], default=none)
