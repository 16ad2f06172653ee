"""Which 32-bit numbers of a launch could overflow on their way to an address: interval arithmetic over Triton's IR.

Each integer of the kernel gets the interval that it may have in this launch: arguments are known, program numbers end
at the grid, loops at their bounds, loaded numbers at what :data:`LOADED` says. A sum, difference, product or narrowing
in 32 bits whose interval leaves them is a fault, if what it makes ends in an address or in the mask of an access. So a
missing cast to 64 bits shows without a tensor of 2^31 elements: on the meta device shapes may be as large as they like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Interval = tuple[int, int]

WORD = -(2**31), 2**31 - 1
# The largest numbers in memory, by the argument that points there: 2^20 tokens or blocks of a cache, 2^16 blocks of a
# sequence and 2^24 of all its rows together. Others of 32 bits may be anything.
LOADED = {
    "spans": 2**20, "tables": 2**20, "pattern": 2**10, "index": 2**16, "chosen": 2**16, "start": 2**24,
    "partial": 2**24,
}  # fmt: skip
OVERFLOWS = {"arith.addi", "arith.subi", "arith.muli", "arith.trunci"}
NAME = re.compile(r"%[\w.$-]+(?:#\d+)?")


@dataclass
class _Value:
    """One integer, or a pointer with the argument that it comes from."""

    interval: Interval
    made_of: list[_Value] = field(default_factory=list)
    pointer: str = ""
    fault: str = ""


@dataclass
class _Region:
    """A loop, a branch or a reduction whose lines are being read."""

    op: str
    results: list[str]
    carried: list[_Value] = field(default_factory=list)
    leaving: list[_Value] = field(default_factory=list)


class _Reader:
    def __init__(self, grid: Sequence[int], arguments: Mapping[str, object]):
        self.grid, self.arguments = [*grid, 1, 1][:3], arguments
        sizes = [n for n in arguments.values() if isinstance(n, int) and 0 < n < 2**31]
        self.most = max(sizes, default=0)
        self.values: dict[str, _Value] = {}
        self.regions: list[_Region] = []
        self.roots: list[_Value] = []

    def look_up(self, text: str) -> list[_Value]:
        """The values that a text names; what is no integer is anything."""
        return [self.values.setdefault(name, _Value(_of_bits(64))) for name in NAME.findall(text)]

    def header(self, line: str) -> None:
        """The IR may call an argument by another name: its place tells which one it is."""
        own = re.findall(r"(%[\w-]+): ", line)
        assert len(own) == len(self.arguments), (line, self.arguments)
        for name, (argument, number) in zip(own, self.arguments.items()):
            interval = (number, number) if isinstance(number, int) else _of_bits(64)
            self.values[name] = _Value(interval, pointer="" if isinstance(number, int) else argument)

    def line(self, line: str) -> None:
        names, _, text = line.partition(" = ") if line.startswith("%") else ("", "", line)
        op = text.split("(")[0].split(" ")[0].strip('"')
        if line.startswith("tt.func"):
            self.header(line)
        elif line.startswith("^"):
            self.block(line)
        elif line.startswith("}"):
            self.close(line)
        elif op in ("scf.yield", "scf.condition", "tt.reduce.return"):
            leaving = self.look_up(re.sub(r"^scf\.condition\([^)]*\)", "", text))
            self.regions[-1].leaving = _joined(self.regions[-1].leaving, leaving)
        elif op in ("scf.for", "scf.while", "scf.if", "tt.reduce"):
            self.open(op, names, text)
        elif names:
            self.values[names] = self.value(op, text)
        elif op == "tt.store":
            self.roots += self.look_up(text)[2:]  # the mask
        if op == "tt.load":
            self.roots += self.look_up(text)[1:2]

    def open(self, op: str, names: str, text: str) -> None:
        name, _, count = names.partition(":")
        results = [] if not names else [name] if not count else [f"{name}#{i}" for i in range(int(count))]
        region = _Region(op, results)
        pairs = re.findall(r"(%[\w-]+) = (%[\w#-]+)", text)
        if op == "scf.for":
            (number, first), *pairs = pairs
            begin, end = self.look_up(first)[0], self.look_up(text.split(" to ")[1])[0]
            least = begin.interval[0]
            self.values[number] = _Value((least, max(least, end.interval[1] - 1)), [begin, end])
        if op == "tt.reduce":
            region.carried = self.look_up(text.split("(")[1].split(")")[0])
        for own, first in pairs:
            value = self.look_up(first)[0]
            low, high = value.interval
            # A number that a loop counts up: by no more than the largest size.
            carried = _Value((low, max(high, min(high, WORD[1]) + self.most)), [value], value.pointer)
            self.values[own] = carried
            region.carried.append(carried)
        self.regions.append(region)

    def block(self, line: str) -> None:
        """Arguments of a block: of a reduction its operand, of a loop's second half what its condition handed on."""
        given = re.findall(r"(%[\w-]+): ", line)
        source = self.regions[-1].carried if self.regions else []
        for i, name in enumerate(given):
            self.values[name] = source[i % len(source)] if source else _Value(_of_bits(64))

    def close(self, line: str) -> None:
        if not self.regions or line.startswith("} else"):
            return
        region = self.regions[-1]
        if line.startswith("} do"):
            region.carried = _joined(region.carried, region.leaving)
            return
        self.regions.pop()
        for inside, leaving in zip(region.carried, region.leaving):
            if inside is not leaving:
                inside.made_of.append(leaving)
        made = region.leaving or region.carried
        if region.op in ("scf.for", "tt.reduce"):
            made = _joined(region.carried, region.leaving) if region.op == "scf.for" else region.carried
        for name, value in zip(region.results, made):
            self.values[name] = value

    def value(self, op: str, text: str) -> _Value:
        operands = self.look_up(text.split(" : ")[0])
        bits = _bits(text)
        value = _Value(_of_bits(bits), operands)
        if op == "tt.addptr":
            value.pointer = operands[0].pointer
            self.roots.append(operands[1])
        elif op == "tt.load":
            value.made_of = []
            if operands[0].pointer in LOADED and bits == 32:
                value.interval = 0, LOADED[operands[0].pointer]
        elif op == "tt.get_program_id" or op == "tt.get_num_programs":
            number = self.grid["xyz".index(text.split()[1])]
            value.interval = (number, number) if "num" in op else (0, number - 1)
        elif op == "tt.make_range":
            end, start = re.findall(r"= (\d+)", text)
            value.interval = int(start), int(end) - 1
        elif op == "arith.constant":
            constant = re.search(r"constant (?:dense<)?(-?\d+)>? : ", text)
            if constant:
                value.interval = int(constant[1]), int(constant[1])
        elif operands and (found := _computed(op, text, operands)) is not None:
            value.interval, value.pointer = found, operands[0].pointer
        if op in OVERFLOWS and bits == 32 and not WORD[0] <= value.interval[0] <= value.interval[1] <= WORD[1]:
            value.fault = f"{text.split(' loc(')[0]} is in {value.interval}"
            value.interval = WORD
        return value


def _computed(op: str, text: str, operands: list[_Value]) -> Interval | None:
    """The interval of an operator's result; None: anything of its type."""
    (a, b), *others = operands[0].interval, *(o.interval for o in operands[1:])
    if op in ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.extsi", "arith.trunci"):
        return a, b
    if op == "arith.extui" and a >= 0:
        return a, b
    if op == "arith.select":
        return min(x for x, _ in others), max(y for _, y in others)
    if not others:
        return None
    c, d = others[0]
    if op == "arith.addi":
        return a + c, b + d
    if op == "arith.subi":
        return a - d, b - c
    if op == "arith.muli":
        products = [x * y for x in (a, b) for y in (c, d)]
        return min(products), max(products)
    if op == "arith.divsi" and c > 0:
        return _quotient(a, c if a < 0 else d), _quotient(b, d if b < 0 else c)
    if op == "arith.remsi" and c > 0:
        return (0 if a >= 0 else 1 - d), min(max(b, 0), d - 1)
    if op in ("arith.minsi", "arith.maxsi"):
        pick = min if op == "arith.minsi" else max
        return pick(a, c), pick(b, d)
    return (0, 1) if op == "arith.cmpi" else None


def _quotient(a: int, b: int) -> int:
    return abs(a) // b * (1 if a >= 0 else -1)


def _of_bits(bits: int) -> Interval:
    return (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _bits(text: str) -> int:
    """Of the element of a result's type, which stands last; of what is no integer 64."""
    kind = text.split(" loc(")[0].split(" -> ")[-1].split(" to ")[-1].split(" : ")[-1]
    found = re.search(r"\bi(\d+)|x?i(\d+)>", kind)
    return int(found[1] or found[2]) if found else 64


def _joined(first: Iterable[_Value], second: Iterable[_Value]) -> list[_Value]:
    """Values that are the one or the other, place by place."""
    first, second = list(first), list(second)
    both = [
        _Value((min(a.interval[0], b.interval[0]), max(a.interval[1], b.interval[1])), [a, b], a.pointer)
        for a, b in zip(first, second)
    ]
    return both or first or second


def overflows(ir: str, grid: Sequence[int], arguments: Mapping[str, object]) -> list[str]:
    """The operations of a kernel's TTIR whose result may leave 32 bits before it makes an address.

    Args:
        grid: of the launch. arguments: those that are no constants of the kernel, in their order.
    """
    reader = _Reader(grid, arguments)
    for line in ir.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            reader.line(line.strip())
    found, seen, waiting = [], set(), list(reader.roots)
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            waiting += value.made_of
            found += [value.fault] if value.fault else []
    return found
