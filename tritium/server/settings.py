"""How the server behaves: where it listens, whom it lets in, how much at once."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tritium.api import Limits
from tritium.config import is_loopback
from tritium.core import ConfigError

LOG_FORMATS = ("text", "json", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `tritium serve` is told about serving. Raises `ConfigError` for what is not safe or cannot work."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    allow_unauthenticated: bool = False
    allowed_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    max_body_bytes: int = 8 * 2**20
    patience: float = 60.0
    """Seconds that a client may take to send its request, or to read a piece of the answer."""
    drain_seconds: float = 30.0
    """How long running answers may go on after SIGTERM or Ctrl-C; the rest end in an error."""
    log_format: str = "text"
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"--log-format {self.log_format} is not known", hint=f"one of {', '.join(LOG_FORMATS)}")
        if self.max_body_bytes < 1 or self.patience <= 0 or self.drain_seconds < 0:
            raise ConfigError("--max-body-bytes and --patience must be above 0, --drain-seconds at least 0")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ConfigError(f"--allowed-origins {origin} is no origin", hint="like https://example.com, or *")
        if not (is_loopback(self.host) or self.allow_unauthenticated or self.api_keys or self.api_key_file):
            raise ConfigError(f"--host {self.host} lets other machines in, and there is no API key",
                              hint="add --api-key-file, or --allow-unauthenticated if everybody may use it")

    def keyring(self) -> Keyring:
        """The keys, read now. Raises `ConfigError`."""
        return Keyring([*self.api_keys, *(_read_keys(Path(self.api_key_file)) if self.api_key_file else ())])


class Keyring:
    """API keys, held as digests and compared in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Each entry is a key, or a name and a key with a space between: `alice sk-...`. The name stands for the key
        in logs and limits."""
        entries = [line.split() for line in keys]
        if any(len(entry) not in (1, 2) for entry in entries):
            raise ConfigError("an API key is empty or has spaces", hint="one a line: KEY, or NAME KEY")
        self._names = [entry[0] if len(entry) == 2 else f"key-{i}" for i, entry in enumerate(entries, 1)]
        self._digests = [hashlib.sha256(entry[-1].encode()).digest() for entry in entries]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, key: bytes) -> str | None:
        """Whose key it is. Takes the same time for every wrong key: all are compared, as digests."""
        digest, found = hashlib.sha256(key).digest(), None
        for name, known in zip(self._names, self._digests):
            if hmac.compare_digest(digest, known):
                found = name
        return found


def _read_keys(path: Path) -> Iterable[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} has no key", hint="one a line: KEY, or NAME KEY")
    return keys
