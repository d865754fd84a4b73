"""The service's errors: reason, status and text, https://cloud.google.com/storage/docs/json_api/v1/status-codes."""

from __future__ import annotations

from typing import Any

ERRORS: dict[str, tuple[int, str]] = {
    "authError": (401, "Invalid Credentials"),
    "backendError": (503, "We encountered an internal error. Please try again."),
    "conditionNotMet": (412, "At least one of the pre-conditions you specified did not hold."),
    "conflict": (409, "The request could not be completed due to a conflict."),
    "forbidden": (403, "The caller does not have permission to do this."),
    "invalid": (400, "Invalid argument."),
    "notFound": (404, "Not Found"),
    "notImplemented": (501, "The requested operation has not been implemented."),
    "notModified": (304, "Not Modified"),
    "rateLimitExceeded": (429, "The rate of requests is too high. Please reduce your request rate."),
    "requestedRangeNotSatisfiable": (416, "The requested range cannot be satisfied."),
    "required": (401, "Anonymous caller does not have access to the bucket."),
}


class Refused(Exception):
    """The service refuses a request.

    Args:
        reason: As in `ERRORS`.
        message: Where it is not the reason's own.
        status: Likewise.
        headers: Headers of the answer.
    """

    def __init__(
        self, reason: str, message: str = "", *, status: int = 0, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status or ERRORS[reason][0]
        self.message = message or ERRORS[reason][1]
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """Google's form of an error."""
        domain = "usageLimits" if self.reason == "rateLimitExceeded" else "global"
        error = {"message": self.message, "domain": domain, "reason": self.reason}
        if self.status == 412:
            error |= {"locationType": "header", "location": "If-Match"}
        return {"error": {"code": self.status, "message": self.message, "errors": [error]}}
