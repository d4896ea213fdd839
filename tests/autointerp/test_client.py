"""The client against a real HTTP server on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from autointerp.client import Client, EndpointConfig, Ledger
from hooks.files import EndpointError, FolderError

ASK = [{"role": "user", "content": "Is the heart enlarged?"}]


@pytest.fixture
def server():
    """An OpenAI-compatible endpoint that follows a script of statuses, then answers."""

    class Handler(BaseHTTPRequestHandler):
        script: ClassVar[list] = []
        seen: ClassVar[list] = []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.seen.append(body)
            status = self.script.pop(0) if self.script else 200
            if status == "drop":
                self.connection.close()
                return
            reply = {"error": {"message": "scripted"}}
            if status == 200:
                message = {"role": "assistant", "content": f"answer {len(self.seen)}"}
                reply = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                }
            payload = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args):
            pass

    Handler.script, Handler.seen = [], []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd, Handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def client_of(server, folder, **kwargs):
    url = f"http://127.0.0.1:{server[0].server_address[1]}/v1"
    return Client(
        EndpointConfig(url, "tiny", timeout=5, **kwargs), Ledger(folder / "ledger.sqlite")
    )


def test_an_answer_is_paid_for_once_across_runs(server, tmp_path):
    first = client_of(server, tmp_path)
    assert first.ask(ASK, 4) == "answer 1"
    assert first.ask(ASK, 4) == "answer 1"
    assert client_of(server, tmp_path).ask(ASK, 4) == "answer 1"
    assert len(server[1].seen) == 1
    assert server[1].seen[0]["temperature"] == 0 and server[1].seen[0]["max_tokens"] == 4
    assert first.ask(ASK, 5) == "answer 2"  # another request


def test_rate_limits_and_server_errors_are_retried(server, tmp_path):
    server[1].script = [429, 503, "drop"]
    assert client_of(server, tmp_path).ask(ASK, 4) == "answer 4"


def test_refusal_is_one_line_and_not_retried(server, tmp_path):
    server[1].script = [401]
    with pytest.raises(EndpointError, match=r"refused with status 401: .*scripted") as caught:
        client_of(server, tmp_path).ask(ASK, 4)
    assert "\n" not in str(caught.value)
    assert len(server[1].seen) == 1


def test_endpoint_that_is_down(tmp_path):
    config = EndpointConfig("http://127.0.0.1:9/v1", "tiny", max_retries=0)
    client = Client(config, Ledger(tmp_path / "ledger.sqlite"))
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:9/v1 cannot be reached") as caught:
        client.ask(ASK, 4)
    assert not caught.value.resumable
    client.ledger.put("x", "y")
    with pytest.raises(EndpointError, match="1 finished requests are kept") as caught:
        client.ask(ASK, 4)
    assert caught.value.resumable


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_text('{"request": "a", "answer": "1"}\n' * 50)
    with pytest.raises(FolderError, match=r"ledger\.sqlite cannot be used as a ledger"):
        Ledger(path)


def test_an_answer_stays_as_it_was_first_given(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.put("a", "1")
    ledger.put("a", "2")
    assert ledger.get("a") == "1" and ledger.get("b") is None and len(ledger) == 1


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://[::1]:1/v1"])
def test_loopback_is_allowed(url):
    assert EndpointConfig(url, "m").base_url == url


def test_report_text_stays_on_this_machine_unless_the_host_is_named():
    with pytest.raises(EndpointError, match=r"pass --allow-remote api\.example\.org"):
        EndpointConfig("https://api.example.org/v1", "m")
    with pytest.raises(EndpointError, match="not this machine"):
        EndpointConfig("https://127.0.0.1.example.org/v1", "m", allow_remote="example.org")
    allowed = EndpointConfig("https://api.example.org/v1", "m", allow_remote="api.example.org")
    assert allowed.model == "m"
    with pytest.raises(EndpointError, match="is not a URL"):
        EndpointConfig("localhost", "m")
