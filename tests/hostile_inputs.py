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
INFER = "/v2/models/toy/infer"
TENSORS = "application/safetensors"
ONE = np.zeros((1, 8, 8, 3), np.uint8)
Made = Callable[[], bytes]


def request(
    body: bytes = b"", media: str = TENSORS, target: str = PREDICT, method: str = "POST", extra: bytes = b""
) -> bytes:
    """A well-formed request around a body."""
    head = f"{method} {target} HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {media}\r\nConnection: close\r\n"
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
    "a shape of nothing times 2⁶²": ({422}, lambda: tensors({"images": entry(0, 0, [0, 2**62, 2])})),
    "a shape of nothing times 2⁶³": ({422}, lambda: tensors({"images": entry(0, 0, [0, 2**63, 8, 3])})),
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


def files(blob: bytes, offsets: list[int], dtype: str = "I64", shape: list[int] | None = None) -> bytes:
    """A body of encoded files, with any offsets."""
    numbers = b"".join(number.to_bytes(8, "little", signed=True) for number in offsets)
    header = {
        "offsets": {"dtype": dtype, "shape": shape or [len(offsets)], "data_offsets": [0, len(numbers)]},
        "blob": {"dtype": "U8", "shape": [len(blob)], "data_offsets": [len(numbers), len(numbers) + len(blob)]},
    }
    return tensors(header, numbers + blob)


def several(*pictures: bytes) -> bytes:
    """A body of encoded files, as it should be."""
    return files(b"".join(pictures), [0, *np.cumsum([len(one) for one in pictures]).tolist()])


def chosen(classes: np.ndarray) -> bytes:
    """One image, and classes for it."""
    return save({"images": ONE, "classes": classes})


FILES: dict[str, tuple[set[int], Made]] = {
    "offsets beyond the blob": ({422}, lambda: files(b"abcd", [0, 2**62])),
    "offsets before the blob": ({422}, lambda: files(b"abcd", [0, -4, 4])),
    "offsets that overlap": ({422}, lambda: files(b"abcdefgh", [0, 6, 2, 8])),
    "offsets whose differences overflow": ({422}, lambda: files(b"abcd", [0, 2**63 - 1, -2, 4])),
    "offsets from the middle": ({422}, lambda: files(b"abcd", [2, 4])),
    "offsets that leave a rest": ({422}, lambda: files(b"abcd", [0, 2])),
    "one offset": ({422}, lambda: files(b"", [0])),
    "no offsets": ({422}, lambda: files(b"abcd", [], shape=[0])),
    "offsets in a table": ({422}, lambda: files(b"abcd", [0, 1, 2, 4], shape=[2, 2])),
    "offsets of floats": ({422}, lambda: files(b"abcd", [0, 4], dtype="F64")),
    "offsets of no size in a huge shape": ({422}, lambda: files(b"", [], shape=[2**62, 2**62, 0])),
    "a million empty files": ({413}, lambda: files(b"", [0] * 100_000)),
    "an empty file": ({422}, lambda: several(b"")),
    "an archive that is a picture": ({200, 422}, lambda: several(polyglot())),
    "an archive": ({422}, lambda: several(polyglot()[len(picture("PNG")) :])),
    "a GIF": ({422}, lambda: several(picture("GIF", 3))),
    "an SVG": ({422}, lambda: several(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "a PNG that begins as a JPEG": ({422}, lambda: several(b"\xff\xd8\xff" + picture("PNG"))),
    "a bomb behind a good file": ({413}, lambda: several(picture("PNG"), bomb(3000))),
    "twenty promises": ({413}, lambda: several(*[png(200, 200, zlib.compress(bytes(9)))] * 20)),
    "twenty strips": ({413}, lambda: several(*[picture("PNG", size=(1, 2000))] * 20)),
    "images and files": ({422}, lambda: save({"images": ONE, "blob": ONE[0, 0, 0], "offsets": np.array([0, 3])})),
}

CLASSES: dict[str, tuple[set[int], Made]] = {
    "below zero": ({422}, lambda: chosen(np.array([[-1]]))),
    "of 63 bits": ({422}, lambda: chosen(np.array([[2**63 - 1]]))),
    "a million": ({422}, lambda: chosen(np.zeros((1, 100_000), np.int64))),
    "for others": ({422}, lambda: chosen(np.zeros((100_000, 1), np.int32))),
    "of no size in a huge shape": (
        {422},
        lambda: tensors({"images": entry(0, ROWS), "classes": entry(ROWS, ROWS, [2**62, 0], "I64")}, bytes(ROWS)),
    ),
    "floats": ({422}, lambda: chosen(np.full((1, 1), np.nan, np.float32))),
}


def inferred(inputs: list[object], behind: bytes = b"", length: int | None = None, **more: object) -> bytes:
    """A request of the Open Inference Protocol."""
    text = json.dumps({"inputs": inputs, **more}).encode()
    size = b"" if not behind else f"Inference-Header-Content-Length: {length or len(text)}\r\n".encode()
    return request(text + behind, "application/octet-stream", INFER, extra=size)


def sent(shape: list[int], kind: str = "UINT8", **more: object) -> dict[str, object]:
    return {"name": "images", "shape": shape, "datatype": kind, **more}


INFERENCES: dict[str, tuple[set[int], Made]] = {
    "a shape of a billion": ({422}, lambda: inferred([sent([10**9, 8, 8, 3], data=[0])])),
    "a shape of 2¹²⁴": ({422}, lambda: inferred([sent([2**62, 2**62], data=[0])])),
    "a shape of a thousand digits": ({400}, lambda: inferred([sent([10**1000, 8, 8, 3], data=[0])])),
    "a shape of text": ({400}, lambda: inferred([{**sent([1]), "shape": "1,8,8,3"}])),
    "data nested very deep": ({400, 413}, lambda: request(b'{"inputs":' + b"[" * 100_000, "", INFER)),
    "data of one long text among many": (
        {422},
        lambda: inferred([sent([1, 8, 8, 3], data=["x" * 50_000, *["y"] * 10_000])]),
    ),
    "data of enormous numbers": ({422}, lambda: inferred([sent([1, 8, 8, 3], data=[10**4000] * 20)])),
    "a number of a hundred thousand digits": ({400}, lambda: request(b"9" * 100_000, "", INFER)),
    "JSON beyond its share": ({413}, lambda: inferred([sent([1, 8, 8, 3], data=[0] * 100_000)])),
    "a length beyond the body": ({400}, lambda: inferred([sent([1])], b"behind", 10**9)),
    "a length that cuts a text": ({400}, lambda: inferred([sent([1])], b"behind", 15)),
    "bytes of 2⁶³": ({422}, lambda: inferred([sent([1, 8, 8, 3], parameters={"binary_data_size": 2**63})], b"b")),
    "bytes below zero": ({400}, lambda: inferred([sent([1, 8, 8, 3], parameters={"binary_data_size": -1})], b"b")),
    "bytes that are taken twice": (
        {422},
        lambda: inferred([sent([1, 8, 8, 3], parameters={"binary_data_size": ROWS})] * 2, bytes(ROWS)),
    ),
    "a file of 4 GB": (
        {422},
        lambda: inferred([sent([1], "BYTES", parameters={"binary_data_size": 4})], b"\xff" * 4),
    ),
    "a billion files": (
        {413},
        lambda: inferred([sent([10**9], "BYTES", parameters={"binary_data_size": 4})], bytes(4)),
    ),
    "shared memory": (
        {400},
        lambda: inferred([sent([1], parameters={"shared_memory_region": "/dev/mem", "shared_memory_byte_size": 9})]),
    ),
    "a temperature that is none": ({400}, lambda: inferred([sent([1])], parameters={"temperature": float("nan")})),
    "an id of a megabyte": ({400, 413}, lambda: inferred([sent([1])], id="x" * 10**6)),
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
        lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: [::1]\nContent-Length: many".encode(), GOOD),
    ),
    "a length below zero": (
        {400},
        lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: [::1]\nContent-Length: -5".encode()),
    ),
    "two lengths": (
        {400},
        lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: [::1]\nContent-Length: 5\nContent-Length: 6".encode(), b"aaaaaa"),
    ),
    "a length and chunks": (
        {400, 413, 415, 422},
        lambda: raw(
            f"POST {PREDICT} HTTP/1.1\nHost: [::1]\nContent-Type: {TENSORS}\nConnection: close\n"
            "Content-Length: 5\nTransfer-Encoding: chunked".encode(),
            b"0\r\n\r\n",
        ),
    ),
    "chunks that are none": (
        {400},
        lambda: raw(f"POST {PREDICT} HTTP/1.1\nHost: [::1]\nTransfer-Encoding: chunked".encode(), b"zz\r\nabc\r\n"),
    ),
    "no host": ({400}, lambda: raw(f"POST {PREDICT} HTTP/1.1\nContent-Length: 0".encode())),
    "HTTP of another world": ({200, 400, 505}, lambda: raw(b"GET /livez HTTP/9.9\nHost: [::1]")),
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
    for name, (statuses, made) in FILES.items():
        found[f"files: {name}"] = (statuses, lambda made=made: request(made()))  # type: ignore[misc]
    for name, (statuses, made) in CLASSES.items():
        asked = f"{PREDICT}?output=gather"
        found[f"classes: {name}"] = (statuses, lambda made=made, asked=asked: request(made(), target=asked))  # type: ignore[misc]
    found |= {f"inference: {name}": case for name, case in INFERENCES.items()}
    for name, (statuses, media, made) in PICTURES.items():
        found[f"picture: {name}"] = (statuses, lambda made=made, media=media: request(made(), media))  # type: ignore[misc]
    return {**found, **{f"line: {name}": case for name, case in LINES.items()}}
