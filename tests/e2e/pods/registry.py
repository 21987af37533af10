"""A registry that serves one image out of an OCI archive, to pulls from the node it runs on.

Run as a script there: registry.py ARCHIVE PORT. It says "serving" when it does. Names do not
matter: every repository is that image's.
"""

from __future__ import annotations

import http.server
import json
import sys
import tarfile


def main() -> None:
    archive, port = sys.argv[1], int(sys.argv[2])
    with tarfile.open(archive) as tar:
        files = {entry.name: tar.extractfile(entry) for entry in tar if entry.isfile()}
        files = {name: file.read() for name, file in files.items()}
    (top,) = json.loads(files["index.json"])["manifests"]
    blobs = {f"sha256:{n.rpartition('/')[2]}": data for n, data in files.items() if "/sha256/" in n}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, reference = self.path.rpartition("/")
            digest = reference if reference in blobs else top["digest"]
            manifest = kind.endswith("/manifests")
            media = top["mediaType"] if manifest else "application/octet-stream"
            self.send_response(200)
            self.send_header("Content-Type", media)
            self.send_header("Content-Length", str(len(blobs[digest])))
            self.send_header("Docker-Content-Digest", digest)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(blobs[digest])

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print("serving", flush=True)
    server.serve_forever()


main()
