"""Hosts on loopback that answer with given bytes, a certificate for them, and a guard that sees every connection."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAME = "images.example.org"

Script = Callable[[], Iterable[bytes]]
"""What is sent, piece by piece, after a request was read."""


def answer(body: bytes = b"", *headers: str, status: str = "200 OK") -> Script:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""])
    return lambda: [head.encode() + body]


class Host:
    """Answers each connection once."""

    def __init__(self, script: Script, context: ssl.SSLContext | None) -> None:
        self.requests: list[bytes] = []
        self.names: list[str | None] = []
        """What clients called the host in TLS."""
        self.stopped = threading.Event()
        self._script, self._context = script, context
        if context is not None:
            context.sni_callback = lambda _, name, __: self.names.append(name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                with connection:
                    connection.settimeout(30)
                    self._answer(connection)
            except OSError:
                pass  # the client has had enough, or did not like the certificate

    def _answer(self, connection: socket.socket) -> None:
        if self._context is not None:
            connection = self._context.wrap_socket(connection, server_side=True)
        with connection:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                if not (part := connection.recv(4096)):
                    return
                request += part
            self.requests.append(request)
            for piece in self._script():
                if self.stopped.is_set():
                    return
                connection.sendall(piece)


@contextmanager
def host(script: Script, context: ssl.SSLContext | None = None) -> Iterator[Host]:
    made = Host(script, context)
    try:
        yield made
    finally:
        made.stop()


def make_certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A host's side for `name`, and a client's side that trusts it and nothing else."""
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out"),
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


class Guard:
    """Every address that a socket was to be connected to, and every name that the system was to look up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connected: list[Any] = []
        self.looked_up: list[Any] = []
        connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
        look_up = socket.getaddrinfo

        def record(to: list[Any], call: Callable[..., Any]) -> Callable[..., Any]:
            def recorded(*arguments: Any, **named: Any) -> Any:
                to.append(arguments[-1] if to is self.connected else arguments[0])
                return call(*arguments, **named)

            return recorded

        monkeypatch.setattr(socket.socket, "connect", record(self.connected, connect))
        monkeypatch.setattr(socket.socket, "connect_ex", record(self.connected, connect_ex))
        monkeypatch.setattr(socket, "getaddrinfo", record(self.looked_up, look_up))
