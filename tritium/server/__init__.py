"""HTTP over a `Session`: OpenAI's and Anthropic's APIs."""

from tritium.server.app import Server, create_app, serve
from tritium.server.settings import ServerSettings

__all__ = ["Server", "ServerSettings", "create_app", "serve"]
