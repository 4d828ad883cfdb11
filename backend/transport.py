"""HTTP to Label Studio: credentials, timeouts, retries, and failures said in plain words. Files: download.py."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import orjson
import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.util import Retry

from backend import download
from backend.errors import ImageFetchError, LabelStudioError

#: Seconds to connect, and to wait for an answer; deleting 10,000 predictions takes Label Studio 36 s.
TIMEOUT = (5.0, 300.0)
#: Times that a request is tried again within seconds, and the longest wait that Label Studio may ask for. What takes
#: longer to heal fails, and its round is tried again.
TRIES, LONGEST_WAIT = 3, 10.0
#: Numpy's numbers and arrays are fine, and keys that are numbers.
FREELY = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
#: An access token is renewed after this share of its life.
RENEW = 0.8
#: Asked right before a request that changes something is sent, and before each time that it is sent again.
_may_change: ContextVar[Callable[[], object] | None] = ContextVar("may_change", default=None)


@contextmanager
def asking(check: Callable[[], object]) -> Iterator[None]:
    """Have `check` called right before this thread sends anything that may change something; it raises to forbid it."""
    token = _may_change.set(check)
    try:
        yield
    finally:
        _may_change.reset(token)


def _ask(method: str | None) -> None:
    check = _may_change.get()
    if check is not None and method != "GET":
        check()


class Credentials(AuthBase):
    """Adds the key to each request: a legacy token as it is, a personal access token by way of an access token.

    Args:
        url: where Label Studio is, without a final slash.
        key: legacy token or personal access token; told apart by their form.
        timeout: seconds to connect, and to wait for an answer.
        tries: times that the request for a token may be repeated.
    """

    def __init__(self, url: str, key: str, timeout: tuple[float, float], tries: int) -> None:
        self.url, self.key, self.timeout = url, key, timeout
        self.renewable = key.count(".") == 2 and key.startswith("eyJ")
        self.access, self.renew_at = "", 0.0
        self.session = patient("POST", tries=tries)  # asking for a token twice does no harm

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set the header that Label Studio expects; never sent to another host."""
        request.headers["Authorization"] = self.header()
        return request

    def header(self) -> str:
        """The value of the Authorization header, renewed when it is about to run out."""
        if not self.renewable:
            return f"Token {self.key}"
        if not self.access or time.monotonic() > self.renew_at:
            self.renew()
        return f"Bearer {self.access}"

    def renew(self) -> None:
        """Trade the personal access token for an access token (valid for minutes).

        Raises:
            LabelStudioError: it was revoked, or Label Studio does not answer.
        """
        path = "/api/token/refresh/"
        try:
            answer = self.session.post(self.url + path, json={"refresh": self.key}, timeout=self.timeout)
        except requests.RequestException as error:
            raise unreachable(self.url, error) from error
        if not answer.ok:
            raise refused(self.url, "POST", path, answer)
        self.access = str(parsed(self.url, answer)["access"])
        self.renew_at = time.monotonic() + RENEW * lifetime(self.access)


def lifetime(token: str) -> float:
    """Seconds that a JWT was issued for, whatever our clock says; a minute if it does not tell."""
    try:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return float(claims["exp"]) - float(claims["iat"])
    except (IndexError, KeyError, ValueError):
        return 60.0


class Patience(Retry):
    """When a request is sent again: always when nobody answered the door, or Label Studio asked us to come later (429).

    A request that may have been carried out is sent again only if doing it twice does no harm: all but POST, which
    makes something new. A step that died between a POST and its answer looks what is there before it sends it again.
    """

    #: Of the request that is tried again.
    method: str | None = "GET"

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        """Whether an answer of this status is worth another try."""
        if status_code == 429:
            return bool(self.total)
        return bool(super().is_retry(method, status_code, has_retry_after))

    def increment(self, method: str | None = None, *args: Any, **more: Any) -> Self:
        """Count a try, as urllib3 does, and remember of what."""
        left = super().increment(method, *args, **more)
        left.method = method
        return left

    def sleep(self, response: Any = None) -> None:
        """Wait before the next try, and ask whether it may still be sent."""
        super().sleep(response)
        _ask(self.method)

    def get_retry_after(self, response: Any) -> float | None:
        """Seconds that the answer asks us to wait, at most `LONGEST_WAIT`."""
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(float(seconds), LONGEST_WAIT)


def patience(*methods: str, tries: int = TRIES) -> Patience:
    """For requests of these methods, which may be repeated."""
    return Patience(
        total=tries,
        backoff_factor=0.3,
        status_forcelist=(500, 502, 503, 504),
        allowed_methods=methods,
        raise_on_status=False,
    )


def patient(*methods: str, tries: int) -> requests.Session:
    """A session that repeats requests of these methods."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=patience(*methods, tries=tries)))
    return session


class Transport:
    """Calls Label Studio and returns parsed JSON; `Patience` says what is tried again.

    Args:
        url: where Label Studio is.
        key: legacy token or personal access token.
        timeout: seconds to connect, and to wait for an answer.
        tries: times that a request which may be repeated is.
    """

    def __init__(self, url: str, key: str, timeout: tuple[float, float] = TIMEOUT, tries: int = TRIES) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self.credentials = Credentials(self.url, key, timeout, tries)
        self.session = patient("GET", "PATCH", "DELETE", tries=tries)
        # A file that cannot be had is tried again in a minute; until then it must not hold the others up.
        once = patience("GET").new(total=1, status_forcelist=(502, 503, 504))
        self.files = download.session(guarded=False, max_retries=once)

    def call(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        body: object = None,
        files: Mapping[str, Any] | None = None,
    ) -> Any:
        """Send one request and return its parsed JSON answer, None when it has no body.

        Raises:
            LabelStudioError: no connection, or an answer other than 2xx; says what to do about it.
        """
        more: dict[str, Any] = {"params": params, "files": files}
        if body is not None:  # masks are long lists of numbers: json takes longer than encoding them
            more |= {"data": orjson.dumps(body, option=FREELY), "headers": {"Content-Type": "application/json"}}
        answer = self.raw(method, path, **more)
        if not answer.ok:
            raise refused(self.url, method, path, answer)
        return parsed(self.url, answer) if answer.content else None

    def raw(self, method: str, path: str, **more: Any) -> requests.Response:
        """Send one request with our credentials; the answer may be of any status.

        Raises:
            LabelStudioError: no connection.
        """
        _ask(method)
        try:
            answer = self.session.request(
                method,
                self.url + path,
                auth=self.credentials,
                timeout=self.timeout,
                allow_redirects=False,
                **more,
            )
        except requests.RequestException as error:
            raise unreachable(self.url, error) from error
        return answer

    def download(self, path: str, limit: int, hosts: Collection[str] = ()) -> bytes:
        """Bytes of a file; one redirect by Label Studio is followed, without our key unless it stays in Label Studio.

        Args:
            path: begins with a slash.
            limit: most bytes to accept.
            hosts: that the operator allows; Label Studio may also send us on to any public address.

        Raises:
            ImageFetchError: this file cannot be had.
            LabelStudioError: Label Studio as a whole is down, in trouble, or refuses our key.
        """
        with download.Download(hosts):
            try:
                answer = self._open(path)
                onward = download.redirect(answer)
                if onward is not None:
                    answer.close()
                    onward = urljoin(self.url + path, onward)
                    if not self.owns(onward):
                        with download.opened(onward) as elsewhere:
                            return download.body(elsewhere, limit)
                    answer = self._open(onward.removeprefix(self.url))
                with answer:
                    if answer.status_code == 401 or answer.status_code >= 500:
                        raise refused(self.url, "GET", path.partition("?")[0], answer)
                    return download.body(answer, limit)
            except LabelStudioError as error:
                if error.status == 401 or not self.answers():
                    raise
                reason = f"answers {error.status}" if error.status else "does not answer"
                raise ImageFetchError(
                    f"Label Studio {reason} when asked for this file, and answers other requests: look whether the "
                    "file is there and may be read, and whether its path has '..' or '%2F' in it"
                ) from error

    def _open(self, path: str) -> requests.Response:
        wait = (self.timeout[0], download.SLOWEST)
        how: dict[str, Any] = {"stream": True, "allow_redirects": False, "headers": download.HEADERS}
        try:
            return self.files.get(self.url + path, auth=self.credentials, timeout=wait, **how)
        except requests.RequestException as error:
            raise unreachable(self.url, error) from None

    def answers(self) -> bool:
        """Whether Label Studio as a whole, its database and our key included, works."""
        try:
            self.call("GET", "/api/current-user/whoami")
        except LabelStudioError:
            return False
        return True

    def owns(self, url: str) -> bool:
        """Whether an absolute URL points into this Label Studio."""
        ours, other = urlsplit(self.url), urlsplit(url)
        return (ours.scheme, ours.netloc) == (other.scheme, other.netloc)


def parsed(url: str, answer: requests.Response) -> Any:
    """The JSON of an answer.

    Raises:
        LabelStudioError: it is something else, a login page for example.
    """
    try:
        return answer.json()
    except (ValueError, RecursionError) as error:
        raise LabelStudioError(
            f"{url} answered {answer.status_code} with something that is not JSON: is LABEL_STUDIO_URL the address "
            "of Label Studio itself, without a path behind it?",
            status=answer.status_code,
        ) from error


def unreachable(url: str, error: Exception) -> LabelStudioError:
    """No answer from Label Studio."""
    reason = "it took too long" if isinstance(error, requests.Timeout) else type(error).__name__
    return LabelStudioError(
        f"Label Studio at {url} does not answer ({reason}): start it, or set LABEL_STUDIO_URL to where it is"
    )


def refused(url: str, method: str, path: str, answer: requests.Response) -> LabelStudioError:
    """An answer other than 2xx, with what Label Studio said about it."""
    said, status = detail(answer), answer.status_code
    if status == 401:
        message = (
            f"Label Studio at {url} refuses our key ({said}): set LABEL_STUDIO_API_KEY to a personal access token "
            "(Account & Settings in Label Studio), or switch legacy tokens on for the organisation"
        )
    elif 300 <= status < 400:
        message = (
            f"Label Studio at {url} sends {method} {path} on to {answer.headers.get('Location')}: set "
            "LABEL_STUDIO_URL to that address"
        )
    else:
        message = f"Label Studio at {url} answered {method} {path} with {status}: {said}"
    return LabelStudioError(message, status=status)


def detail(answer: requests.Response) -> str:
    """What an error answer says, in at most a few hundred characters."""
    try:
        body = answer.json()
    except ValueError:
        return answer.reason or "no explanation"
    if not isinstance(body, dict):
        return str(body)[:400]
    invalid = body.get("validation_errors")
    text = "; ".join(f"{field}: {faults}" for field, faults in invalid.items()) if invalid else body.get("detail")
    return str(text or body)[:400]
