"""Ids to text as they arrive, the pieces adding up to the decode of the whole."""

from __future__ import annotations

import re

from tritium.chat.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WINDOW = 24
_KEEP = 8
_BROKEN = "\ufffd"


class Detokenizer:
    """Incremental decode: any split of the ids gives the text of `Tokenizer.decode` of all of them.

    The last ids are decoded again with each push, so that what a token's text owes to its left neighbours (a
    character begun by them, a space dropped at the start of a text) comes out right. The window is cut to its
    last `_KEEP` tokens when it has grown to `_WINDOW`: UTF-8 finds its character borders again within three bytes,
    so the text after that many tokens is the same from either start. Work per token is constant. Where tokens are
    bytes and nothing else, it starts anew after every whole character.

    Held back until more is known: a final U+FFFD, which may be the beginning of a character (at most three bytes,
    which decode to exactly one U+FFFD), and a run of byte tokens `<0xE2>`, which is decoded as one.
    """

    def __init__(self, tokenizer: Tokenizer, *, hidden: frozenset[int] = frozenset()) -> None:
        """`hidden`: ids that leave no text."""
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._window: list[int] = []
        self._emitted = 0
        """Characters of the window's text already handed out."""

    def flush(self) -> str:
        """What is still held back, a broken end as U+FFFD."""
        text = self._tokenizer.text(self._window)
        piece, self._emitted = text[self._emitted :], len(text)
        return piece

    def push(self, id: int) -> str:
        if not self._window and id not in self._hidden and (known := self._tokenizer.whole.get(id)) is not None:
            return known
        token = None if id in self._hidden else self._tokenizer.token(id)
        if token is None:
            return ""
        self._window.append(id)
        if token[:1] == "<" and _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._tokenizer.text(self._window)
        settled = max(len(text) - text.endswith(_BROKEN), self._emitted)
        piece, self._emitted = text[self._emitted : settled], settled
        if settled == len(text) and self._tokenizer.is_byte_level:
            if len(self._window) == 1:
                self._tokenizer.whole[id] = piece
            self._window, self._emitted = [], 0
        elif len(self._window) >= _WINDOW:
            self._window = self._window[-_KEEP:]
            self._emitted += len(self._tokenizer.text(self._window)) - len(text)
        return piece
