"""Requests that somebody sends who means no good, as the bytes on the connection: name to bytes and expected status.

Each is one whole HTTP/1.1 request to a teacher of 8×8 RGB images; small, made when asked for.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image
from safetensors.numpy import save

PREDICT = "/v1/teachers/toy/predict"
TENSORS = "application/safetensors"
ONE = np.zeros((1, 8, 8, 3), np.uint8)
Made = Callable[[], bytes]


def request(
    body: bytes = b"", media: str = TENSORS, target: str = PREDICT, method: str = "POST", extra: bytes = b""
) -> bytes:
    """A well-formed request around a body."""
    head = f"{method} {target} HTTP/1.1\r\nHost: toy\r\nContent-Type: {media}\r\nConnection: close\r\n"
    return head.encode() + extra + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def raw(head: bytes, body: bytes = b"") -> bytes:
    """A request line and headers as they are, and what follows them."""
    return head.replace(b"\n", b"\r\n") + b"\r\n\r\n" + body


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors body with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [1, 8, 8, 3], "data_offsets": [start, end]}


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG that says so, around any pixel data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(chunk(name, content) + (extra if name == b"IHDR" else b"") for name, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def picture(kind: str, frames: int = 1, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    images = [Image.new(mode, size, number % 255) for number in range(frames)]
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(buffer, kind, **more)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG of very many zeros, all of them really there."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    return png(side, side, b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush())


def polyglot() -> bytes:
    """A picture that is an archive, too."""
    buffer = io.BytesIO(picture("PNG"))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("payload.py", "raise SystemExit")
    return buffer.getvalue()


def webp(width: int, height: int) -> bytes:
    """A WebP that says that it is so large, and holds nothing."""
    canvas = bytes([0x10, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size than its data has."""
    data = bytearray(picture("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


GOOD = save({"images": ONE})
NAN = save({"images": np.full((1, 8, 8, 3), np.nan, np.float32)})
ROWS = ONE.nbytes

TENSOR_BODIES: dict[str, tuple[set[int], Made]] = {
    "offsets that overlap": ({422}, lambda: tensors({"images": entry(0, ROWS), "b": entry(0, ROWS)}, bytes(ROWS))),
    "offsets that leave a hole": ({422}, lambda: tensors({"images": entry(8, 8 + ROWS)}, bytes(8 + ROWS))),
    "offsets that run backwards": ({422}, lambda: tensors({"images": entry(ROWS, 0)}, bytes(ROWS))),
    "offsets beyond the end": ({422}, lambda: tensors({"images": entry(0, 2**62)}, bytes(ROWS))),
    "offsets below zero": ({422}, lambda: tensors({"images": entry(-1, ROWS - 1)}, bytes(ROWS))),
    "a shape that overflows": ({422}, lambda: tensors({"images": entry(0, ROWS, [2**32, 2**32, 8, 3])}, bytes(ROWS))),
    "a shape below zero": ({422}, lambda: tensors({"images": entry(0, ROWS, [-1, -8, 8, 3])}, bytes(ROWS))),
    "a shape that is text": ({422}, lambda: tensors({"images": {**entry(0, ROWS), "shape": "1,8,8,3"}}, bytes(ROWS))),
    "a shape of a thousand dimensions": ({422}, lambda: tensors({"images": entry(0, ROWS, [1] * 999)}, bytes(ROWS))),
    "a dtype that nobody knows": ({422}, lambda: tensors({"images": entry(0, ROWS, dtype="X9")}, bytes(ROWS))),
    "numbers that are not": ({422}, lambda: NAN),
    "header length 2⁶⁴ − 1": ({422}, lambda: b"\xff" * 8 + GOOD[8:]),
    "header length 0": ({422}, lambda: tensors(b"", GOOD)),
    "header longer than the body": ({422}, lambda: tensors({}, b"", length=10**6)),
    "header of bad JSON": ({422}, lambda: tensors(b'{"images": ', bytes(ROWS))),
    "header of bad UTF-8": ({422}, lambda: tensors(b'{"\xff\xfe": 1}', bytes(ROWS))),
    "header nested very deep": ({422}, lambda: tensors(b'{"a":' * 2000 + b"1" + b"}" * 2000)),
    "header that is a list": ({422}, lambda: tensors([1, 2, 3], bytes(ROWS))),
    "one name twice": (
        {200, 422},
        lambda: tensors(
            b'{"images":'
            + json.dumps(entry(0, ROWS)).encode()
            + b',"images":'
            + json.dumps(entry(0, ROWS)).encode()
            + b"}",
            bytes(ROWS),
        ),
    ),
    "ten thousand names": (
        {413, 422},
        lambda: tensors({f"t{number}": entry(0, 0, [0]) for number in range(10_000)}),
    ),
    "a name of a megabyte": ({413, 422}, lambda: tensors({"x" * 10**6: entry(0, ROWS)}, bytes(ROWS))),
    "metadata that is no text": (
        {422},
        lambda: tensors({"__metadata__": {"a": 1}, "images": entry(0, ROWS)}, bytes(ROWS)),
    ),
    "bytes after the end": ({422}, lambda: GOOD + b"more"),
    "a pickle": ({422}, lambda: pickle.dumps({"images": [0] * 192})),
    "a pickle that would run something": ({422}, lambda: b"cos\nsystem\n(S'true'\ntR."),
    "an archive": ({422}, polyglot),
}

PICTURES: dict[str, tuple[set[int], str, Made]] = {
    "bomb with all its zeros": ({413}, "image/png", lambda: bomb(6000)),
    "promise of 2³¹ columns": ({413, 422}, "image/png", lambda: png(2**31 - 1, 1, zlib.compress(bytes(9)))),
    "promise of no columns": ({422}, "image/png", lambda: png(0, 8, zlib.compress(bytes(9)))),
    "a row of 2²⁰ pixels": ({413}, "image/png", lambda: png(2**20, 1, zlib.compress(bytes(3 * 2**20 + 1)))),
    "WebP that says 16,384²": ({413, 422}, "image/webp", lambda: webp(16_384, 16_384)),
    "JPEG that says 65,500²": ({413, 422}, "image/jpeg", lambda: jpeg(65_500, 65_500)),
    "a thousand frames": ({413, 422}, "image/webp", lambda: picture("WEBP", 1000)),
    "a thousand frames of PNG": ({413, 422}, "image/png", lambda: picture("PNG", 1000)),
    "GIF named PNG": ({422}, "image/png", lambda: picture("GIF", 3)),
    "TIFF named JPEG": ({422}, "image/jpeg", lambda: picture("TIFF")),
    "PDF named PNG": ({422}, "image/png", lambda: b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj"),
    "SVG that loads a file": (
        {415},
        "image/svg+xml",
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    ),
    "polyglot of PNG and archive": ({200, 422}, "image/png", polyglot),
    "PNG with text of a bomb": (
        {200, 413, 422},
        "image/png",
        lambda: png(8, 8, zlib.compress(bytes(8 * 25)), extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26)))),
    ),
    "PNG with a colour profile of a bomb": (
        {200, 413, 422},
        "image/png",
        lambda: png(8, 8, zlib.compress(bytes(8 * 25)), extra=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**26)))),
    ),
    "PNG with wrong sums": ({422}, "image/png", lambda: picture("PNG")[:40] + b"\0\0\0\0" + picture("PNG")[44:]),
    "PNG of 1 bit and 2 GB": ({413, 422}, "image/png", lambda: png(131_072, 131_072, b"", depth=1, colour=0)),
    "PNG without end": ({200, 422}, "image/png", lambda: picture("PNG")[:-12]),
    "JPEG cut in its header": ({422}, "image/jpeg", lambda: picture("JPEG")[:100]),
    "JPEG of comments alone": ({422}, "image/jpeg", lambda: b"\xff\xd8" + b"\xff\xfe\x00\x04aa" * 1500),
    "only zeros": ({422}, "image/jpeg", lambda: bytes(5000)),
}

LINES: dict[str, tuple[set[int], Made]] = {
    "headers of a megabyte": ({400, 413, 431}, lambda: request(GOOD, extra=b"X-Long: " + b"a" * 10**6 + b"\r\n")),
    "ten thousand headers": ({400, 413, 431}, lambda: request(GOOD, extra=b"X-A: 1\r\n" * 10_000)),
    "a target of 100 kB": ({400, 404, 414}, lambda: request(GOOD, target="/" + "a" * 100_000)),
    "a thousand options": (
        {400},
        lambda: request(GOOD, target=f"{PREDICT}?" + "&".join(f"o{n}=1" for n in range(1000))),
    ),
    "options of bad UTF-8": ({400}, lambda: request(GOOD, target=f"{PREDICT}?output=%ff%fe")),
    "an option with a zero byte": ({400}, lambda: request(GOOD, target=f"{PREDICT}?output=logits%00")),
    "a path that climbs": ({400, 404}, lambda: request(target="/v1/teachers/../../etc/passwd", method="GET")),
    "a path that climbs, encoded": (
        {400, 404},
        lambda: request(target="/v1/teachers/%2e%2e%2fetc%2fpasswd", method="GET"),
    ),
    "a URL in place of an image": ({415}, lambda: request(b"http://169.254.169.254/latest", media="text/uri-list")),
    "multipart": ({415}, lambda: request(b"--x\r\n\r\n--x--", media="multipart/form-data; boundary=x")),
    "a form": ({415}, lambda: request(b"images=1", media="application/x-www-form-urlencoded")),
    "compressed body": ({415, 422}, lambda: request(zlib.compress(GOOD), extra=b"Content-Encoding: gzip\r\n")),
    "a length that is text": (
        {400},
        lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: toy\nContent-Length: many".encode(), GOOD),
    ),
    "a length below zero": ({400}, lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: toy\nContent-Length: -5".encode())),
    "two lengths": (
        {400},
        lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: toy\nContent-Length: 5\nContent-Length: 6".encode(), b"aaaaaa"),
    ),
    "a length and chunks": (
        {400, 413, 415, 422},
        lambda: raw(
            f"POST {PREDICT} HTTP/1.1\nHost: toy\nContent-Type: {TENSORS}\nConnection: close\n"
            "Content-Length: 5\nTransfer-Encoding: chunked".encode(),
            b"0\r\n\r\n",
        ),
    ),
    "chunks that are none": (
        {400},
        lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: toy\nTransfer-Encoding: chunked".encode(), b"zz\r\nabc\r\n"),
    ),
    "no host": ({400}, lambda: raw(f"POST {PREDICT} HTTP/1.1\nContent-Length: 0".encode())),
    "HTTP of another world": ({200, 400, 505}, lambda: raw(b"GET /livez HTTP/9.9\nHost: toy")),
    "a method of its own": ({400, 405}, lambda: request(method="BREW")),
    "TLS on a plain port": ({400}, lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n"),
    "a header that splits": ({400}, lambda: request(GOOD, extra=b"X-Request-Id: a\rSet-Cookie: b\r\n")),
    "an id of markup": ({422}, lambda: request(b"x", extra=b"X-Request-Id: <script>alert(1)</script>\r\n")),
    "a deadline of a thousand digits": ({400}, lambda: request(GOOD, extra=b"X-Deadline-Ms: " + b"9" * 1000 + b"\r\n")),
}


def cases() -> dict[str, tuple[set[int], Made]]:
    """All of them: name to (statuses that are right, the bytes)."""
    found: dict[str, tuple[set[int], Made]] = {}
    for name, (statuses, made) in TENSOR_BODIES.items():
        found[f"tensors: {name}"] = (statuses, lambda made=made: request(made()))  # type: ignore[misc]
    for name, (statuses, media, made) in PICTURES.items():
        found[f"picture: {name}"] = (statuses, lambda made=made, media=media: request(made(), media))  # type: ignore[misc]
    return {**found, **{f"line: {name}": case for name, case in LINES.items()}}
