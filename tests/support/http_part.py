"""A tiny part for the tests of supervision: `http_part.py PORT [hang|children|die]` serves 200 on /."""

from __future__ import annotations

import http.server
import subprocess
import sys
import time
from pathlib import Path


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        while Path("hang").exists():
            time.sleep(0.1)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent: a line for a supervisord that was killed would end in a broken pipe."""


if __name__ == "__main__":
    port, ways = int(sys.argv[1]), sys.argv[2:]
    if "die" in ways:
        for number in range(15):
            print(f"cannot read the flux {number}", flush=True)
        sys.exit(3)
    if "children" in ways:
        # The child holds the port, as MLflow's uvicorn does: it outlives a parent that is killed.
        sys.exit(subprocess.call([sys.executable, __file__, str(port)]))
    http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
