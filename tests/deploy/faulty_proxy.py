"""A proxy on the loopback between a client and an S3 server, that does to requests what networks and servers do."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str
FAULTS = ("503", "timeout", "dropped", "broken")
"""Too busy; no answer; closed without one; closed in the middle of the answer, after the request was done."""


class FaultyProxy:
    """Passes requests on to ``server`` (host, port); ``choose(number, method)`` names the fault of one, or ``None``."""

    def __init__(self, server: tuple[str, int], hang_s: float = 0.3) -> None:
        self.choose: Callable[[int, str], Fault | None] = lambda number, method: None
        self.faults: Counter[str] = Counter()
        self.requests = 0
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                with lock:
                    proxy.requests += 1
                    fault = proxy.choose(proxy.requests, self.command)
                    proxy.faults.update([fault] if fault else [])
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault == "503":
                    self.send_response(503, "Slow Down")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif fault == "timeout":
                    time.sleep(hang_s)
                    self.close_connection = True
                elif fault == "dropped":
                    self.close()
                else:
                    self.forward(body, broken=fault == "broken")

            def forward(self, body: bytes, broken: bool) -> None:
                upstream = http.client.HTTPConnection(*server, timeout=30)
                upstream.request(self.command, self.path, body, dict(self.headers))
                found = upstream.getresponse()
                content = found.read()
                self.send_response(found.status, found.reason)
                for name, value in found.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                        self.send_header(name, value)
                length = found.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                if broken and not content:  # nothing to break off: the answer itself is lost
                    self.close()
                    return
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if broken else content)
                if broken:
                    self.wfile.flush()
                    self.close()
                upstream.close()

            def close(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                """Say nothing: clients go away as they like."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Endpoint for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
