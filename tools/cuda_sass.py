"""What the main loop of a kernel asks of a multiprocessor, estimated from its SASS.

The model: an H100 SXM has 132 multiprocessors of four sub-cores at 1.755 GHz, and 3.35 TB/s. While memory moves the 512
bytes that a warp loads or stores with one 16-byte instruction, each sub-core has 4 · 512 / (3.35e12 / 132 / 1.755e9) =
142 cycles for that warp: the budget. A loop needs as many cycles as it has instructions (a sub-core issues one each
cycle), or more where a pipe is narrower than a warp (PIPES). `budget` is the busiest of them over the cycles that the
loop's own 16-byte accesses allow. Above about 0.7 the kernel will hardly reach the memory's bandwidth.

An estimate to hold against regressions, not a speed. Of the innermost loops that load 16 bytes, the one is shown that
needs most. Of its branches the cheapest way is counted that makes all its 16-byte accesses, so what is rare and what is
skipped costs nothing, and loops without global loads in it count once. It says nothing of latency, of occupancy, or of
what happens before and after.
"""

import collections
import re
from dataclasses import dataclass

SUB_CORES, MULTIPROCESSORS, CLOCK, BANDWIDTH = 4, 132, 1.755e9, 3.35e12
CYCLES_PER_ACCESS = 32 * 16 * SUB_CORES / (BANDWIDTH / MULTIPROCESSORS / CLOCK)

# (pipe, cycles for which a warp's instruction occupies it, of which opcodes); the first that matches. What remains is
# integer and logic: 16 lanes a sub-core.
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
        """Of a branch, None of others."""
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(match[1], 16) if match and self.opcode.startswith("BRA") else None

    @property
    def falls_through(self):
        return self.target is None or self.predicate != "" or "," in self.operands

    def wide(self, kinds="LDG|LDGSTS|STG"):
        return re.match(rf"(?:{kinds})\.E\S*\.128", self.opcode) is not None


def instructions_of(sass):
    """Of one function, as cuobjdump -sass writes them."""
    pattern = r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);"
    return [Instruction(int(a, 16), p.strip(), o, rest) for a, p, o, rest in re.findall(pattern, sass, re.M)]


def main_loops(instructions):
    """The instructions that a backward branch encloses, of the innermost loops that load 16 bytes: of those with at
    least half as many such loads as any, which leaves out what remains behind an unrolled loop."""
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


def cheapest_way(loop):
    """The instructions from the loop's head to its backward branch, on the way with most wide accesses, then fewest."""
    index = {x.address: i for i, x in enumerate(loop)}
    best = {len(loop) - 1: ((0, -1), None)}  # of each instruction: what follows it at best, and the next one
    for i in reversed(range(len(loop) - 1)):
        x = loop[i]
        following = [i + 1] if x.falls_through else []
        if x.target is not None and x.target > x.address:
            following.append(index.get(x.target))
        reachable = [(best[j][0], j) for j in following if j in best]
        if reachable:
            (wide, cost), j = max(reachable)
            best[i] = ((wide + x.wide(), cost - 1), j)
    way, i = [], 0 if 0 in best else None
    while i is not None:
        way.append(loop[i])
        i = best[i][1]
    return way


def accesses_of(way):
    """Its 16-byte accesses; of two under a predicate and its opposite one is made."""
    counts = collections.Counter(x.predicate for x in way if x.wide())
    pairs = sum(min(n, counts[p.replace("!", "")]) for p, n in counts.items() if "!" in p)
    return counts.total() - pairs


def need(loop):
    way = cheapest_way(loop)
    accesses = accesses_of(way)
    cycles = collections.Counter(issue=len(way))
    for pipe, count in (pipe_of(x.opcode) for x in way):
        cycles[pipe] += count
    busiest, most = max(cycles.items(), key=lambda item: item[1])
    return {
        "loop": len(way),
        "per16": round(len(way) / max(1, accesses), 1),
        "budget": round(most / (max(1, accesses) * CYCLES_PER_ACCESS), 2),
        "busiest": busiest,
    }


def budget(sass):
    """Of one function's SASS: instructions of the main loop and per 16-byte access, and its need over the budget."""
    none = {"loop": 0, "per16": 0.0, "budget": 0.0, "busiest": "–"}
    return max(map(need, main_loops(instructions_of(sass))), key=lambda n: n["budget"], default=none)
