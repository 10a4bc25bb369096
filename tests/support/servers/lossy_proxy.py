"""A server in front of another one that loses answers: the request arrives, its answer does not."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.servers.stores import serving


class _Handler(BaseHTTPRequestHandler):
    server: _Proxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        end = next((end for end in self.server.lose if self.path.endswith(end)), None)
        if end is not None:
            self.server.lose.remove(end)
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, lose: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.lose = port, lose


@contextmanager
def losing_answers(port: int, lose: list[str]) -> Iterator[str]:
    """URL of the proxy.

    Args:
        port: of the server on this machine.
        lose: ends of paths, each of one request whose answer is lost; emptied by that.
    """
    with serving(_Proxy(port, lose)) as url:
        yield url
