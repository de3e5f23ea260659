"""What the application raises, as answers in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serving.gateway.errors import ApiError, shown


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 500, 502, 503, 504)
}


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the application becomes an answer in OpenAI's shape."""

    def respond(error: ApiError, request: Request) -> JSONResponse:
        request.state.exchange.reason = error.reason
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(error, request)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(from_validation(error), request)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        messages = {404: "there is nothing at this path", 405: "this path does not take this method"}
        message = messages.get(error.status_code, "the body cannot be read as JSON")
        codes = {404: "not_found", 405: "method_not_allowed"}
        found = ApiError(
            error.status_code,
            message,
            code=codes.get(error.status_code, "invalid_json"),
            headers={**(error.headers or {})},
        )
        return respond(found, request)

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this answer, and the server logs its type and place.
        return respond(ApiError(500, "internal error", code="internal_error"), request)


def from_validation(error: RequestValidationError) -> ApiError:
    """One 400 for all mistakes of a body: the first one's field, and up to three messages."""
    details = list(error.errors())
    messages = [_message(detail) for detail in details[:3]]
    more = f" (and {len(details) - 3} more)" if len(details) > 3 else ""
    code = "invalid_json" if details[0]["type"] == "json_invalid" else "invalid_value"
    return ApiError(400, "; ".join(messages) + more, param=_param(details[0]), code=code)


def _param(detail: dict[str, Any]) -> str | None:
    if "param" in detail.get("ctx", {}):
        return str(detail["ctx"]["param"])
    if detail["type"] == "json_invalid":
        return None
    path = ""
    for part in detail["loc"][1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return shown(path.lstrip(".")) or None


def _message(detail: dict[str, Any]) -> str:
    param = _param(detail)
    if detail["type"] == "json_invalid":
        return "the body is not valid JSON"
    if detail["type"] == "extra_forbidden":
        return f"unrecognized request argument: {param}"
    if detail["type"] == "missing" and param is None or detail["type"] == "model_attributes_type":
        return "the body must be a JSON object, sent with Content-Type: application/json"
    text = str(detail["msg"]).removeprefix("Value error, ")
    return text if "param" in detail.get("ctx", {}) else f"{param}: {text[0].lower()}{text[1:]}"
