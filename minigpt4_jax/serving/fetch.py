"""Pictures from other hosts, for a server that must not be sent against its own network (SSRF).

For: `https://` (and, by a switch, `http://`) from hosts on an allow-list. Not for: any other address, and not for
looking at the bytes. Nobody fetches anything unless the configuration names hosts.

What others got wrong, and what is done here:
* Two parsers of one URL see two hosts (CVE-2026-24779): httpx2's parses it once, and what is checked is what is
  connected to. Backslashes, blanks, other alphabets, user names and ports are refused before.
* A name is looked up for the check and once more for the connection, and the second answer is another (DNS rebinding;
  CVE-2025-6242, CVE-2026-33626): it is looked up once, and the connection goes to the addresses that were checked, with
  the certificate checked against the name.
* Redirects lead elsewhere: they are errors. So are answers that are compressed (bombs) or too long.
* Errors that tell what is inside the network: the sentences are fixed, but for the number of an answer's status.

Differs from the original, which fetches nothing.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Callable, Sequence

import httpx2

from minigpt4_jax.config import UserError
from minigpt4_jax.serve_config import PicturesConfig
from minigpt4_jax.serving.errors import invalid
from minigpt4_jax.serving.workers import Workers

MAX_URL_CHARS = 2048
NUM_LOOKUPS = 4
"""Names that are looked up at once: a lookup cannot be interrupted, and must not take the event loop's own threads."""

_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = rf"{_LABEL}(\.{_LABEL})*"
_URL = re.compile(r"[!#-\[\]^-~]+")  # printable ASCII without blank, quote, backslash
_REFUSED = tuple(
    map(
        ipaddress.ip_network,
        (
            # `is_global` has the registries of IANA (RFC 6890) as they were when Python was released, and lets some of
            # these pass; they are ranges that end up somewhere inside, or in another protocol.
            "0.0.0.0/8",
            "100.64.0.0/10",  # carrier-grade NAT (RFC 6598), and metadata of one cloud
            "168.63.129.16/32",  # the host of a virtual machine in Azure, in a public range
            "169.254.0.0/16",  # link-local, and metadata of most clouds
            "192.0.0.0/24",
            "192.88.99.0/24",  # 6to4 relays (RFC 7526)
            "198.18.0.0/15",
            "224.0.0.0/3",  # multicast, reserved, broadcast
            "2001::/23",  # Teredo and other protocols' own
            "2001:db8::/32",
            "2002::/16",  # 6to4: holds an IPv4 address
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""The only IPv6 block that IANA gives addresses from: without ::/96, ::ffff:0:0/96, 64:ff9b::/96 and 64:ff9b:1::/48
(which hold IPv4 addresses), fc00::/7, fe80::/10, fec0::/10 and multicast."""

Address = tuple[str, int]
"""A numeric address and a port."""

_log = logging.getLogger(__name__)


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the open internet. On a network that has only NAT64, nothing is."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if parsed.version == 6 and (parsed.scope_id or parsed not in _GLOBAL_UNICAST):
        return False
    return parsed.is_global and not any(
        parsed in network for network in _REFUSED if network.version == parsed.version
    )


def look_up(host: str, port: int) -> list[Address]:
    """The addresses of a name, in the system's order. Raises `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(address[0]), int(address[1])) for *_, address in found]


class _Refused(Exception):
    """A fixed sentence for the client."""


class Fetcher:
    """Fetches pictures from the hosts of `config`. For one event loop.

    Args:
        config: hosts and limits.
        resolve, is_allowed, verify: the system's lookup, `is_public` and the system's certificates; tests have others.

    Raises `UserError` for an entry of `fetch_hosts` that is no name.
    """

    def __init__(
        self,
        config: PicturesConfig,
        *,
        resolve: Callable[[str, int], Sequence[Address]] = look_up,
        is_allowed: Callable[[str], bool] = is_public,
        verify: ssl.SSLContext | None = None,
    ) -> None:
        for pattern in config.fetch_hosts:
            if not re.fullmatch(rf"(\*\.)?{_NAME}", pattern.lower()):
                raise UserError(
                    f"pictures.fetch_hosts has {pattern!r}; expected a host's name such as images.example.org, or "
                    "*.example.org for the names below it."
                )
        self.schemes = ("https", "http") if config.fetch_plain_http else ("https",)
        self._config, self._resolve, self._is_allowed = config, resolve, is_allowed
        self._hosts = tuple(pattern.lower() for pattern in config.fetch_hosts)
        self._verify = verify or httpx2.create_ssl_context(trust_env=False)
        self._lookups = Workers(NUM_LOOKUPS, name="lookup")

    def close(self) -> None:
        """Ends the threads; waits for no lookup."""
        self._lookups.close()

    async def fetch(self, url: str, *, param: str) -> bytes:
        """The body behind `url`, at most `max_bytes` of it.

        Raises:
            ApiError: 400 that names `param`, for every refusal and every failure.
        """
        try:
            async with asyncio.timeout(self._config.fetch_timeout_s):
                return await self._fetch(self._check(url))
        except _Refused as error:
            said = str(error)
        except TimeoutError:
            said = f"The picture did not arrive within {self._config.fetch_timeout_s:g} s."
        except (httpx2.HTTPError, OSError, ValueError) as error:
            # OSError: of ssl, where httpx2 does not translate it; ValueError: of h11, for a length of 5,000 digits.
            _log.info("%s could not be fetched: %r", param, error)
            said = "The picture's host could not be reached, or its answer broke off."
        raise invalid(
            f"{said} Send the picture as a data: URL instead.",
            param=param,
            code="failed_to_download_image",
        )

    def _check(self, url: str) -> httpx2.URL:
        """Raises `_Refused` unless the host may be asked."""
        if len(url) > MAX_URL_CHARS or not _URL.fullmatch(url):
            raise _Refused(
                f"The picture's address has more than {MAX_URL_CHARS} characters, or some that must be encoded "
                "(xn-- for names, % for the rest)."
            )
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            raise _Refused("The picture's address is no valid URL.") from None
        if parsed.scheme not in self.schemes:
            raise _Refused(f"Pictures are fetched by {' and '.join(self.schemes)} only.")
        if parsed.userinfo or parsed.port is not None:
            raise _Refused("The picture's address has a user name or a port.")
        if not self._is_listed(parsed.host):
            raise _Refused("This server fetches no pictures from that host.")
        return parsed

    def _is_listed(self, host: str) -> bool:
        # A trailing dot, %, an address in brackets; or longer than a name can be (RFC 1035, section 2.3.4).
        if not re.fullmatch(_NAME, host) or len(host) > 253:
            return False
        return any(
            host == pattern or (pattern.startswith("*.") and host.endswith(pattern[1:]))
            for pattern in self._hosts
        )

    async def _fetch(self, url: httpx2.URL) -> bytes:
        for address in (addresses := await self._addresses(url)):
            try:
                return await self._get(url, address)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if address == addresses[-1]:
                    raise
                # Else the next one, which was checked as well: of two families, a machine may have one.
        raise _Refused("The picture's host has no address.")

    async def _addresses(self, url: httpx2.URL) -> list[Address]:
        """Looked up once. Raises `_Refused` unless all of them may be connected to."""
        port = 443 if url.scheme == "https" else 80
        lookup = self._lookups.submit(functools.partial(self._resolve, url.host, port))
        try:
            found = await asyncio.wrap_future(lookup)
        except (OSError, UnicodeError):
            return []
        finally:
            self._lookups.give_up(lookup)  # no-op unless our time was over
        if not all(self._is_allowed(address) for address, _ in found):
            raise _Refused("This server fetches no pictures from that host.")
        return list(dict.fromkeys(found))

    async def _get(self, url: httpx2.URL, address: Address) -> bytes:
        """One request, to `address` and nowhere else. No connection is kept: it was checked for this name alone."""
        host, port = address
        limit_s = self._config.fetch_timeout_s
        async with (
            httpx2.AsyncClient(
                verify=self._verify,
                trust_env=False,  # neither proxies nor netrc
                follow_redirects=False,
                timeout=httpx2.Timeout(
                    limit_s, connect=limit_s / 3
                ),  # a second address has its turn
            ) as client,
            client.stream(
                "GET",
                url.copy_with(host=host, port=port, fragment=None),
                headers={
                    "Host": url.host,
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": "minigpt4_jax",
                },
                extensions={"sni_hostname": url.host},
            ) as response,
        ):
            return await self._body(response)

    async def _body(self, response: httpx2.Response) -> bytes:
        if response.is_redirect or 300 <= response.status_code < 400:
            raise _Refused("The picture's host answered with a redirect, which is not followed.")
        if response.status_code != 200:
            raise _Refused(
                f"The picture's host answered with the status {response.status_code}; expected 200."
            )
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Refused("The picture's host compressed its answer, although asked not to.")
        most = self._config.max_bytes
        if int(response.headers.get("content-length", 0)) > most:
            raise _too_long(most)
        body = bytearray()
        async for part in response.aiter_raw():
            body += part
            if len(body) > most:
                raise _too_long(most)
        return bytes(body)


def _too_long(most: int) -> _Refused:
    return _Refused(f"The picture has more than {most} bytes.")
