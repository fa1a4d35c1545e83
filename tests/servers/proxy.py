"""A forward proxy on a real socket, in a thread, that writes down what it was asked.

    with start_proxy({"x.replicate.delivery:443": ("127.0.0.1", 8443)}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        ...
        proxy.asked    # "CONNECT x.replicate.delivery:443", "POST http://127.0.0.1:8000/v1/…"

It knows the addresses it was given, by host and port, and looks up all others as usual.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    def log_message(self, *words: object) -> None:
        """Nothing is printed."""

    def _reach(self, host: str, port: int) -> socket.socket:
        known = self.server.known.get(f"{host}:{port}", (host, port))
        return socket.create_connection(known, timeout=30)

    def do_CONNECT(self) -> None:
        """A tunnel to the host; 407 where the proxy wants another password."""
        self.server.asked.append(f"CONNECT {self.path}")
        if self.server.closed:
            return self.send_error(407)
        host, _, port = self.path.rpartition(":")
        with self._reach(host, int(port)) as target:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=self._copy, args=(target, self.connection), daemon=True)
            back.start()
            self._copy(self.connection, target)
            back.join(30)
        self.close_connection = True

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def forward(self) -> None:
        """The request, handed on with the path alone; the answer, as it comes."""
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.closed:
            return self.send_error(407)
        url, length = urlsplit(self.path), int(self.headers.get("content-length", 0))
        path = url.path + (f"?{url.query}" if url.query else "")
        dropped = ("proxy-", "connection")
        lines = [f"{k}: {v}" for k, v in self.headers.items() if not k.lower().startswith(dropped)]
        head = "\r\n".join([f"{self.command} {path} HTTP/1.1", *lines, "Connection: close", "", ""])
        with self._reach(url.hostname, url.port or 80) as target, suppress(OSError):
            target.sendall(head.encode("latin-1") + self.rfile.read(length))
            answer = target.makefile("rb")
            if status := answer.readline():
                self.wfile.write(status + b"Connection: close\r\n")
            while data := answer.read1(65536):
                self.wfile.write(data)
        self.close_connection = True

    do_GET = do_POST = forward


class Proxy(ThreadingHTTPServer):
    """A running proxy."""

    daemon_threads = True

    def __init__(self, known: dict[str, tuple[str, int]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.known, self.asked, self.closed = known, [], False
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def start_proxy(known: dict[str, tuple[str, int]] | None = None) -> Iterator[Proxy]:
    """A proxy that is ready; leaving the `with` ends it."""
    proxy = Proxy(known or {})
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
