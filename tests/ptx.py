"""As much PTX as the kernels write by hand, one thread of it, in Python: registers hold bits."""

from __future__ import annotations

import re
import struct

import numpy as np
import torch

MASK = 0xFFFFFFFF


def run(text: str, operands: list[int], results: int = 1) -> list[int]:
    """What `$0`, `$1`, ... hold at the end; `operands` are those that follow them."""
    registers = {f"${results + i}": bits for i, bits in enumerate(operands)}
    for line in re.sub(r"//.*", "", text).strip().removeprefix("{").removesuffix("}").split(";"):
        words = line.split(None, 1)
        if words and not words[0].startswith(".reg"):
            _step(words[0], [word.strip() for word in re.findall(r"\{[^}]*\}|[^,\s{][^,]*", words[1])], registers)
    return [registers[f"${i}"] for i in range(results)]


def _step(name: str, words: list[str], registers: dict[str, int]) -> None:
    op, *kinds = name.split(".")
    target, *given = words
    if op == "mov" and target.startswith("{"):
        size = 16 if kinds[0] == "b32" else 32
        for i, part in enumerate(target.strip("{}").split(",")):
            registers[part.strip()] = _value(given[0], registers) >> size * i & (1 << size) - 1
        return
    registers[target] = _computed(op, kinds, given, registers)


def _value(word: str, registers: dict[str, int]) -> int:
    if word.startswith("{"):  # of two halves of 64 bits
        low, high = (_value(part.strip(), registers) for part in word.strip("{}").split(","))
        return low | high << 32
    if word.startswith("0f"):
        return int(word[2:], 16)
    return registers[word] if word in registers else int(word, 0) & MASK


def _computed(op: str, kinds: list[str], given: list[str], registers: dict[str, int]) -> int:
    a, b, c, *more = (*(_value(word, registers) for word in given), 0, 0, 0)[: max(3, len(given))]
    match op, *kinds:
        case ["mov", *_]:
            return a
        case ["and", "b32"]:
            return a & b
        case ["xor", "b32"]:
            return a ^ b
        case ["shl", "b32"]:
            return a << b & MASK
        case ["shr", "u32"]:
            return a >> b
        case ["sub", "s32"]:
            return a - b & MASK
        case ["add", "s32"]:
            return a + b & MASK
        case ["mad", "lo", "s32"]:
            return a * b + c & MASK
        case ["lop3", "b32"]:
            rows = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32)]
            return sum((more[0] >> row & 1) << i for i, row in enumerate(rows))
        case ["prmt", "b32"]:
            return _permuted(a | b << 32, c)
        case ["dp4a", left, right]:
            return c + sum(_byte(a, i, left) * _byte(b, i, right) for i in range(4)) & MASK
        case ["min", "u32"]:
            return min(a, b)
        case ["mad", "lo", "u32"]:
            return a * b + c & MASK
        case ["fma", "rn", "bf16x2"]:
            low, high = (_brain(a >> i) * _brain(b >> i) + _brain(c >> i) for i in (0, 16))
            two = torch.tensor([low, high], dtype=torch.float64).bfloat16().view(torch.int16)
            return int(two[0]) & 0xFFFF | (int(two[1]) & 0xFFFF) << 16
        case ["max", "bf16x2"]:
            return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16  # of positive ones
        case ["add", "f32"]:
            return _bits(np.float32(_float(a)) + np.float32(_float(b)))
        case ["cvt", "rn", "f32", "s32"]:
            return _bits(np.float32(a - (a >> 31 << 32)))
        case ["cvt", "f32", "f16"]:
            return _bits(np.float32(_half(a)))
        case ["cvt", "rn", "f16x2", "e4m3x2"]:
            return _pair(
                *(float(torch.tensor([a >> 8 * i & 255], dtype=torch.uint8).view(torch.float8_e4m3fn)) for i in (0, 1))
            )
        case ["cvt", "rn", "satfinite", "e4m3x2", "f32"]:
            high, low = (
                torch.tensor([_float(x)]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8) for x in (a, b)
            )
            return int(low) | int(high) << 8
        case ["mul" | "fma", "rn", "f16x2"]:
            return _pair(*(_half(a >> i) * _half(b >> i) + (_half(c >> i) if op == "fma" else 0.0) for i in (0, 16)))
    raise NotImplementedError(".".join([op, *kinds]))


def _permuted(eight: int, index: int) -> int:
    out = 0
    for i in range(4):
        nibble = index >> 4 * i & 15
        byte = eight >> 8 * (nibble & 7) & 255
        out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def _byte(word: int, i: int, kind: str) -> int:
    byte = word >> 8 * i & 255
    return byte - 256 if kind == "s32" and byte > 127 else byte


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _bits(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def _half(bits: int) -> float:
    return float(np.uint16(bits & 0xFFFF).view(np.float16))


def _brain(bits: int) -> float:
    return _float((bits & 0xFFFF) << 16)


def _pair(low: float, high: float) -> int:
    return int(np.float16(low).view(np.uint16)) | int(np.float16(high).view(np.uint16)) << 16


def overwritten(text: str) -> list[str]:
    """Of a kernel's loops, what writes a register that a product of the matrix units which is not waited for reads."""
    lines = [part.strip() for part in re.split(r"[;\n]", re.sub(r"//.*", "", text)) if part.strip()]
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line)}
    found: list[str] = []
    for at, line in enumerate(lines):
        back = re.search(r"\bbra\S*\s+(\$\w+)", line)
        body = lines[labels[back[1]] : at] if back and labels.get(back[1], at) < at else []
        if any("wgmma.mma_async" in line for line in body):
            found += _in_flight([*body, *body])
    return found


def _in_flight(lines: list[str]) -> list[str]:
    asked, groups, found = set[str](), list[set[str]](), []
    for line in lines:
        vectors = [set(re.findall(r"%\w+", vector)) for vector in re.findall(r"\{([^}]*)\}", line)]
        if "wgmma.mma_async" in line:
            asked |= vectors[1] if len(vectors) > 1 else set()
        elif "wgmma.commit_group" in line:
            groups, asked = [*groups, asked], set()
        elif waits := re.search(r"wgmma\.wait_group\S*\s+(\d+)", line):
            groups = groups[-int(waits[1]) :] if int(waits[1]) else []
        else:
            target = re.match(r"(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)", line)
            found += [line] if target and asked.union(*groups) & set(re.findall(r"%\w+", target[1])) else []
    return found
