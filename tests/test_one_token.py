"""What products of few bits are on NVIDIA, without a GPU: PTX written by hand, against the numbers of each scheme."""

from __future__ import annotations

import inspect
import random
import re
import struct

import pytest
import torch

pytest.importorskip("triton")

import ptx

from tritium.ops.kernels import four_bits, one_token
from tritium.ops.quantized import SCHEMES, Quantized, dequantize, quantize_activations


def written_in(function: object) -> str:
    """The PTX that a kernel's function holds."""
    return re.search(r'"""(\{.*?\})"""', inspect.getsource(function.fn), re.DOTALL)[1]  # type: ignore[attr-defined,index]


def bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def number(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


def weight(name: str, words: list[int]) -> list[float]:
    """What four words of a scheme stand for, but for scales."""
    scheme = SCHEMES[name]
    values = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.uint8)[None].view(scheme.values)
    columns = 128 // scheme.bits
    one = 127 if name == "mxfp4" else 1
    scales = torch.full((1, -(-columns // (scheme.group or columns))), one, dtype=scheme.scales)
    return [float(x) for x in dequantize(Quantized(values, scales, scheme, torch.float32), torch.float64)[0]]


def words_of(rng: random.Random, name: str) -> list[int]:
    return [rng.getrandbits(32) if name != "fp8" else  # e4m3 has a NaN in 0x7F and 0xFF
            int.from_bytes(bytes(rng.choice([b for b in range(256) if b & 127 != 127]) for _ in range(4)), "little")
            for _ in range(4)]


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_four_bits_by_integers_of_two_bytes(name: str, seed: int) -> None:
    """Exact: integers below 2^15 by the numbers of 4 bits."""
    rng, pack = random.Random(f"{name} {seed}"), written_in(one_token._bytes)
    for case in range(60):
        words = words_of(rng, name)
        edges = (-32512, 32512, 0, -1, 255, 256, -256, -257)
        columns = [rng.choice(edges) if case % 3 == 0 else rng.randint(-32512, 32512) for _ in range(32)]
        given = []
        for i in range(4):
            eight = columns[8 * i : 8 * i + 8]
            for four in ((eight[::2], eight[1::2]) if name == "int4" else (eight[:4], eight[4:])):
                given += ptx.run(pack, [bits(float(x)) for x in four])
        operands = words + given
        if name == "mxfp4":
            total = 0
            for one in given:
                [total] = ptx.run(written_in(one_token._twelve), [one, total])
            assert total == -12 * sum(columns) & 0xFFFFFFFF
            operands.append(total)
        text = one_token._four_words("int4" if name == "int4" else "e2m1")
        want = sum(w * x for w, x in zip(weight(name, words), columns)) * (16 if name == "int4" else 2)
        assert number(ptx.run(text, operands)[0]) == pytest.approx(want, rel=2**-24, abs=0)


def test_fp8_by_pairs_of_float16(seed: int) -> None:
    """Columns are rounded as the scheme says; of the sums eight are float16's."""
    rng, pack = random.Random(f"fp8 {seed}"), written_in(one_token._halves)
    for case in range(60):
        words = words_of(rng, "fp8")
        x = torch.tensor([rng.gauss(0, 1) * 448 / 4 for _ in range(16)]).clamp(-448, 448)
        x[rng.randrange(16)] = 448.0 if case % 2 else -448.0
        q, scale = quantize_activations(x[None], torch.float8_e4m3fn)
        assert float(scale) == 1.0
        given = [ptx.run(pack, [bits(float(v)) for v in x[4 * i : 4 * i + 4]])[0] for i in range(4)]
        products = [w * float(v) for w, v in zip(weight("fp8", words), q[0].double())]
        got = number(ptx.run(one_token._four_words("e4m3"), words + given)[0]) * 64
        assert abs(got - sum(products)) <= 2**-10 * sum(map(abs, products))


@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_tiles_of_four_bits_have_all_numbers(name: str, seed: int) -> None:
    """Two words of 16 bits at once: four planes of factors."""
    rng = random.Random(f"tiles {name} {seed}")
    plain, scaled = re.findall(r'"""(\{\.reg.*?\})"""', inspect.getsource(four_bits._planes.fn), re.DOTALL)
    for _ in range(100):
        words = [rng.getrandbits(16) for _ in range(2)]
        exponents = [rng.randint(36, 160) for _ in range(2)]  # weights of 2^-91 to 2^33
        both = words[0] | words[1] << 16
        if name == "int4":
            planes = ptx.run(plain, [both], results=4)
            want = [[1024 + (word >> 4 * j & 15) * (16 if j % 2 else 1) for word in words] for j in range(4)]
            dtype = torch.float16
        else:
            planes = ptx.run(scaled, [both, exponents[0] | exponents[1] << 16], results=4)
            numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
            want = [[numbers[word >> 4 * j & 7] * (-1) ** (word >> 4 * j + 3 & 1) * 2.0 ** (e - 127 - 32)
                     for word, e in zip(words, exponents)] for j in range(4)]
            dtype = torch.bfloat16
        got = torch.tensor(planes).to(torch.int32).view(dtype).view(4, 2)
        assert torch.equal(got.double(), torch.tensor(want, dtype=torch.float64))


def test_the_largest_of_pairs() -> None:
    """Signs and the lower half do not matter."""
    text = re.search(r'"(\{\.reg \.b32 t;.*?\})"', inspect.getsource(one_token.largest.fn))[1]  # type: ignore[index]
    three = torch.tensor([[1.5, -2.0], [-7.0, 0.25], [3.0, -9.5]], dtype=torch.bfloat16)
    pairs = 0
    for pair in three.view(torch.int16).view(torch.int32).flatten().tolist():
        [pairs] = ptx.run(text, [pairs, pair & 0xFFFFFFFF])
    assert (number(pairs << 16 & 0xFFFFFFFF), number(pairs & 0xFFFF0000)) == (7.0, 9.5)
