"""Downloads of files: only from addresses that are allowed, and within one span of time.

An address is looked up, checked and connected to in one place, so a name cannot mean one address when it is checked and
another one afterwards. What may be reached:

- Label Studio itself, at any address;
- a host that FIRSTROW_ALLOWED_HOSTS lists (`host` or `host:port`): public and private addresses, but loopback and
  link-local ones (where clouds keep their machines' keys) only if listed as such (`127.0.0.1:9000`, `localhost`);
- where Label Studio itself sends us on to (presigned cloud storage): public addresses, or a listed host.

Behind a proxy (HTTPS_PROXY) it is the proxy that looks names up: then only addresses that are written out are checked.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError, NewConnectionError
from urllib3.util.connection import create_connection

from backend.errors import ImageFetchError, SlowHostError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Seconds to connect, and between two pieces, of a file that is not Label Studio's own.
DOWNLOAD_TIMEOUT = (5.0, 30.0)
#: Seconds that one file may take in all, from the first look for its host to its last byte, redirects included.
SLOWEST = 120.0
#: Pictures gain nothing from being packed once more, and what unpacks them would be one more thing to upset.
HEADERS = {"Accept-Encoding": "identity"}
#: What an answer may be packed with all the same.
ENCODINGS = ("", "identity", "gzip", "x-gzip", "deflate")
#: Prefix of IPv6 addresses that a gateway turns into the IPv4 address at their end.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Download:
    """One download, as a context: cut off when its time is up; connections made in it are checked.

    Args:
        hosts: `host` or `host:port` that the operator allows, lower case.
    """

    def __init__(self, hosts: Collection[str] = ()) -> None:
        self.hosts, self.seconds, self.late = frozenset(hosts), SLOWEST, False
        self._sockets: list[socket.socket] = []
        self._lock, self._timer = threading.Lock(), threading.Timer(self.seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Download:
        """Start the clock."""
        self._token = CURRENT.set(self)
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the clock."""
        CURRENT.reset(self._token)
        self._timer.cancel()
        with self._lock:
            for watched in self._sockets:
                watched.close()
            self._sockets.clear()

    def watch(self, connected: Any) -> None:
        """Cut this connection off when the time is up, whatever it is waiting for then."""
        with self._lock, suppress(OSError):
            self._sockets.append(socket.socket(fileno=os.dup(connected.fileno())))
            if self.late:
                self._sockets[-1].shutdown(socket.SHUT_RDWR)

    def check(self, host: str, port: int, address: str) -> None:
        """Refuse to connect to an address.

        Raises:
            ImageFetchError: naming the host, and what to do.
        """
        found = innermost(ipaddress.ip_address(address.partition("%")[0]))
        if host == "localhost" and is_listed(host, port, self.hosts) and found.is_loopback:
            return
        if is_listed(str(found), port, self.hosts) or is_listed(address, port, self.hosts):
            return
        if found.is_loopback or found.is_link_local or found.is_unspecified or found.is_multicast:
            raise ImageFetchError(
                f"host {host} has the address {address}, which is this machine or its surroundings: put the address "
                "itself into FIRSTROW_ALLOWED_HOSTS if you trust it"
            )
        if not found.is_global and not is_listed(host, port, self.hosts):
            raise ImageFetchError(
                f"host {host} has the private address {address}: add {host}:{port} to FIRSTROW_ALLOWED_HOSTS if you "
                "trust it"
            )

    def _cut(self) -> None:
        with self._lock:
            self.late = True
            for watched in self._sockets:
                with suppress(OSError):
                    watched.shutdown(socket.SHUT_RDWR)


CURRENT: ContextVar[Download] = ContextVar("download")


def innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        return inner or address
    return address


def is_listed(host: str, port: int, hosts: Collection[str]) -> bool:
    """Whether the operator allows a host, by itself or with its port."""
    name = host.lower().rstrip(".")
    return not {name, f"{name}:{port}", f"[{name}]", f"[{name}]:{port}"}.isdisjoint(hosts)


class _Watched(HTTPConnection):
    """A connection that ends when the time of the download that uses it is up."""

    guarded = False

    def request(self, *args: Any, **more: Any) -> None:
        """Send a request, after connecting if need be."""
        download = CURRENT.get(None)
        if download and self.sock is not None:  # kept from an earlier download
            download.watch(self.sock)
        super().request(*args, **more)
        if download:
            download.watch(self.sock)

    def _new_conn(self) -> socket.socket:
        download = CURRENT.get(None)
        if download is None:
            return super()._new_conn()
        try:
            made = self._connected(download)
        except TimeoutError as error:
            raise ConnectTimeoutError(self, f"no connection to {self.host}") from error
        except OSError as error:
            raise NewConnectionError(self, f"no connection to {self.host}: {error}") from error
        download.watch(made)
        return made

    def _connected(self, download: Download) -> socket.socket:
        host, port = getattr(self, "_dns_host", self.host), self.port or self.default_port
        fault: Exception = OSError("it has no address")
        proxied = getattr(self, "proxy", None) is not None
        for family, _, _, _, place in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if download.late:
                raise TimeoutError
            try:
                if self.guarded and not proxied:
                    download.check(self.host.strip("[]"), port, str(place[0]))
                where, options = (str(place[0]), port), self.socket_options
                return create_connection(where, self.timeout, self.source_address, options)
            except (OSError, ImageFetchError) as error:  # perhaps another of its addresses
                fault = error
        raise fault


class _WatchedTLS(_Watched, HTTPSConnection):
    pass


class _Guarded(_Watched):
    guarded = True


class _GuardedTLS(_WatchedTLS):
    guarded = True


class _WatchedPool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _WatchedPoolTLS(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


class _GuardedPool(HTTPConnectionPool):
    ConnectionCls = _Guarded


class _GuardedPoolTLS(HTTPSConnectionPool):
    ConnectionCls = _GuardedTLS


class Door(HTTPAdapter):
    """Connections for downloads.

    Args:
        guarded: whether addresses are checked; Label Studio's own may be any.
        more: for the adapter of requests.
    """

    def __init__(self, guarded: bool, **more: Any) -> None:
        self.pools = (
            {"http": _GuardedPool, "https": _GuardedPoolTLS}
            if guarded
            else {"http": _WatchedPool, "https": _WatchedPoolTLS}
        )
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it says of retries has whole addresses in it
        super().__init__(**more)

    def init_poolmanager(self, *args: Any, **more: Any) -> None:
        """Make the manager of direct connections."""
        super().init_poolmanager(*args, **more)
        self.poolmanager.pool_classes_by_scheme = self.pools

    def proxy_manager_for(self, proxy: str, **more: Any) -> Any:
        """The manager of connections through a proxy."""
        manager = super().proxy_manager_for(proxy, **more)
        manager.pool_classes_by_scheme = self.pools
        return manager


def session(guarded: bool, **more: Any) -> requests.Session:
    """A session for downloads; see `Door`."""
    made = requests.Session()
    for scheme in ("http://", "https://"):
        made.mount(scheme, Door(guarded, **more))
    return made


@contextmanager
def opened(url: str) -> Iterator[requests.Response]:
    """Open a URL within a `Download`, without any key, not following redirects.

    Raises:
        ImageFetchError: no connection, or its address is not allowed.
    """
    host = shown_host(url)
    with session(guarded=True) as browser:
        try:
            address = ipaddress.ip_address(urlsplit(url).hostname or "")
        except ValueError:
            address = None  # a name
        if address:  # a proxy would not check it
            CURRENT.get().check(str(address), urlsplit(url).port or _port(url), str(address))
        try:
            answer = browser.get(
                url, timeout=DOWNLOAD_TIMEOUT, stream=True, allow_redirects=False, auth=_nobody, headers=HEADERS
            )
        except requests.RequestException as error:
            if CURRENT.get().late:
                raise too_slow(host) from None
            # `from None`: the error's own text has the whole address
            kind = type(error).__name__
            if no_answer(error):
                raise SlowHostError(f"{host} does not answer ({kind}): is it reachable from here?") from None
            raise ImageFetchError(f"{host} hung up ({kind}): is the file still there?") from None
        with answer:
            yield answer


def _port(url: str) -> int:
    return 443 if urlsplit(url).scheme == "https" else 80


def _nobody(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request  # given as `auth`, keeps requests from sending what ~/.netrc holds for the host


def body(answer: requests.Response, limit: int) -> bytes:
    """The body of an answer, read within a `Download` until the size limit is passed.

    Raises:
        ImageFetchError: not a 2xx answer, or its body is too big, too slow, or breaks off.
    """
    host, found = shown_host(str(answer.url)), bytearray()
    if not 200 <= answer.status_code < 300:
        raise ImageFetchError(f"{host} answers {answer.status_code} ({answer.reason[:80]}): is the file still there?")
    if answer.headers.get("Content-Encoding", "").strip().lower() not in ENCODINGS:
        raise ImageFetchError(f"{host} sends the image packed in an unknown way: have it sent as it is")
    fault = ""
    try:
        for part in answer.iter_content(1 << 16):
            found += part
            if len(found) > limit:
                raise ImageFetchError(f"{host} sends more than {limit / 1e6:.0f} MB: use a smaller image")
    except requests.RequestException as error:
        fault = type(error).__name__
    if CURRENT.get().late:
        raise too_slow(host)
    if fault:
        raise ImageFetchError(f"{host} broke off ({fault}): is the file complete?")
    return bytes(found)


def no_answer(error: requests.RequestException) -> bool:
    """Whether there was no connection, or nothing came in time; a host that hangs up is there."""
    return isinstance(error, requests.Timeout) or isinstance(next(iter(error.args), None), MaxRetryError)


def too_slow(host: str) -> SlowHostError:
    """The time was up before the file was there."""
    return SlowHostError(
        f"{host} did not send the whole file within {SLOWEST:g} s: use a smaller image, or a faster host"
    )


def shown_host(url: str) -> str:
    """Host and port of an address, for people; without name and password."""
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def shown(value: str) -> str:
    """An address for people: without what may hold keys (query, name, password); a local file keeps its path."""
    try:
        parts = urlsplit(value)
    except ValueError:
        return "an address that cannot be understood"
    if parts.scheme or parts.netloc:
        return f"{parts.scheme}://{shown_host(value)}{parts.path}"[:200]
    kept = next((part for part in parts.query.split("&") if part.startswith("d=")), "")
    return (f"{parts.path}?{kept}" if kept else parts.path)[:200]


def redirect(answer: requests.Response) -> str | None:
    """Where an answer sends us on to, None if nowhere."""
    headers: Mapping[str, str] = answer.headers
    return headers.get("Location") if answer.is_redirect else None
