"""A page on this machine to try a detector on: choose a photograph, see the texts, take the labels along.

The server listens on the loopback address alone, keeps nothing, reads no file by name and loads nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from i3cl.data.loading.images import decode_image
from i3cl.detections import Detections
from i3cl.errors import UserError

Detector = Callable[[NDArray[np.uint8]], Detections]
"""From (H, W, 3) uint8 RGB to all detections, whatever their score; called by one thread at a time."""

HOST = "127.0.0.1"
_PAGE = Path(__file__).parent / "page"
_FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    bytes: int = 20 << 20
    """Largest photograph file."""
    pixels: int = 40_000_000
    """Most pixels of a photograph."""
    waiting: int = 4
    """Photographs that may wait while one is looked at; more are refused with status 503."""
    seconds: float = 30.0
    """Time in which a request's body must have arrived."""
    export_bytes: int = 4 << 20
    """Largest list of texts to be written as labels."""


_Pixel = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class _Text(BaseModel):
    points: Annotated[list[tuple[_Pixel, _Pixel]], Field(min_length=3, max_length=1000)]
    score: float = Field(ge=0, le=1)


class _Labels(BaseModel):
    """Texts that the page wants as a file."""

    format: Literal["art", "coco", "labelme"]
    name: str = Field(min_length=1, max_length=200)
    height: int = Field(ge=1, le=100_000)
    width: int = Field(ge=1, le=100_000)
    texts: Annotated[list[_Text], Field(max_length=2000)]


class _Refused(HTTPException):
    """An answer that the page shows as it is."""


def make_app(
    detector: Detector, title: str, limits: Limits | None = None, hosts: tuple[str, ...] = (HOST, "localhost")
) -> Starlette:
    """The page and its two services as an ASGI application.

    Args:
        detector: finds the texts.
        title: what the detector is called on the page, e.g. the checkpoint's name.
        limits: what one request may cost.
        hosts: names by which a browser may call the server. Others are refused, so that a foreign page cannot reach it through a
            name of its own that leads here.
    """
    demo = _Demo(detector, title, limits or Limits())
    routes = [Route(path, demo.file) for path in _FILES]
    routes += [Route("/detect", demo.detect, methods=["POST"]), Route("/labels", demo.labels, methods=["POST"])]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={HTTPException: _answer, Exception: _broken},
    )


def serve(detector: Detector, title: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until the process is interrupted.

    Args:
        detector: finds the texts.
        title: what the detector is called on the page.
        port: of the loopback address; 0: a free one.
        ready: called with the page's address once it can be opened.

    Raises:
        UserError: the port is taken.
    """
    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise UserError(f"port {port}: {error.strerror}; give another with --port") from error
    with contextlib.closing(listener):
        listener.listen(64)
        ready(f"http://{HOST}:{listener.getsockname()[1]}/")
        config = uvicorn.Config(
            make_app(detector, title), log_level="warning", limit_concurrency=64, timeout_keep_alive=10, server_header=False
        )
        uvicorn.Server(config).run(sockets=[listener])


class _Demo:
    def __init__(self, detector: Detector, title: str, limits: Limits) -> None:
        self.detector = detector
        self.limits = limits
        self._busy = asyncio.Lock()
        # photographs that are looked at, wait, or are arriving
        self._inside = 0
        self._files = {path: ((_PAGE / name).read_text(encoding="utf-8"), kind) for path, (name, kind) in _FILES.items()}
        page, kind = self._files["/"]
        shown = title.replace("&", "&amp;").replace("<", "&lt;")
        page = page.replace("{{title}}", shown).replace("{{megabytes}}", str(limits.bytes >> 20))
        self._files["/"] = page, kind

    async def file(self, request: Request) -> Response:
        """The page, its style or its script."""
        content, kind = self._files[request.url.path]
        return Response(content, media_type=kind, headers=_HEADERS)

    async def detect(self, request: Request) -> Response:
        """Texts of the photograph that is the request's body, in pixels of the picture as it is shown (EXIF applied)."""
        _only_from_our_page(request)
        # The place is taken before the file is read, so that few files are in memory at a time.
        with self._place():
            data = await self._body(request, self.limits.bytes, "the file")
            async with self._busy:
                started = time.perf_counter()
                found = await run_in_threadpool(self._look, data)
                seconds = time.perf_counter() - started
        texts = [{"points": np.round(p, 2).tolist(), "score": round(score, 4)} for p, score in found]
        return _json({"width": found.width, "height": found.height, "seconds": round(seconds, 2), "texts": texts})

    async def labels(self, request: Request) -> Response:
        """The texts in the request's body, as a file of labels."""
        _only_from_our_page(request)
        data = await self._body(request, self.limits.export_bytes, "the list of texts")
        try:
            wanted = _Labels.model_validate_json(data)
            content = await run_in_threadpool(write_labels, wanted)
        except ValidationError as error:
            first = error.errors()[0]
            raise _Refused(422, f"{'.'.join(map(str, first['loc'])) or 'labels'}: {first['msg']}") from error
        except UserError as error:
            raise _Refused(422, str(error)) from error
        return Response(content, media_type="application/json", headers=_HEADERS)

    def _look(self, data: bytes) -> Detections:
        try:
            image = decode_image(data, self.limits.pixels, upright=True)
        except UserError as error:
            raise _Refused(415, str(error).removeprefix("image: ")) from error
        return self.detector(image)

    async def _body(self, request: Request, limit: int, what: str) -> bytes:
        too_large = _Refused(413, f"{what} is larger than {limit / (1 << 20):g} MB")
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", "0")) > limit:
                raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise _Refused(408, f"{what} did not arrive within {self.limits.seconds:g} seconds") from None
        except ClientDisconnect:
            raise _Refused(400, f"{what} did not arrive completely") from None
        return bytes(body)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self._inside > self.limits.waiting:
            raise _Refused(
                503, f"{self._inside} photographs are in hand already; try again in a few seconds", headers={"Retry-After": "5"}
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


def write_labels(labels: _Labels) -> bytes:
    """The json file of one image's texts, by the same writers as ``i3cl prepare export``.

    Raises:
        UserError: the name cannot be that of an image.
    """
    from i3cl.data.exports import labelme
    from i3cl.data.exports.common import ExportOptions
    from i3cl.data.exports.submissions import write_art
    from i3cl.data.formats.coco import write_coco
    from i3cl.data.formats.records import ImageRecord, Instance

    points = [np.array(text.points, np.float32) for text in labels.texts]
    scores = np.array([text.score for text in labels.texts], np.float32)
    found = Detections(points, scores, labels.height, labels.width)
    instances = tuple(Instance(polygon, score=score) for polygon, score in found)
    name = re.sub(r"[^\w.\- ]", "_", labels.name.replace("\\", "/").rsplit("/", 1)[-1]).lstrip(".") or "image"
    digits = re.findall(r"\d+", Path(name).stem)
    number = int(digits[-1][-9:]) if digits else 1
    if labels.format == "art":
        # An ArT submission names images by number.
        name = f"gt_{number}.jpg"
    record = ImageRecord(number, name, labels.height, labels.width, instances)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "labels.json"
        if labels.format == "art":
            write_art(str(out), [record], ExportOptions())
        elif labels.format == "coco":
            write_coco(str(out), [record])
        else:
            labelme.write(str(Path(folder) / "labelme"), [record], ExportOptions())
            out = Path(folder) / "labelme" / Path(name).with_suffix(".json")
        return out.read_bytes()


def _only_from_our_page(request: Request) -> None:
    """Refuse what another site's page sends: a browser tells where a request comes from."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise _Refused(403, "this page may only be used from its own address")


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(content, status, headers={**_HEADERS, **(headers or {})})


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _broken(request: Request, error: Exception) -> Response:
    return _json({"error": "the program failed on this photograph; its terminal shows why"}, 500)
