"""What a compiled kernel costs, read from its machine code (SASS): nothing here is a time.

The numbers that matter are those of the loop: everything outside it happens once per program. An
attention kernel's is known by its exponentials, one per score.
"""

import re
import subprocess
import tempfile

import triton

# Address, opcode and operands of `/*0a40*/ @P0 BRA 0x900 ;`
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
TENSOR_CORE = r"HGMMA|HMMA|UTCHMMA"  # sm_90; sm_80 … 89 and 120; sm_100
EXP2 = r"MUFU\.EX2"


def _tool(name: str, *arguments) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _loops(instructions: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """The instructions from each backward branch's target to the branch."""
    found = []
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        if target and (start := int(target[1], 16)) < address:
            found.append([i for i in instructions if start <= i[0] <= address])
    return found


def loop(instructions: list[tuple[int, str, str]]) -> list[str] | None:
    """Opcodes of the shortest loop that has most of the exponentials; None without any."""
    bodies = [[opcode for _, opcode, _ in body] for body in _loops(instructions)]
    most = max((count(body, EXP2) for body in bodies), default=0)
    full = [body for body in bodies if most and count(body, EXP2) == most]
    return min(full, key=len, default=None)


def count(opcodes: list[str], pattern: str) -> int:
    return sum(bool(re.match(pattern, opcode)) for opcode in opcodes)


def measure(name: str, options: dict, compiled) -> dict:
    """One line of the report: registers, stack, shared memory and instructions of a kernel.

    Of attention's loop also the instructions that a thread issues per score of its own, and how
    often each score's exponential is computed: 1.0 is once, and a little more in the forward, which
    rescales by one more exponential per row. 2.0 is two warps doing the same work.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    instructions = [(int(at, 16), op, rest) for at, op, rest in INSTRUCTION.findall(sass)]
    opcodes = [opcode for _, opcode, _ in instructions]
    body = loop(instructions) if "BLOCK_N" in options else None
    per_score = {"slots_per_score": None, "exp2_per_score": None}
    if body:
        scores = options["BLOCK_M"] * options["BLOCK_N"] / (32 * options["num_warps"])
        slots = len(body) - count(body, "NOP")
        per_score["slots_per_score"] = round(slots / scores, 2)
        per_score["exp2_per_score"] = round(count(body, EXP2) / scores, 2)
    return {
        "kernel": name.lstrip("_"),
        "options": " ".join(f"{name}={value}" for name, value in options.items()),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "instructions": len(opcodes),
        "tensor_core": count(opcodes, TENSOR_CORE),
        "exp2": count(opcodes, EXP2),
        "local_memory": count(opcodes, "LDL|STL"),
        "wgmma_waits": count(opcodes, r"WARPGROUP\.DEPBAR"),
        **per_score,
    }
