"""A web server for downloads that sends files, parts of them, or something else."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What it has, and what it was asked for.

    Args:
        url: Of its root.
        files: Content by name.
        cuts: By name, after how many bytes the next answers break off; used up one by one.
        deaf: Names of which all is always sent, whatever range is asked for.
        encoded: Names that are sent as gzip-encoded.
        asked: Name and Range header of each request.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    deaf: set[str] = field(default_factory=set)
    encoded: set[str] = field(default_factory=set)
    asked: list[tuple[str, str | None]] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Server]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, wanted = self.path.lstrip("/"), self.headers.get("Range")
            server.asked.append((name, wanted))
            if name not in server.files:
                self.send_error(404)
                return
            content, start = server.files[name], 0
            if wanted and name not in server.deaf:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if name in server.encoded:
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            cuts = server.cuts.get(name)
            self.wfile.write(content[start:][: cuts.pop(0) if cuts else None])

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server = Server(f"http://127.0.0.1:{http.server_address[1]}/")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
