"""A real server of vLLM, by HTTP, with the arguments that `python -m trainers.serve` prints.

In an environment of its own: `make test-serve`.
"""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import ENVIRONMENT, NEW, ROOT, VLM, expect, questions

pytest.importorskip("vllm", reason="`make test-serve` installs vLLM in an environment of its own")

PRUNER, COUNT, KEEPS = "checkpoints/ppm-tiny", 64, (16, 4, 1)
"""The server keeps the first of these, and requests ask for any."""


def url_of(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def body(chat, images, keep=None):
    """A request as the client of OpenAI makes it; `extra_body` there is what stands beside the messages here."""
    urls = iter(url_of(image) for image in images)
    messages = [
        {
            **turn,
            "content": [
                {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
                for part in turn["content"]
            ],
        }
        for turn in chat
    ]
    request = {"model": VLM, "messages": messages, "temperature": 0, "max_tokens": NEW, "return_token_ids": True}
    return {**request, **({} if keep is None else {"mm_processor_kwargs": {"prunezoo_keep": keep}})}


def post(server, request, timeout=600):
    """Status and answer."""
    asked = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address, while it runs."""
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    words = [sys.executable, "-m", "trainers.serve", "--pruner", PRUNER, "--keep", str(KEEPS[0]), "--print-args"]
    printed = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "reads the prompt" in printed.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", VLM, *printed.stdout.split()]
    words += f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 1024".split()
    words += ["--max-num-seqs", "8", "--trust-request-mm-kwargs"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=out)
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 900
            while True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def expected(answers_folder):
    """Answers at each keep."""
    jobs = [
        {"vlm": VLM, "pruner": PRUNER, "keep": keep, "positions": "original", "count": COUNT, "images": 1}
        for keep in KEEPS
    ]
    return dict(zip(KEEPS, expect(answers_folder, jobs), strict=True))


def test_eight_clients_with_keeps_of_their_own_and_others_who_go_wrong(server, expected):
    """64 questions from eight clients; meanwhile some hang up, and some send what is refused, to them alone."""
    asked = questions(COUNT)
    keeps = [KEEPS[i % 3] for i in range(COUNT)]
    chat, images = asked[0]

    def hang_up():
        data = json.dumps(body(chat, images)).encode()
        host, _, port = server.removeprefix("http://").partition(":")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    broken = body(chat, images)
    broken["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,bm8gcGljdHVyZQ=="
    wrong = [broken, *(body(chat, images, keep) for keep in (17, 0, -3, 0.9, "many", True))]
    with ThreadPoolExecutor(8) as clients, ThreadPoolExecutor(4) as others:
        answers = [
            clients.submit(post, server, body(*one, None if keep == KEEPS[0] else keep))
            for one, keep in zip(asked, keeps, strict=True)
        ]
        refused = [others.submit(post, server, request) for request in wrong]
        gone = [others.submit(hang_up) for _ in range(4)]
        assert [one.exception() for one in gone] == [None] * 4
        codes = [one.result() for one in refused]
        replies = [one.result() for one in answers]
    assert all(400 <= code < 500 for code, _ in codes), codes
    assert all("keep" in reply["error"]["message"] for _, reply in codes[1:]), codes
    assert [code for code, _ in replies] == [200] * COUNT
    for i, (_, reply) in enumerate(replies):
        assert reply["choices"][0]["token_ids"] == expected[keeps[i]][i], i
        assert reply["usage"]["prompt_tokens"] < keeps[i] + 20
    assert post(server, body(chat, images))[0] == 200  # it is still there


def test_keeps_are_told_apart(expected):
    assert expected[16] != expected[4] != expected[1]
