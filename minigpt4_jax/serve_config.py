"""What a server is: every decision is a field of a frozen dataclass in this file.

For: `ServeConfig` and its parts. Not for: how an answer is written (the request and the model's preset say that), and
not for keys, which are secrets: they come from a file or the environment (`AccessConfig`).

Differs from the original, whose demo has one option, the number of a GPU, and is open to the internet.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal

from minigpt4_jax.config import UserError, require_positive

CompileBeside = Literal["wanted", "all", "none"]
KEYS_VARIABLE = "MINIGPT4_API_KEYS"
"""Keys in the environment, separated by commas."""


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Who may ask."""

    api_keys_file: str = ""
    """One key a line; empty lines and those that begin with # are skipped. Beside those of the environment variable
    `MINIGPT4_API_KEYS`. Without any key everybody who reaches the port may ask."""
    open_without_key: bool = False
    """Binds to an address that others can reach although there is no key."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser, such as `https://chat.example.org`. Empty: none but ours."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the Host header may have, against DNS rebinding. Empty: on a loopback address its usual names, else
    any."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one request, one key and all of them together may take."""

    max_body_bytes: int = 32 * 2**20
    max_header_bytes: int = 16 * 2**10
    body_timeout_s: float = 30.0
    """From the first to the last byte of a request's body."""
    max_waiting: int = 64
    """Requests that wait for a slot, and those that wait for beams; one more is answered 429 with Retry-After."""
    max_per_key: int = 32
    """Requests of one key (without keys: of one address) that wait or run."""
    request_timeout_s: float = 300.0
    """From the arrival of a request to the end of its answer."""
    write_timeout_s: float = 60.0
    """A client that takes nothing for so long is given up."""
    max_messages: int = 256
    max_text_chars: int = 200_000
    """Of all messages together; the model's context is usually far shorter."""
    max_n: int = 8
    """Answers to one request."""
    max_beams: int = 10
    max_connections: int = 1024

    def __post_init__(self) -> None:
        require_positive(
            self,
            "max_body_bytes",
            "max_header_bytes",
            "body_timeout_s",
            "max_waiting",
            "max_per_key",
            "request_timeout_s",
            "write_timeout_s",
            "max_messages",
            "max_text_chars",
            "max_n",
            "max_beams",
            "max_connections",
        )


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """Which pictures are taken, and from where."""

    max_count: int = 8
    """In one request, earlier turns too."""
    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_side: int = 65_500
    """The longest side in pixels; also the most that JPEG knows."""
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    num_threads: int = 2
    """Threads that decode pictures."""
    decode_timeout_s: float = 20.0
    """For all pictures of a request, waiting for a thread too."""
    fetch_hosts: tuple[str, ...] = ()
    """Hosts that `https://` pictures may come from, such as `images.example.org`; `*.example.org` stands for every name
    below it. Empty: none, and only `data:` pictures are taken."""
    fetch_plain_http: bool = False
    """Also `http://`, from the same hosts."""
    fetch_timeout_s: float = 10.0
    """For one picture, from the name's lookup to the last byte."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "max_count",
            "max_bytes",
            "max_pixels",
            "max_side",
            "num_threads",
            "decode_timeout_s",
            "fetch_timeout_s",
        )


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """When a server that has trouble goes on, and when it ends for its supervisor to start it anew."""

    max_faults: int = 3
    """Faults of the engine within `faults_window_s`; with one more the server is not ready any more and ends."""
    faults_window_s: float = 60.0
    stall_s: float = 120.0
    """An engine with work that does not move for so long is given up: the server ends. Longer than the longest piece of
    work on a busy machine: a batch of pictures, or a prompt of the whole context. That a search waits for its compiler
    does not count: `limits.request_timeout_s` ends it."""
    drain_s: float = 30.0
    """After SIGTERM: what is being answered may go on for so long."""

    def __post_init__(self) -> None:
        require_positive(self, "max_faults", "faults_window_s", "stall_s", "drain_s")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One server. The defaults are the smol model, on this machine only."""

    model: str = "smol"
    """`smol`, or a folder or URL that `python -m convert` wrote."""
    projection: str = ""
    """A projection file instead of the model's own."""
    served_name: str = ""
    """What the API calls the model. Empty: the last part of `model`."""
    weights: str = "auto"
    cache: str = "auto"
    context: int = 2048
    """Longest prompt plus answer, in tokens. Harnesses ask for answers of up to 1,024."""
    num_slots: int = 8
    """Answers that are written side by side."""
    compile_beside: CompileBeside = "wanted"
    """Programs that are compiled while requests are served, behind the core that serves all of them with padding:
    the sizes that requests wanted, `all` sizes in the first minutes, or `none`. Each takes memory of the process."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one, which is printed."""
    page: bool = True
    """Also the chat page, at `/`."""
    access: AccessConfig = field(default_factory=AccessConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def __post_init__(self) -> None:
        require_positive(self, "context", "num_slots")
        if not 0 <= self.port <= 65_535:
            raise UserError(f"port is {self.port}; expected 0 (any free one) to 65535.")

    @property
    def name(self) -> str:
        """What the API calls the model."""
        return self.served_name or self.model.rstrip("/").rpartition("/")[2]

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches `host`. A name other than localhost counts as reachable."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
