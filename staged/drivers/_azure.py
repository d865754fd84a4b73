"""What the Azure drivers share: URLs, credentials, clients for either event loop, and the SDK's errors mapped once."""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError

from staged import paths
from staged.drivers._cloud import Refused, hide_secrets
from staged.errors import InvalidInput, InvalidPath, Unsupported

if TYPE_CHECKING:
    from azure.core.credentials import AzureSasCredential
    from azure.core.credentials_async import AsyncTokenCredential

    Credential = str | AzureSasCredential | AzureNamedKeyCredential | AsyncTokenCredential

__all__ = ["Closable", "Location", "bare", "client_options", "default_credential", "in_trio", "of", "once", "plain"]

T = TypeVar("T")

_TIMEOUT = 15
"""Seconds without an answer after which a request counts as lost: less than what the core allows for a single one."""
_NUMBERS = re.compile(r"[\d.]+|[\da-f:]*:[\da-f:.]*")
"""A host that is an address."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a target is; `sas` is the query of its URL, if that held a shared access signature."""

    account: str
    container: str
    path: str
    sas: str | None = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Location:
        """Read `abfss://container@account/path` or `https://account/container/path`.

        Raises:
            InvalidInput: It is neither. No message shows the URL, which may hold a credential.
        """
        return cls._parse(url, "abfs", "dfs")

    @classmethod
    def parse_blob(cls, url: str) -> Location:
        """Read `wasbs://container@account/path` or `https://account/container/path`.

        At an address that is no name of an account the account is the first part of the path.

        Raises:
            InvalidInput: It is neither. No message shows the URL, which may hold a credential.
        """
        return cls._parse(url, "wasb", "blob")

    @classmethod
    def _parse(cls, url: str, kind: str, service: str) -> Location:
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
            at = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port else "")
        except ValueError:
            raise InvalidInput("That is no URL of an Azure store.") from None
        path = unquote(parts.path).strip("/")
        if parts.scheme in (kind, f"{kind}s"):
            container, scheme = unquote(parts.username or ""), "https"
        else:
            if service == "blob" and (_NUMBERS.fullmatch(host) or "." not in host):
                account, _, path = path.partition("/")
                at += f"/{account}"
            (container, _, path), scheme = path.partition("/"), parts.scheme
        if scheme not in ("https", "http") or not host or not container or parts.password or parts.fragment:
            raise InvalidInput(
                f"A URL of an Azure store is {kind}s://container@account.{service}.core.windows.net/path, or "
                f"https://account.{service}.core.windows.net/container/path."
            )
        try:
            paths.parse_prefix(path)
        except InvalidPath as error:
            raise InvalidInput(f"The URL's path is not one that a store takes: {error}") from None
        return cls(f"{scheme}://{at}", container, path, parts.query or None)


def client_options(credential: Credential | None, sas: str | None, *, trio: bool) -> dict[str, Any]:
    """What every client is made with: the credential, no retries of its own, and a transport for the event loop."""
    if credential is not None and sas is not None:
        raise InvalidInput("The URL holds a shared access signature; a credential cannot be passed beside it.")
    hide_secrets()
    return {
        "credential": plain(credential) if credential is not None else sas,
        # A replay below this cannot be kept out (aiohttp does it by itself); one above it is `Limit`'s business.
        "retry_total": 0,
        "transport": _transport(trio=trio),
    }


def plain(credential: Any) -> Any:
    """A credential as the SDK uses it rightly: the source of a rename is signed by a signature only where that is a string."""
    if hasattr(credential, "signature"):
        return credential.signature
    if isinstance(credential, str) and ";" in credential:
        parts = dict(part.split("=", 1) for part in credential.split(";") if "=" in part)
        if "SharedAccessSignature" in parts:
            return parts["SharedAccessSignature"]
        if {"AccountName", "AccountKey"} <= parts.keys():
            return AzureNamedKeyCredential(parts["AccountName"], parts["AccountKey"])
        raise InvalidInput("That connection string has neither an AccountKey nor a SharedAccessSignature.")
    return credential


def in_trio() -> bool:
    """Whether the running event loop is trio's."""
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


def _transport(*, trio: bool) -> object:
    if trio:
        from azure.core.pipeline.transport import TrioRequestsTransport

        return TrioRequestsTransport(connection_timeout=(_TIMEOUT, _TIMEOUT))
    from azure.core.pipeline.transport import AioHttpTransport

    return AioHttpTransport(connection_timeout=_TIMEOUT, read_timeout=_TIMEOUT)


class Closable(Protocol):
    """What is to be closed in the end."""

    async def close(self) -> None: ...


def default_credential(*, trio: bool) -> Any:
    """The credential of this environment: variables, a managed identity, or whoever logged in by a tool of Azure's.

    Raises:
        Unsupported: On trio, where its parts do not run.
    """
    if trio:
        raise Unsupported(
            "On trio pass a credential= with a transport of its own; the environment's runs on asyncio only."
        )
    from azure.identity.aio import DefaultAzureCredential

    return DefaultAzureCredential()


def of(client: Any) -> Credential | None:
    """The credential of a client, for another client; one that is in its URL goes with that."""
    if hasattr(client.credential, "account_key"):
        # An account key has become what signs requests.
        return AzureNamedKeyCredential(client.credential.account_name, client.credential.account_key)
    credential: Credential | None = client.credential
    return credential


def bare(etag: str) -> str:
    """An ETag without quotes: headers have them, listings do not."""
    return etag.strip('"')


async def once(what: str, request: Callable[[], Awaitable[T]]) -> T:
    """Make one request through an SDK; what fails is `Refused`, with the service's status and code, and nothing of the request."""
    try:
        return await request()
    except HttpResponseError as error:
        # Without a response it comes from the credential, whose text says what to do.
        unknown = error.response is None and isinstance(error, ClientAuthenticationError)
        refused = Refused(f"{what}: {error.message}", 401) if unknown else _refused(what, error)
    except AzureError:
        refused = Refused(what)
    # Raised here, so that nothing leads from it to the SDK's error, which holds the request with its credential.
    raise refused


def _refused(what: str, error: HttpResponseError) -> Refused:
    headers: Mapping[str, str] = getattr(error.response, "headers", {})
    after = headers.get("Retry-After", "")
    code = headers.get("x-ms-error-code") or getattr(error, "error_code", None) or ""
    return Refused(what, error.status_code or 0, str(code), float(after) if after.isdigit() else None)
