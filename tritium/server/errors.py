"""Failures as HTTP: a status, and the error object of the door that was knocked at."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Scope

from tritium.api import BusyError, ContextLengthError, OvertimeError
from tritium.core import CacheFileError, EngineDeadError, RequestError, TritiumError


class UnknownModelError(RequestError):
    """A model name that this server does not go by."""


class BodyTooLargeError(RequestError):
    """More bytes than the server reads."""


class SlowBodyError(RequestError):
    """A body that did not come in time."""


class AuthenticationError(TritiumError):
    """No key, or a wrong one."""


_INVALID = "invalid_request_error"
_KINDS: list[tuple[type[Exception], int, str, str | None]] = [
    (UnknownModelError, 404, _INVALID, "model_not_found"),
    (BodyTooLargeError, 413, _INVALID, "body_too_large"),
    (SlowBodyError, 408, _INVALID, "body_too_slow"),
    (ContextLengthError, 400, _INVALID, "context_length_exceeded"),
    (RequestError, 400, _INVALID, None),
    (CacheFileError, 409, _INVALID, "cache_file"),
    (AuthenticationError, 401, _INVALID, "invalid_api_key"),
    (BusyError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (OvertimeError, 504, "timeout_error", "timeout"),
    (EngineDeadError, 503, "server_error", "unavailable"),
]
"""The first that fits: exception, status, OpenAI's type and code."""
_ANTHROPIC = {400: _INVALID, 401: "authentication_error", 404: "not_found_error", 405: _INVALID, 408: _INVALID,
              413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


def status_of(error: Exception) -> int:
    return _describe(error)[0]


def code_of(error: Exception) -> str:
    """A short name for metrics."""
    status, kind, code, _ = _describe(error)
    return code or (kind if status != 500 else "internal")


def error_body(error: Exception, path: str = "") -> dict[str, Any]:
    """OpenAI's error object; Anthropic's under /v1/messages."""
    status, kind, code, message = _describe(error)
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": _ANTHROPIC.get(status, "api_error"), "message": message}}
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception, scope: Scope) -> JSONResponse:
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(math.ceil(error.retry_after))
    elif isinstance(error, EngineDeadError):
        headers["retry-after"] = "1"
    elif isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error, scope["path"]), status_of(error), headers)


def error_event(error: Exception, path: str) -> str:
    """The end of a stream that failed midway."""
    body = json.dumps(error_body(error, path), ensure_ascii=False)
    if path.startswith("/v1/messages"):
        return f"event: error\ndata: {body}\n\n"
    return f"data: {body}\n\ndata: [DONE]\n\n"


def _describe(error: Exception) -> tuple[int, str, str | None, str]:
    """Status, type, code, message."""
    message = str(error) if isinstance(error, TritiumError) else "internal error; see the server's log"
    for kind, status, name, code in _KINDS:
        if isinstance(error, kind):
            return status, name, code, message
    if isinstance(error, HTTPException):
        return error.status_code, _INVALID, None, str(error.detail)
    return 500, "server_error", None, message
