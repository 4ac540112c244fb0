"""What a stranger can send to the page of `trainers.show --serve`: 4xx and one line, and the next request is answered.

The server is the real one, with a real model; what no client library would send goes over a raw socket.
"""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from contextlib import closing

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image
from web import serving

from trainers import show
from trainers.cli.names import ROOT
from trainers.evaluation import web
from trainers.evaluation.methods import build_method


def uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(size):
    """A picture of one colour, which is small however large it is."""
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    return buffer.getvalue()


ASKED = {"picture": uri(png((24, 24))), "question": "what color is the ball ?", "pruner": "uniform", "keep": "1/9"}


@pytest.fixture(scope="module")
def address(tiny_llava):
    patch = pytest.MonkeyPatch()
    patch.setattr(web, "MOST_SECONDS", 0.7)
    with serving(web.Page(tiny_llava.vlm, tiny_llava.processor, [build_method("uniform")]), ["zoo.example"]) as found:
        yield found
    patch.undo()


def post(address, value, headers=None):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    request = urllib.request.Request(f"{address}answer", data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def connect(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    return closing(socket.create_connection(("127.0.0.1", port), timeout=10))


def received(line):
    """Status and body of what comes back."""
    reply = http.client.HTTPResponse(line)
    reply.begin()
    return reply.status, reply.read().decode()


def raw(address, sent):
    """Status and body of what comes back for these bytes."""
    with connect(address) as line:
        line.sendall(sent)
        return received(line)


def still_answers(address):
    status, body = post(address, ASKED)
    assert status == 200 and len(json.loads(body)["shown"][0]["kept"]) == 4, body


def bomb():
    """A PNG of 60000 x 60000 pixels in a few hundred bytes: its data ends where it begins."""
    whole = png((8, 8))
    size = (60000).to_bytes(4, "big")
    chunk = b"IHDR" + size + size + whole[24:29]
    return whole[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + whole[33:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": str(10**24)}, "--keep 1000000000000000000000000: a budget is at most"),
        ({"keep": f"auto:{10**24}"}, "a budget is at most"),
        ({"keep": "9" * 5000}, "keep: 5,000 letters, more than 32"),
        ({"keep": "-1"}, "at least 1 token"),
        ({"keep": "auto"}, "sets no budgets"),
        ({"question": "what " * 1000}, "question: 5,000 letters, more than 2,000"),
        ({"pruner": "[/b]\x1b[31m"}, "no pruner"),
        ({"beside": "x" * 5000}, "beside: 5,000 letters, more than 1,000"),
        ({"pruner": "x" * 5000}, "pruner: 5,000 letters, more than 1,000"),
        ({"picture": uri(png((9000, 6000)))}, "9000 x 6000 pixels, more than 50,000,000"),
        ({"picture": uri(bomb())}, "picture"),
        ({"picture": uri(b"GIF89a")}, "not a picture that can be read"),
        ({"picture": "data:,é"}, "not a picture that can be read"),
        ({"keep": 16}, "a question has picture, question, pruner, keep, all texts"),
    ],
)
def test_what_is_asked_is_bounded(address, change, said):
    status, body = post(address, {**ASKED, **change})
    assert 400 <= status < 500 and said in json.loads(body)["error"]
    assert len(body.splitlines()) == 1
    still_answers(address)


def test_a_body_that_is_no_question(address):
    for body in (b"{", b"[" * 100_000, b"\xff\xfe", b"", b"9" * 10_000, b'"' + b"a" * 10):
        status, said = post(address, body)
        assert 400 <= status < 500 and "\n" not in said, body[:10]
    assert post(address, ASKED, {"Content-Type": "application/x-www-form-urlencoded"})[0] == 415
    still_answers(address)


HEAD = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (HEAD + b"Content-Length: -1\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: many\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: +2\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: 1" + b"0" * 17 + b"\r\n\r\n{}", 413),
        (HEAD + b"Content-Length: %d\r\n\r\n{}" % (web.MOST_BYTES + 1), 413),
        (HEAD + b"Content-Length: 1" + b"0" * 400 + b"\r\n\r\n{}", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost.evil.example:7860\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_requests_that_no_browser_sends(address, sent, status):
    found, said = raw(address, sent)
    assert found == status and len(said.splitlines()) == 1, said
    still_answers(address)


def test_a_head_without_end_is_not_gathered(address):
    """It is cut off while it is sent, so that not every client reads the answer."""
    with connect(address) as line, pytest.raises(OSError):  # noqa: PT012 - whenever it is noticed
        for _ in range(1000):
            line.sendall(b"GET /" + b"a" * 65536)
    still_answers(address)


def test_names_of_this_machine_are_let_in_and_those_that_were_given(address):
    for host in (b"localhost", b"localhost:7860", b"127.0.0.1:1", b"[::1]:7860", b"LocalHost", b"zoo.example:443"):
        status, body = raw(address, b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        assert status == 200 and "What is kept" in body, host


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 400),
        (b"GET / HTTP/1.1\r\nHost: loc", 400),
        (HEAD + b"Content-Length: 50\r\n\r\n{", 408),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408),
    ],
    ids=lambda value: str(value)[:40],
)
def test_slow_sockets_are_given_up_and_keep_nobody_waiting(address, sent, status):
    with connect(address) as slow:
        slow.sendall(sent)
        still_answers(address)
        found, said = received(slow)
    assert found == status and len(said.splitlines()) == 1
    still_answers(address)


def test_a_client_that_leaves_in_the_middle(address):
    for sent in (HEAD + b"Content-Length: 50\r\n\r\n{", HEAD, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with connect(address) as line:
            line.sendall(sent)
    still_answers(address)


def test_too_much_in_pieces_is_not_gathered(address, monkeypatch):
    monkeypatch.setattr(web, "MOST_BYTES", 1000)
    piece = b"190\r\n" + b" " * 400 + b"\r\n"
    status, said = raw(address, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + piece * 3)
    assert status == 413 and json.loads(said)["error"].startswith("more than")
    monkeypatch.undo()
    still_answers(address)


def test_the_command_serves_until_ctrl_c(tiny_llava_folder):
    words = ["-m", "trainers.show", "--serve", "--port", "0", "--vlm", str(tiny_llava_folder), "--pruner", "uniform"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        still_answers(address)
        server.send_signal(signal.SIGINT)
        said, wrong = server.communicate(timeout=30)
    assert server.returncode == 0 and said == "" and "Traceback" not in wrong


def test_a_space_is_a_folder_that_serves_the_page(tmp_path):
    """Its app runs as a process of its own, from the folder alone, and answers under the name that the Hub tells it."""
    folder = tmp_path / "space"
    words = ["--vlm", "tiny-llava", "--pruner", "uniform", "--beside", "ppm"]
    assert show.main([*words, "--space", str(folder)]) == 0
    card = SpaceCard.load(folder / "README.md").data
    assert (card.sdk, card.app_port, card.license) == ("docker", 7860, "apache-2.0")
    assert f"EXPOSE {card.app_port}" in (folder / "Dockerfile").read_text()
    needed = {Requirement(line).name for line in (folder / "requirements.txt").read_text().splitlines()}
    assert {"torch", "transformers", "starlette", "uvicorn", "jinja2"} <= needed and "torchvision" not in needed
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"ADDRESS": "127.0.0.1", "PORT": "0", "SPACE_HOST": "org-name.hf.space", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, str(folder / "app.py")], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            address = re.search(r"http://\S+", server.stdout.readline())[0]
            asked = urllib.request.Request(address, headers={"Host": "org-name.hf.space"})
            with urllib.request.urlopen(asked, timeout=60) as reply:
                assert "<option selected>ppm-tiny</option>" in reply.read().decode()
            status, body = post(address, {**ASKED, "question": "is there a red circle ?", "beside": "ppm-tiny"})
            assert status == 200 and [len(one["kept"]) for one in json.loads(body)["shown"]] == [16, 16]
        finally:
            server.terminate()
    with pytest.raises(SystemExit):
        show.main([*words, "--space", str(folder)])  # it is not empty any more
