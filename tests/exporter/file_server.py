"""A web server on this machine in the place of the hosts that publish weights."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; each file's entity tag is its SHA-256, as the Hugging Face hub's are for weights.

    A file "X.etag" beside X holds another tag for it.
    """

    def end_headers(self) -> None:
        file = Path(self.translate_path(self.path))
        if file.is_file():
            told = file.with_name(f"{file.name}.etag")
            tag = told.read_text() if told.exists() else hashlib.sha256(file.read_bytes()).hexdigest()
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", HUB_COMMIT)
        super().end_headers()

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.replace(f"/resolve/{HUB_COMMIT}/", "/resolve/main/"))

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve `folder`; gives the address, without a slash at its end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def file_with_hash(folder: Path, stem: str, content: bytes) -> Path:
    """Write `content` to a file whose name ends in the start of its SHA-256, as torch.hub expects it."""
    file = folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    file.write_bytes(content)
    return file
