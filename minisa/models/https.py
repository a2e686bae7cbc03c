"""One file over HTTPS: resumed where it stopped, verified, moved into place in one step.

The file grows in a .part beside its target. The .part's name carries a tag of what it is a part of (the sha256,
else the ETag), so that a file which has changed on the server is never glued to the beginning of the old one.
Only what has its expected sha256 (the caller's, else the one the server states), or at the least its expected
size, gets the target's name.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener

from minisa.errors import MinisaError

Progress = Callable[[str, int, int | None], None]  # file name, bytes so far, bytes in all if known

CHUNK = 1 << 18  # bytes read at once: small enough that a slow line still shows progress
TIMEOUT = 30  # seconds without a byte
RETRIES = 4  # in a row without a new byte
BACKOFF = 1.0  # seconds before the first retry; doubles
MAX_REDIRECTS = 10
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
TOKEN_HOSTS = {"huggingface.co"}  # who may see HF_TOKEN; the storage they redirect to may not


class Refused(Exception):
    """The file's own host answers 401 or 403: the licence is not accepted, or there is no token, or a wrong one."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Trouble(Exception):
    """A failure that may pass: worth another attempt."""

    def __init__(self, message: str, *, offline: bool = False) -> None:
        super().__init__(message)
        self.offline = offline


@dataclass(frozen=True, slots=True)
class _Remote:
    """What is to arrive. At least one of sha256 and size (bytes) is known."""

    url: str
    sha256: str | None
    size: int | None
    etag: str | None  # strong ones only: a weak one does not vouch for bytes

    @property
    def identity(self) -> str | None:
        """What the content goes by; None if nothing vouches that two answers are the same."""
        return self.sha256 or self.etag

    def part_of(self, target: Path) -> Path:
        tag = hashlib.sha256(self.identity.encode()).hexdigest()[:8] if self.identity else "once"
        return target.with_name(f"{target.name}.{tag}.part")


def fetch(url: str, target: Path, progress: Progress, *, sha256: str | None = None, size: int | None = None) -> None:
    """Brings `url` to `target`, with as many attempts as go on bringing bytes.

    sha256, size: what the file must be; where they are None, what the server states counts. Interrupted, the .part
    stays. Raises Refused, MinisaError for what the user can put right, and OSError for the disk.
    """
    failures, furthest = 0, 0
    remote: _Remote | None = None
    while True:
        try:
            remote = _describe(url, sha256, size)
            _transfer(remote, target, progress)
            break
        except _Trouble as trouble:
            kept = max((part.stat().st_size for part in _parts(target)), default=0)
            failures, furthest = (1 if kept > furthest else failures + 1), max(kept, furthest)
            if trouble.offline and not kept:
                raise MinisaError(
                    f"cannot reach {urlsplit(url).hostname} ({trouble}): are you offline? Connect and run this "
                    f"again, or put the files into {target.parent} yourself"
                ) from None
            if failures > RETRIES:
                on = ". What has arrived is kept: run this again to go on from there"
                if not (kept and remote and remote.identity):
                    on = ": run this again"
                raise MinisaError(f"{url}: {trouble}; gave up after {failures} attempts{on}") from None
            time.sleep(BACKOFF * 2 ** (failures - 1))
    put_in_place(remote.part_of(target), target, remote.sha256)


def put_in_place(part: Path, target: Path, sha256: str | None) -> None:
    """Gives a finished file its own name, or removes it and raises MinisaError if its sha256 is another one."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
        found = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
    if found != sha256:
        part.unlink()
        raise MinisaError(
            f"{target.name}: its sha256 is {found}, expected {sha256}: the download was removed, pull again"
        )
    os.replace(part, target)


def _describe(url: str, sha256: str | None, size: int | None) -> _Remote:
    """Asks the server what the file is.

    Hugging Face states the sha256 and size of large files in X-Linked-ETag and X-Linked-Size, on its own answer,
    before it redirects to the storage.
    """
    with _request(url, "HEAD") as response:
        headers = response.headers
    linked = headers.get("X-Linked-ETag", "").strip('"')
    stated_sha256 = linked if re.fullmatch(r"[0-9a-f]{64}", linked) else None
    length = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    if len(length) > 18:
        raise MinisaError(f"{url}: the server states a size of {length} bytes: look where the publisher has it now")
    stated_size = int(length) if length.isdecimal() else None
    for what, wanted, stated in (("sha256", sha256, stated_sha256), ("size", size, stated_size)):
        if wanted and stated and wanted != stated:
            raise MinisaError(f"{url}: the server has {what} {stated}, models.toml wants {wanted}: nothing was fetched")
    etag = headers.get("ETag", "")
    remote = _Remote(url, sha256 or stated_sha256, size or stated_size, etag if etag.startswith('"') else None)
    if remote.sha256 is None and remote.size is None:
        raise MinisaError(f"{url}: the server states neither size nor sha256, so the file could not be verified")
    return remote


def _transfer(remote: _Remote, target: Path, progress: Progress) -> None:
    """Brings the .part to its full length, from where it stands. _Trouble if it stops short."""
    part = remote.part_of(target)
    for old in _parts(target):
        if old != part or not remote.identity:
            old.unlink()
    with part.open("ab") as file:
        done = file.tell()
        if done and done == remote.size:
            return
        headers = {"Range": f"bytes={done}-"} if done else {}
        if done and not remote.sha256 and remote.etag:
            headers["If-Range"] = remote.etag  # a sha256 makes sure of more
        with _request(remote.url, "GET", headers) as response:
            if response.status == 416 or (response.status == 206 and not _starts_at(response, done)):
                file.truncate(0)
                raise _Trouble("the server cannot go on where the download stopped")
            if response.status == 200:
                done = file.truncate(0)
            progress(target.name, done, remote.size)
            while block := _read(response):
                file.write(block)
                done += len(block)
                if remote.size is not None and done > remote.size:
                    file.truncate(0)
                    raise _Trouble(f"the server sent more than the {remote.size} bytes it announced")
                progress(target.name, done, remote.size)
    if remote.size is not None and done < remote.size:
        raise _Trouble(f"the connection closed after {done} of {remote.size} bytes")


def _parts(target: Path) -> list[Path]:
    return list(target.parent.glob(f"{target.name}.*.part"))


def _starts_at(response: http.client.HTTPResponse, offset: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        # Of a chunk that states a negative size, read() brings all that is still to come into memory.
        return response.read1(CHUNK) if response.chunked else response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Trouble(_reason(error)) from error


def _request(url: str, method: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    """The answer at the end of the redirects, status 200, 206 or 416; for HEAD the first that says what the file is.

    _Trouble where another attempt may help, Refused or MinisaError where it cannot.
    """
    try:
        return _follow(url, method, headers or {})
    except (ValueError, OverflowError) as error:  # a port may be any number
        raise MinisaError(
            f"{url}: the server redirects to what is no address ({error}): look where the publisher has it now"
        ) from None


def _follow(url: str, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    location = url
    for _ in range(MAX_REDIRECTS):
        scheme, hosts = urlsplit(location).scheme, {urlsplit(location).hostname, urlsplit(url).hostname}
        if scheme != "https" and not (scheme == "http" and hosts <= LOOPBACK):  # no publisher sends us to our own ports
            raise MinisaError(f"{location}: refused: weights are fetched over https only")
        response = _open(location, method, headers)
        status = response.status
        if status in (200, 206, 416) or (method == "HEAD" and status < 400 and "X-Linked-Size" in response.headers):
            return response
        response.close()
        if status in (301, 302, 303, 307, 308) and "Location" in response.headers:
            location = urljoin(location, response.headers["Location"])
        elif status in (401, 403) and urlsplit(location).netloc == urlsplit(url).netloc:
            raise Refused(status)
        elif status in (404, 410):
            raise MinisaError(f"{url}: not found ({status}): look where the publisher has it now, and at models.toml")
        # A storage host refuses (403) a signed address that has run out; the next attempt gets a new one.
        elif status in (403, 408, 425, 429) or status >= 500:
            raise _Trouble(f"the server answers {status}")
        else:
            raise MinisaError(f"{url}: the server answers {status}: expected the file")
    raise MinisaError(f"{url}: more than {MAX_REDIRECTS} redirects")


class _Verbatim(HTTPErrorProcessor):
    """Hands every answer through as it is: urllib would follow redirects to anywhere and take the token along."""

    def http_response(self, request: Request, response: http.client.HTTPResponse) -> http.client.HTTPResponse:
        return response

    https_response = http_response


_OPENER = build_opener(_Verbatim)


def _open(url: str, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    host = urlsplit(url).hostname
    request = Request(url, method=method, headers={"User-Agent": "minisa", **headers})
    if host in TOKEN_HOSTS and (token := access_token()):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        return _OPENER.open(request, timeout=TIMEOUT)
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise MinisaError(
                f"{host}: its certificate is not trusted here ({error.reason.verify_message}): set SSL_CERT_FILE to "
                "a file of the certificates to trust"
            ) from error
        raise _Trouble(_reason(error), offline=_is_offline(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Trouble(_reason(error)) from error


def access_token() -> str:
    """$HF_TOKEN, or an empty string."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not (token.isascii() and token.isprintable()):
        raise MinisaError("HF_TOKEN has characters that no access token has: copy it again")
    return token


def _is_offline(reason: object) -> bool:
    unreachable = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
    return isinstance(reason, socket.gaierror) or (isinstance(reason, OSError) and reason.errno in unreachable)


def _reason(error: BaseException) -> str:
    """The innermost words of a network error, which come wrapped."""
    cause = error.reason if isinstance(error, URLError) else error
    words = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
    return " ".join(str(words).split()) or type(cause).__name__
