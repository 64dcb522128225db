"""S3 on this machine: moto's server in a thread, whose requests are counted and can be made to fail."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

Environ = dict[str, Any]
Fault = Callable[[Environ], tuple[str, bytes] | None]
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


def denied(environ: Environ) -> tuple[str, bytes]:
    return "403 Forbidden", b"" if environ["REQUEST_METHOD"] == "HEAD" else DENIED


def cut(environ: Environ) -> None:
    """The connection ends without an answer."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def killing(process: Callable[[], int]) -> Fault:
    """process: number of the one that asks."""

    def kill(environ: Environ) -> None:
        os.kill(process(), signal.SIGKILL)

    return kill


@dataclass
class Server:
    """What is between a client and S3. requests: counted since `arm`."""

    requests: int = 0
    fault: Fault | None = None
    first: int = 0
    after: bool = False
    lasts: bool = False
    s3: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(self, fault: Fault | None = None, first: int = 1, after: bool = False, lasts: bool = False) -> None:
        """fault: meets request number `first`, and where it lasts all later ones; it gives the answer, or None to let
        S3 give it. after: S3 has done then what was asked, and gives no answer."""
        self.requests, self.fault, self.first, self.after, self.lasts = 0, fault, first, after, lasts

    def __call__(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            self.requests += 1
            due = self.requests == self.first or (self.lasts and self.requests > self.first)
        if self.fault is None or not due:
            return self.s3(environ, start)
        if self.after:
            list(self.s3(environ, lambda status, headers: None))
        if (answer := self.fault(environ)) is None:
            return self.s3(environ, start)
        start(answer[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(answer[1])))])
        return [answer[1]]


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server, and the variables by which clients of this process and of its children find it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = Server()
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # A request that fails is not sent again.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        try:
            yield app
        finally:
            server.shutdown()
            thread.join()
            fsspec.get_filesystem_class("s3").clear_instance_cache()
