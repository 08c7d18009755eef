"""What a client is told when a request is not answered: OpenAI's error object with a status.

For: every refusal that crosses the wire. Not for: what went wrong inside; that goes to the log with the request's id,
and the client gets a fixed sentence (an exception's own text may tell about memory and files: CVE-2026-22778).
"""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refusal: `{"error": {"message", "type", "param", "code"}}` and its HTTP status.

    Args:
        status: HTTP status.
        message: for people: the value, the expectation, what to do. Never the text of a library's exception.
        kind: OpenAI's `type`, such as `invalid_request_error`.
        param: which part of the request, such as `messages[0].content[1].image_url.url`.
        code: for programs, such as `context_length_exceeded`.
        retry_after_s: when it is worth trying again; becomes the header `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON that goes out."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can never be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str, *, retry_after_s: int) -> ApiError:
    """429: too many requests wait, or run for this key."""
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=retry_after_s,
    )


def timed_out(message: str) -> ApiError:
    """408: the request's own time was over."""
    return ApiError(408, message, kind="timeout_error", code="request_timeout")


def unavailable(message: str, *, retry_after_s: int | None = None) -> ApiError:
    """503: starting, draining or broken."""
    return ApiError(
        503, message, kind="server_error", code="service_unavailable", retry_after_s=retry_after_s
    )


def internal() -> ApiError:
    """500: our mistake or the device's; the log has the rest, under the request's id."""
    return ApiError(
        500,
        "The server failed to answer this request; ask again. Its log has the reason, under the x-request-id of this "
        "response.",
        kind="server_error",
        code="internal_error",
    )
