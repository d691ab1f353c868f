"""OpenAI-compatible HTTP over a `Session`."""

from tritium.server.app import Server, create_app, serve

__all__ = ["Server", "create_app", "serve"]
