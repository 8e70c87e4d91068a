"""A server that W&B's client takes for W&B, as far as a run of ours goes: it keeps the charts, and can fall silent."""

import gzip
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


class Server(ThreadingHTTPServer):
    """Of each run, by its id, the rows of its charts as the client uploaded them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, str]] = {}  # what each run was created with
        self.lines: dict[str, dict[int, str]] = defaultdict(dict)
        self.silent = threading.Event()  # while it is set, requests are taken and not answered

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that did not wait for its answer."""

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL has to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def charts(self, run: str) -> list[dict[str, Any]]:
        """The rows of a run, without W&B's clocks."""
        rows = [json.loads(line) for _, line in sorted(self.lines[run].items())]
        return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime", "_wandb")} for row in rows]


class Handler(BaseHTTPRequestHandler):
    """Answers what the client asks."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        """A GraphQL query, or lines of a file."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.server.silent.is_set():
            time.sleep(0.1)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/graphql":
            asked = json.loads(body)
            return self._answer({"data": self._data(asked["query"], asked.get("variables") or {})})
        parts = self.path.strip("/").split("/")
        if parts[-1] == "file_stream":
            chunk = json.loads(body).get("files", {}).get(HISTORY)
            if chunk:
                lines = self.server.lines[parts[-2]]
                lines |= {chunk["offset"] + index: line for index, line in enumerate(chunk["content"])}
        self._answer({})

    do_GET = do_PUT = do_POST

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name")
        if "RunResumeStatus" in query:
            if name not in self.server.runs:
                return {"model": {"id": "p", "name": "net2net", "entity": {"id": "e", "name": "us"}, "bucket": None}}
            return {
                "model": {"id": "p", "name": "net2net", "entity": {"id": "e", "name": "us"}, "bucket": self._run(name)}
            }
        if "upsertBucket" in query:
            new = name not in self.server.runs
            self.server.runs[name] = self.server.runs.get(name, {}) | {k: v for k, v in variables.items() if v}
            return {"upsertBucket": {"bucket": self._run(name), "inserted": new}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _run(self, name: str) -> dict[str, Any]:
        lines = self.server.lines[name]
        tail = [lines[max(lines)]] if lines else []
        return {
            **{"id": name, "name": name, "displayName": name, "sweepName": None, "description": None},
            "project": {"id": "p", "name": "net2net", "entity": {"id": "e", "name": "us"}},
            **{"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0},
            **{"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": tail[-1] if tail else "{}"},
            **{"config": self.server.runs.get(name, {}).get("config", "{}"), "tags": [], "notes": None},
            "wandbConfig": '{"t": 1}',
        }

    def _answer(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve() -> Iterator[Server]:
    """A server that answers until the block ends."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.silent.clear()
        server.shutdown()
        server.server_close()
