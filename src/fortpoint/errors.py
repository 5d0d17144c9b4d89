"""Every error the product raises on purpose, in one tree.

Each class has a stable ``code`` (what programs match on), the HTTP status it becomes, and
OpenAI's error ``type``. The message is public: it says what to do next and never holds a
secret, a path of the host, or another caller's text.

    FortPointError
    ├── InvalidRequest            400 invalid_request
    │   ├── ContextLengthExceeded 400 context_length_exceeded
    │   ├── Unsupported           400 unsupported_parameter
    │   ├── MethodNotAllowed      405 method_not_allowed
    │   └── UnsupportedMediaType  415 unsupported_media_type
    ├── ContentBlocked            400 content_filter
    ├── Unauthenticated           401 invalid_api_key
    ├── Forbidden                 403 forbidden
    │   ├── AccountSuspended      403 account_suspended     (closed until an operator reinstates it)
    │   ├── AccountUnderReview    403 account_review        (closed until an operator has looked)
    │   └── LeaseRefused          403 lease_refused         (no lease for this model, host and time)
    ├── NotFound                  404 not_found
    │   └── ModelNotFound         404 model_not_found
    ├── PayloadTooLarge           413 payload_too_large
    ├── TooManyRequests           429 rate_limit_exceeded
    │   └── AccountSlowed         429 account_slowed        (risk is high: wait as Retry-After says)
    ├── EngineError               502 engine_error          (this request failed in the engine)
    │   ├── SteeringDiverged      502 steering_diverged     (its steering broke the activations)
    │   └── EngineUnavailable     503 engine_unavailable    (no engine to ask; try again)
    │       └── EngineBusy        503 engine_busy           (queue full; try again)
    ├── GuardFailed               503 guard_failed          (a detector failed: closed, not a pass)
    ├── PresetUnavailable         503 preset_unavailable    (saved steering that cannot be applied)
    ├── AuditUnavailable          503 audit_unavailable     (the record could not be written)
    ├── StorageError              503 storage_unavailable
    ├── RequestTimeout            504 request_timeout       (`server.request_timeout_s` is over)
    ├── ConfigError               (terminal) config_invalid
    ├── HomeInUse                 (terminal) home_in_use
    ├── ModelError                (terminal) model_invalid
    │   ├── DigestMismatch        (terminal) digest_mismatch
    │   └── SealBroken            (terminal) seal_broken    (another key, or bytes were changed)
    ├── KeyUnavailable            503 key_unavailable       (a key cannot be read or asked for now)
    ├── SandboxError              (terminal) sandbox_failed
    └── VerificationError         (terminal) verification_failed
"""

from __future__ import annotations

from typing import ClassVar


class FortPointError(Exception):
    """Base of the tree. ``str(error)`` is the public message."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(FortPointError):
    code = "invalid_request"
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    code = "unsupported_parameter"


class MethodNotAllowed(InvalidRequest):
    code = "method_not_allowed"
    status = 405


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    status = 415


class ContentBlocked(FortPointError):
    """An input was judged unsafe. The verdict that says so travels beside it in the response."""

    code = "content_filter"
    status = 400
    type = "invalid_request_error"


class Unauthenticated(FortPointError):
    code = "invalid_api_key"
    status = 401
    type = "authentication_error"


class Forbidden(FortPointError):
    code = "forbidden"
    status = 403
    type = "permission_error"


class LeaseRefused(Forbidden):
    code = "lease_refused"


class AccountSuspended(Forbidden):
    code = "account_suspended"


class AccountUnderReview(Forbidden):
    code = "account_review"


class NotFound(FortPointError):
    code = "not_found"
    status = 404
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class PayloadTooLarge(FortPointError):
    code = "payload_too_large"
    status = 413
    type = "invalid_request_error"


class TooManyRequests(FortPointError):
    code = "rate_limit_exceeded"
    status = 429
    type = "rate_limit_error"


class AccountSlowed(TooManyRequests):
    """``retry_after_s`` is how long to wait."""

    code = "account_slowed"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class EngineError(FortPointError):
    code = "engine_error"
    status = 502


class SteeringDiverged(EngineError):
    """A request's own steering drove its activations out of all bounds: use less strength."""

    code = "steering_diverged"


class EngineUnavailable(EngineError):
    code = "engine_unavailable"
    status = 503


class EngineBusy(EngineUnavailable):
    code = "engine_busy"


class GuardFailed(FortPointError):
    code = "guard_failed"
    status = 503


class PresetUnavailable(FortPointError):
    """A key's saved steering names what is not loaded: the request is not answered without it."""

    code = "preset_unavailable"
    status = 503


class AuditUnavailable(FortPointError):
    code = "audit_unavailable"
    status = 503


class StorageError(FortPointError):
    code = "storage_unavailable"
    status = 503


class RequestTimeout(FortPointError):
    code = "request_timeout"
    status = 504


class ConfigError(FortPointError):
    code = "config_invalid"


class HomeInUse(FortPointError):
    code = "home_in_use"


class ModelError(FortPointError):
    code = "model_invalid"


class DigestMismatch(ModelError):
    code = "digest_mismatch"


class SealBroken(ModelError):
    code = "seal_broken"


class KeyUnavailable(FortPointError):
    code = "key_unavailable"
    status = 503


class SandboxError(FortPointError):
    code = "sandbox_failed"


class VerificationError(FortPointError):
    code = "verification_failed"
