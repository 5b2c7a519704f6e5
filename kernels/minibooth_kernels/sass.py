"""What a compiled kernel costs, read from its machine code (SASS): nothing here is a time.

The numbers that matter are those of the loop: everything outside it happens once per program. An
attention kernel's is known by its exponentials, one per score.
"""

import re
import subprocess
import tempfile

import triton

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"(\.L\w+):")
TENSOR_CORE = r"HGMMA|HMMA|UTCHMMA"  # sm_90; sm_80 … 89 and 120; sm_100
EXP2 = r"MUFU\.EX2"


def _tool(name: str, *arguments) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def loop(sass: str) -> list[str] | None:
    """Opcodes of the innermost loop with the most exponentials; None without any.

    A loop reaches from a label to a later branch back to it.
    """
    opcodes, labels, found = [], {}, []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := INSTRUCTION.match(line):
            opcodes.append(instruction[1])
            target = re.search(r"\.L\w+", instruction[2]) if instruction[1] == "BRA" else None
            if target and target[0] in labels:  # seen before: backward
                body = opcodes[labels[target[0]] :]
                inside = any(start >= labels[target[0]] for start, _ in found)
                if count(body, EXP2) and not inside:
                    found.append((labels[target[0]], body))
    return max((body for _, body in found), key=lambda body: count(body, EXP2), default=None)


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
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)  # code alone, no analysis of its flow
    opcodes = [opcode for opcode, _ in INSTRUCTION.findall(sass)]
    # On 10.x an iteration may do two blocks, one for each of two accumulators: no figures there.
    one_block = "BLOCK_N" in options and not count(opcodes, "UTCHMMA")
    body = loop(sass) if one_block else None
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
