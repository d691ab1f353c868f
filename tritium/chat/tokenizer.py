"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from tritium.core.errors import CheckpointError, RequestError, one_line


class Tokenizer:
    """A `tokenizers.Tokenizer` with padding and truncation off and clear errors.

    Special tokens written in a text are read as the tokens they name, as a rendered chat template needs.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """One more than the largest id; a model's embedding may have more rows."""
        self.is_byte_level = isinstance(inner.decoder, tokenizers.decoders.ByteLevel)
        """Whether a token stands for the same bytes wherever it comes."""
        self.whole: dict[int, str] = {}
        """The texts of tokens seen that are whole characters wherever they come."""

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads `tokenizer.json`. Raises `CheckpointError` when it is missing or cannot be read."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer.json in {directory}", hint="--tokenizer DIRECTORY that has one")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            reason = one_line(error)
            raise CheckpointError(f"{path} cannot be read: {reason}", hint="fetch the file again") from error

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of `text`; `add_special` adds what the tokenizer itself puts around a text (a BOS, say).

        Raises `RequestError` for what is no text: not a string, or a lone surrogate in it.
        """
        check_text(text, "prompt")
        # The batch form releases the GIL: a prompt of megabytes does not hold up the other requests.
        return self._inner.encode_batch_fast([text], add_special_tokens=add_special)[0].ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; broken UTF-8 becomes U+FFFD, ids without a token are left out.

        Raises `RequestError` for what cannot be an id.
        """
        for id in ids:
            if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < 2**32:
                raise RequestError(f"{id!r} is not a token id", param="tokens")
        return self.text(ids, skip_special)

    def text(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """`decode` of what are known to be ids: this runs for every token."""
        return self._inner.decode(ids, skip_special_tokens=skip_special)

    def serialized(self) -> str:
        """As the JSON of `tokenizer.json`."""
        return self._inner.to_str()

    def token(self, id: int) -> str | None:
        """The vocabulary entry of an id (not its text); None when there is none."""
        return self._inner.id_to_token(id)

    def token_id(self, token: str) -> int | None:
        return self._inner.token_to_id(token)


def check_text(text: object, param: str) -> str:
    """`text` itself; `RequestError` naming `param` unless it is a string that UTF-8 can carry."""
    if not isinstance(text, str):
        raise RequestError(f"{param} must be a string, got {type(text).__name__}", param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"{param} has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}"
        raise RequestError(lone, param=param, hint="send valid Unicode") from None
    return text
