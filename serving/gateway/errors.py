"""Errors that a client sees, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLIENT_GONE = "client_gone"
"""Reason of an exchange whose client left; the status is 499, or 200 where a stream had begun."""
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}


class ApiError(Exception):
    """An answer other than 200. The message goes to the client as it is.

    reason: a short word for metrics and logs; default: the code.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})
        self.reason = reason or code or str(status)

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def unavailable(message: str, code: str, retry_after: int = 1) -> ApiError:
    """503 with Retry-After."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def unknown_model(name: str, param: str = "model") -> ApiError:
    """404 for a model that is not served, or not to this key; the two look alike."""
    return ApiError(
        404,
        f"the model '{shown(name)}' does not exist or you may not use it",
        param=param,
        code="model_not_found",
    )


def shown(value: str, longest: int = 64) -> str:
    """A client's text, short and printable, for a message back to it."""
    text = value.encode("unicode_escape", "backslashreplace").decode("ascii")
    return text if len(text) <= longest else text[: longest - 3] + "..."
