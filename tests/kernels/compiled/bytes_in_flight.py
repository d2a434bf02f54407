"""What compiled code says about memory-level parallelism: bytes in flight and resident programs.

Little's law: a device moves `bandwidth` bytes per second only while `bandwidth * latency` bytes are
on their way. From Triton's GPU dialect we read how many bytes one program keeps on their way; from
registers, warps and shared memory how many programs live on a processor. Their product, beside what
Little's law asks for, is a bound that needs no GPU. It says that a kernel *can* have enough loads
in flight, not that it reaches the bandwidth.
"""

import re

BITS = {"i8": 8, "i32": 32, "i64": 64, "bf16": 16, "f16": 16, "f32": 32}
# H200: 4.8 TB/s over 132 processors; 700 ns is a loaded HBM round trip on Hopper as published
# microbenchmarks give it (600 to 800). Its processors hold 64 warps, 64 Ki registers, 227 KiB of
# shared memory and 32 programs; a program costs 1 KiB of shared memory beside its own.
NEEDED = 4.8e12 * 700e-9 / 132
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 227 * 1024, 64, 32

_TENSOR = r"tensor<((?:\d+x)+)!tt\.ptr<(\w+)>"
_COPY = re.compile(r"async_copy_global_to_local %([A-Za-z_]+?)_?\d*,.*?: " + _TENSOR)
_LOAD = re.compile(r"%([A-Za-z_]+?)(?:_\d+)? = tt\.load .*?: " + _TENSOR)
_WAIT = re.compile(r"async_wait .*?\{num = (\d+)")


def resident_programs(row):
    """Programs of a kernel that one processor holds, from a row of the resource table."""
    # Registers are handed out per warp, in units of 256.
    per_warp = -(-row["registers"] * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // row["warps"]
    by_shared = SHARED // (row["shared"] + 1024)
    return min(PROGRAMS, WARPS // row["warps"], by_registers, by_shared)


def in_flight(ttgir):
    """(least, most) bytes of global loads one program keeps on their way.

    In a pipelined loop: what remains outstanding while a tile is worked on, and what is outstanding
    while the next one is waited for. Without one: nothing, and every load of the program, which
    the hardware issues before the first use. Tiles of x are left out: they come from L2.
    """
    least = most = 0
    for body in _loops(ttgir):
        copies = [(name, _num_bytes(shape, kind)) for name, shape, kind in _COPY.findall(body)]
        waits = [int(number) for number in _WAIT.findall(body)]
        if not copies or not waits:
            continue
        tile = sum(size for name, size in copies if not name.startswith("x"))
        # One commit group per copy, and the wait leaves `waits[0]` groups on their way.
        outstanding = waits[0] // len(copies) * tile
        least, most = max(least, outstanding), max(most, outstanding + tile)
    if most == 0:
        most = sum(_num_bytes(shape, kind) for _, shape, kind in _LOAD.findall(ttgir))
    return least, most


def _loops(ttgir):
    """The innermost loops' bodies."""
    bodies = []
    lines = ttgir.splitlines()
    starts = []
    for index, line in enumerate(lines):
        if "scf.for" in line:
            starts.append((index, len(line) - len(line.lstrip()), "scf.for"))
        elif starts and line.strip().startswith("}"):
            start, indent, _ = starts[-1]
            if len(line) - len(line.lstrip()) == indent:
                starts.pop()
                bodies.append("\n".join(lines[start:index]))
    return [body for body in bodies if body.count("scf.for") == 1]


def _num_bytes(shape, kind):
    count = 1
    for size in shape.rstrip("x").split("x"):
        count *= int(size)
    return count * (8 if kind.startswith("f8") else BITS[kind]) // 8


def streams(name):
    """Whether a row's kernel reads memory once; block copies use few programs by design."""
    kernel = name.split(" | ")[1]
    wanted = kernel in ("decode_kernel", "list_kernel", "kernel", "draw_kernel")
    return wanted and not name.startswith("kv_block")


def programs(name, row):
    """Programs on a processor: as many as fit, or the two that a split launch aims at."""
    split = name.startswith(("decode", "page_list", "key_list", "skinny_gemm"))
    return min(resident_programs(row), 2 if split else PROGRAMS)


def document(rows):
    """The streaming kernels' bound as a Markdown table, from a target's rows of the resources."""
    lines = [
        "| kernel | registers | shared memory | programs | least | most | most / needed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if not streams(name):
            continue
        count = programs(name, row)
        least, most = (size * count for size in row["in_flight"])
        title = name.removesuffix(" | kernel").split(" | ")[0]
        lines.append(
            f"| {title} | {row['registers']} | {row['shared'] / 1024:.0f} KiB | {count} "
            f"| {least / 1024:.0f} KiB | {most / 1024:.0f} KiB | {most / NEEDED:.1f} |"
        )
    return "\n".join(lines) + "\n"
