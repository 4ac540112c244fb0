"""The page of `trainers.show --serve`: a frozen model and pruners behind it, one question at a time.

Starlette and uvicorn read what comes in. Here are the limits: whatever is not a question of bounded size from this
machine is answered with 4xx and one line, and the next request is answered as ever.
"""

import asyncio
import base64
import socket
from collections.abc import Sequence
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from prunezoo.core.bounds import parse_json
from prunezoo.core.errors import PruneZooError
from prunezoo.core.near import near
from trainers.cli.errors import one_line
from trainers.data.pictures import BrokenImage, decode_picture
from trainers.data.suite import Item, load_suite

from .examples import pick_items
from .look import look
from .methods import Method
from .pictures import data_uri
from .report import page_templates
from .tables import display_name

MOST_BYTES = 20 << 20
"""Of a question with its picture."""
MOST_PIXELS = 50_000_000
"""Of a picture."""
MOST_LETTERS = {"question": 2000, "pruner": 1000, "beside": 1000, "keep": 32}
"""Of the texts."""
MOST_SECONDS = 10.0
"""Until the head of a request is there, and from there on until its body is."""
MOST_CONNECTIONS = 64
LOCAL = ("localhost", "127.0.0.1", "[::1]", "::1")
"""Names by which a page of this machine is asked for; another in the Host header means a page of elsewhere."""


class Page:
    """What the page shows and answers.

    Args:
        vlm: the model.
        processor: its processor.
        methods: what can be chosen; the first is shown first.
        beside: the one of them that is shown beside it at first; None: none.
    """

    def __init__(self, vlm: Any, processor: Any, methods: Sequence[Method], beside: str | None = None) -> None:
        self.vlm, self.processor = vlm, processor
        self.methods = {display_name(method.name): method for method in methods}
        self.beside = None if beside is None else display_name(beside)
        self.samples = pick_items(load_suite("scenes", "test"), 1)

    def html(self) -> str:
        """The page itself."""
        return (
            page_templates()
            .get_template("show.html.j2")
            .render(
                vlm=display_name(self.vlm.name_or_path),
                pruners=list(self.methods),
                beside=self.beside,
                most={"bytes": MOST_BYTES, "letters": MOST_LETTERS["question"]},
                samples=[{"picture": data_uri(item.image), "question": item.question} for item in self.samples],
            )
        )

    def answer(self, asked: Any) -> dict[str, Any]:
        """What the page asked for: `{picture, question, pruner, keep}`, the picture as a data URI.

        A second pruner may be named as `beside`. What is found has an entry of `shown` for each of them.

        Raises:
            PruneZooError: something of it cannot be read, or is too large.
        """
        keys = ("picture", "question", "pruner", "keep")
        if not isinstance(asked, dict) or not all(isinstance(asked.get(key), str) for key in keys):
            raise PruneZooError(f"a question has {', '.join(keys)}, all texts")
        if not isinstance(asked.get("beside", ""), str):
            raise PruneZooError("beside: the name of a pruner, or nothing")
        for key, most in MOST_LETTERS.items():
            if len(asked.get(key, "")) > most:
                raise PruneZooError(f"{key}: {len(asked[key]):,} letters, more than {most:,}")
        names = [asked[key] for key in ("pruner", "beside") if key in asked]
        for name in names:
            if name not in self.methods:
                raise PruneZooError(f"no pruner '{name}' here{near(name, self.methods)}")
        if not asked["question"].strip():
            raise PruneZooError("what is the question?")
        item = Item("asked", picture_of(asked["picture"]), ((asked["question"].strip(), ""),), "")
        methods = [self.methods[name] for name in dict.fromkeys(names)]
        example = look(self.vlm, self.processor, item, methods, [asked["keep"]])
        found = [
            {
                "pruner": display_name(one.pruner),
                "kept": [int(row * example.grid[1] + column) for row, column in one.kept],
                "anchors": one.anchors,
                "answer": one.answer,
                "same": one.right,
            }
            for one in example.shown
        ]
        return {"grid": example.grid, "full": example.answer, "shown": found}


def picture_of(uri: str) -> Image.Image:
    """The picture in a data URI, RGB.

    Raises:
        PruneZooError: there is none, or one of too many pixels.
    """
    try:
        return decode_picture(base64.b64decode(uri.partition(",")[2], validate=True), MOST_PIXELS)
    except BrokenImage as error:
        raise PruneZooError(f"that is not a picture that can be read ({error})") from None
    except ValueError:
        raise PruneZooError("that is not a picture that can be read") from None


def application(page: Page, hosts: Sequence[str] = ()) -> Starlette:
    """GET / is the page, POST /answer a question; what cannot be answered comes back as `{error}` in one line.

    Args:
        page: the page.
        hosts: further names by which it may be asked for.
    """
    turn = asyncio.Lock()

    async def show(_: Request) -> Response:
        return HTMLResponse(page.html(), headers={"Connection": "close"})

    async def answer(request: Request) -> Response:
        try:
            asked = parse_json((await asyncio.wait_for(read_body(request), MOST_SECONDS)).decode())
            async with turn:
                return reply(200, await run_in_threadpool(page.answer, asked))
        except HTTPException as error:
            return reply(error.status_code, {"error": error.detail})
        except TimeoutError:
            return reply(408, {"error": f"the question took more than {MOST_SECONDS:g} seconds to arrive"})
        except (PruneZooError, ValueError) as error:
            return reply(400, {"error": one_line(error)})
        except ClientDisconnect:
            return reply(400, {"error": "the question broke off"})

    routes = [Route("/", show), Route("/answer", answer, methods=["POST"])]
    hosted = Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, *hosts], www_redirect=False)
    return Starlette(routes=routes, middleware=[hosted])


async def read_body(request: Request) -> bytes:
    """The body of a question.

    Raises:
        HTTPException: it is no JSON, or too large, however large it says that it is.
    """
    # a page of another origin cannot send JSON here without being asked first, which this server never allows
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "a question is JSON")
    too_large = HTTPException(413, f"more than {MOST_BYTES >> 20} MiB")
    if int(request.headers.get("Content-Length", 0)) > MOST_BYTES:  # a number; uvicorn has refused all others
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise too_large
    return bytes(body)


def reply(status: int, content: dict[str, Any]) -> Response:
    """JSON; each connection is for one request, so that one that says nothing more is not waited for."""
    return JSONResponse(content, status, headers={"Connection": "close"})


class Protocol(H11Protocol):
    """HTTP as uvicorn reads it, but for a connection that does not bring the head of a request in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self.loop.call_later(MOST_SECONDS, self.give_up)

    def give_up(self) -> None:
        """End it, unless a request has come."""
        if self.cycle is None and not self.transport.is_closing():
            self.send_400_response(f"no request within {MOST_SECONDS:g} seconds")


def listen(port: int, address: str = "127.0.0.1") -> socket.socket:
    """A socket; by default on this machine alone.

    Args:
        port: 0: any that is free.
        address: of this machine in a network; 0.0.0.0: every one that it has.

    Raises:
        PruneZooError: the port is taken, or not for everybody.
    """
    try:
        return socket.create_server((address, port))
    except OSError as error:
        raise PruneZooError(f"--port {port}: {error.strerror}; take another, or 0 for any that is free") from None


def server_of(app: Starlette) -> uvicorn.Server:
    """The server; `run(sockets=[listen(port)])` serves until Ctrl-C."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
    )
