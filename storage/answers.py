"""What a server's answer means: ask again, no such object, nothing at that place, or a refusal that the user must know.

The libraries behind fsspec raise errors of their own. They are told apart by their status, their code and the names of
their classes, so that none of these libraries is imported here.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from storage.errors import DamagedError, DecantError, InputError
from storage.files import REMEDY

Meaning = Literal["again", "missing", "past the end", "refused", "unreachable", "no bucket", "not allowed", "bug"]

AGAIN_STATUSES = {408, 425, 429, 500, 502, 503, 504}
AGAIN_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "ThrottlingException"}
UNREACHABLE = {"ConnectionError", "TimeoutError", "FSTimeoutError", "HTTPClientError", "ResponseStreamingError",
               "IncompleteReadError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead",
               "ResponseParserError"}  # fmt: skip
NOT_ALLOWED = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "GoogleAuthError",
               "TokenRetrievalError", "CredentialRetrievalError", "ProfileNotFound"}  # fmt: skip
REFUSALS = {"OSError", "BotoCoreError", "ClientError", "HttpError", "InvalidURL"}
"""Everything else is a mistake of this program, and is not hidden."""

ADVICE: dict[str, dict[str, str]] = {
    "not allowed": {
        "s3": "check AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may read (without the "
        "right to list, a missing object is refused, too); for a public bucket set FSSPEC_S3_ANON=true",
        "gs": "check GOOGLE_APPLICATION_CREDENTIALS or run `gcloud auth application-default login`, and check what the "
        "account may read; for a public bucket set FSSPEC_GS_TOKEN=anon",
        "http": "check that the store may be read by everyone, or put the user name and password into ~/.netrc",
    },
    "no bucket": {"s3": "check the bucket's name, the region and the endpoint (AWS_ENDPOINT_URL)"},
    "unreachable": {
        "s3": "check the network and the endpoint (AWS_ENDPOINT_URL), then give the command again",
        "gs": "check the network, then give the command again",
        "http": "check the network and the URL, then give the command again",
    },
}


class MissingObjectError(DamagedError):
    """There is no such object."""


class Answer(NamedTuple):
    """An error, understood."""

    meaning: Meaning
    text: str


def understand(error: BaseException) -> Answer:
    """What an error of one of the libraries means."""
    causes = list(_causes(error))
    names = [_names(cause) for cause in causes]
    telling = next(
        (
            cause
            for cause, own in zip(causes, names, strict=True)
            if _status(cause) or _code(cause) or own & UNREACHABLE
        ),
        next((cause for cause in causes if not isinstance(cause, FileNotFoundError)), error),
    )  # an inner cause may have a status of its own that means nothing: aiohttp's parser calls a cut answer "400"
    status, code, all_names = _status(telling), _code(telling), set().union(*names)
    text = _text(telling, status, code)
    if code == "NoSuchBucket":
        return Answer("no bucket", text)
    if status in AGAIN_STATUSES or code in AGAIN_CODES or (status is None and all_names & UNREACHABLE):
        return Answer("again", text)
    if status == 416 or code == "InvalidRange":
        return Answer("past the end", text)
    if status in (401, 403) or all_names & NOT_ALLOWED or str(telling).startswith("Forbidden"):  # as gcsfs has it
        return Answer("not allowed", text)
    if status in (404, 410) or (status is None and "FileNotFoundError" in all_names):
        return Answer("missing", text)
    is_refusal = status is not None or bool(all_names & REFUSALS)
    return Answer("refused" if is_refusal else "bug", text)


def to_error(error: BaseException, where: str, scheme: str, attempts: int, secrets: tuple[str, ...]) -> BaseException:
    """The exception for the user; the error itself where it is one already, or is a mistake of this program.

    Args:
        where: URL of the object, without credentials.
        secrets: never to be printed.
    """
    ours = next((cause for cause in _causes(error) if isinstance(cause, DecantError)), None)
    meaning, text = understand(error)
    if ours is not None or meaning == "bug":
        return ours or error
    for secret in secrets:
        text = text.replace(secret, "***")
    if meaning == "missing":
        return MissingObjectError(f"{where} is missing; {REMEDY}")
    if meaning == "again":
        meaning, text = "unreachable", f"{text}, {attempts} times"
    family = {"s3a": "s3", "gcs": "gs", "https": "http"}.get(scheme, scheme)
    advice = ADVICE.get(meaning, {}).get(family, "check the URL")
    return InputError(f"no access to {where}: {text}; {advice}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, innermost last."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _names(error: BaseException) -> set[str]:
    """What an error is an instance of."""
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """The HTTP status, from wherever the library keeps it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _number(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return _number(getattr(error, "status", None)) or _number(getattr(error, "code", None))


def _number(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() and 100 <= int(text) < 600 else None


def _code(error: BaseException) -> str | None:
    """The error code of an S3 answer."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code) if code else None


def _text(error: BaseException, status: int | None, code: str | None) -> str:
    """One line of what was answered."""
    response = getattr(error, "response", None)
    said = response.get("Error", {}).get("Message") if isinstance(response, dict) else getattr(error, "message", None)
    words = " ".join(str((status and said) or error).split())[:300]
    answered = [str(status)] if status else []
    answered += [code] if code and code != str(status) else []
    if not answered:
        return f"{type(error).__name__}: {words or 'no reason given'}"
    return " ".join([*answered, words])
