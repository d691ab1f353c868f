"""Tokenizer and streaming detokenizer: any split of the ids gives the text of the whole."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from byte_chat import byte_chat_format
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

import tritium
from tritium.chat import ChatFormat, load_chat
from tritium.chat.detokenize import Detokenizer
from tritium.chat.tokenizer import Tokenizer
from tritium.core import RequestError

TEXT = ["the naïve café — déjà vu, 日本語のテキスト, 한국어, 👩‍👩‍👧 🇨🇭 and e\u0301 \ufffd\n\tthe end\n\n"] * 20


def byte_level() -> Tokenizer:
    """Byte-level BPE as the family has it, its merges cutting through characters."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [line[i : i + 12] for line in TEXT for i in range(0, len(line), 5)],
        trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False),
    )
    inner.add_special_tokens([AddedToken("<|im_end|>")])
    inner.add_tokens([AddedToken("<think>", normalized=False), AddedToken("日 x", normalized=False)])
    return Tokenizer(inner)


def metaspace() -> Tokenizer:
    """Words with a leading space that the decoder drops from the first one, and bytes for all else."""
    words = ["▁the", "▁cat", "s", "▁", "é", "▁日本", "\ufffd", "a", "."]
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken("<s>")])
    return Tokenizer(inner)


def embedded() -> Tokenizer:
    directory = Path(tritium.__file__).parent / "embedded" / "dense"
    if not directory.is_dir():
        pytest.skip("no embedded model")
    return load_chat(directory).tokenizer


MAKERS = [byte_level, metaspace, lambda: byte_chat_format().tokenizer, embedded]


def random_ids(rng: random.Random, tokenizer: Tokenizer) -> list[int]:
    """Pieces of real text between random ids, some of them without a token."""
    ids: list[int] = []
    while len(ids) < 120:
        if rng.random() < 0.5:
            ids += [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(20))]
        else:
            ids += tokenizer.encode(rng.choice(TEXT)[rng.randrange(20) :])[: rng.randrange(60)]
    return ids


def pieces(tokenizer: Tokenizer, ids: list[int], hidden: frozenset[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, hidden=hidden)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@pytest.mark.parametrize("make", MAKERS, ids=["byte-level", "metaspace", "bytes", "embedded"])
@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_add_up_to_the_decode_of_the_whole(
    seed: int, make: Callable[[], Tokenizer], skip_special: bool
) -> None:
    rng, tokenizer = random.Random(seed), make()
    hidden = tokenizer.special_ids if skip_special else frozenset()
    for _ in range(120):
        ids = random_ids(rng, tokenizer)
        assert "".join(pieces(tokenizer, ids, hidden)) == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("make", MAKERS, ids=["byte-level", "metaspace", "bytes", "embedded"])
def test_what_one_stream_shows_another_hides(seed: int, make: Callable[[], Tokenizer]) -> None:
    rng, tokenizer = random.Random(seed), make()
    for _ in range(20):
        ids = [*random_ids(rng, tokenizer), *tokenizer.special_ids]
        for hides in (False, True, False):
            hidden = tokenizer.special_ids if hides else frozenset()
            assert "".join(pieces(tokenizer, ids, hidden)) == tokenizer.decode(ids, hides)


@pytest.mark.parametrize("make", MAKERS, ids=["byte-level", "metaspace", "bytes", "embedded"])
def test_no_piece_of_whole_text_has_half_a_character(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for text in TEXT[:5]:
        text = text.replace("\ufffd", "")
        found = pieces(tokenizer, tokenizer.encode(text), frozenset())
        assert "".join(found) == tokenizer.decode(tokenizer.encode(text))
        assert not any("\ufffd" in piece for piece in found)


def test_a_character_comes_out_with_its_last_byte_and_a_broken_end_with_the_flush() -> None:
    detokenizer = Detokenizer(byte_chat_format().tokenizer)
    assert [detokenizer.push(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert [detokenizer.push(byte) for byte in (0xF0, 0x9F, 0x98)] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_streams_of_broken_bytes_take_linear_time() -> None:
    tokenizer = byte_chat_format().tokenizer

    def seconds(tokens: int) -> float:
        start, detokenizer = time.process_time(), Detokenizer(tokenizer)
        for _ in range(tokens):
            detokenizer.push(0x80)
        return time.process_time() - start

    seconds(500)
    assert seconds(8000) < 40 * seconds(1000)  # 64 times for quadratic work


def test_encode_reads_special_tokens_and_decode_shows_them_on_demand() -> None:
    fake = byte_chat_format()
    ids = fake.encode("<|im_start|>é<think>")
    assert ids == [fake.tokenizer.token_id("<|im_start|>"), *"é".encode(), fake.tokenizer.token_id("<think>")]
    assert fake.decode(ids) == "é<think>"
    assert fake.decode(ids, skip_special=False) == "<|im_start|>é<think>"
    assert fake.decode([]) == ""
    assert fake.encode("") == []
    assert fake.tokenizer.vocab_size == max(ids[-1:]) + 6


def test_every_byte_survives() -> None:
    fake = byte_chat_format()
    text = "".join(chr(i) for i in range(0x500) if not 0xD800 <= i < 0xE000)
    assert fake.encode(text) == list(text.encode())
    assert fake.decode(fake.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", 3, None, b"bytes"])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(RequestError) as refused:
        byte_chat_format().encode(text)  # type: ignore[arg-type]
    assert refused.value.param == "prompt"


@pytest.mark.parametrize("id", [-1, 2**32, 1.0, "1", None, True])
def test_what_is_no_id_is_refused(id: object) -> None:
    with pytest.raises(RequestError, match="not a token id"):
        byte_chat_format().decode([65, id])  # type: ignore[list-item]


def test_padding_and_truncation_of_the_file_are_off() -> None:
    inner = byte_chat_format().tokenizer._inner
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    assert ChatFormat(Tokenizer(inner)).encode("abcd") == list(b"abcd")
