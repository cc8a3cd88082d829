import base64
import gzip
import struct
import time
import zlib
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from PIL import Image

from backend.errors import ImageError
from backend.images import sources as sources_module
from backend.images.decoding import ImageLoader, to_rgb
from backend.images.sources import ImageFetcher
from backend.labelstudio.client import LabelStudioClient
from tests.scenes import data_uri, encode
from tests.servers import http_server, reply

RED = Image.new("RGB", (4, 3), (255, 0, 0))
TOKEN = "0123456789abcdef0123456789abcdef01234567"


def images(url: str = "", key: str = TOKEN, max_bytes: int = 1_000_000, max_pixels: int = 10_000_000) -> ImageLoader:
    sources = ImageFetcher(LabelStudioClient(url, key), max_bytes, allowed_hosts=["127.0.0.0/8", "::1"])
    return ImageLoader(sources, max_pixels, needed=lambda width, height: (100, 100))


def b64(body: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(body).decode()


def test_a_data_uri_is_read() -> None:
    loaded = images().load(data_uri(RED)).image
    assert (loaded.mode, loaded.size, loaded.getpixel((0, 0))) == ("RGB", (4, 3), (255, 0, 0))


def test_an_http_picture_is_fetched_without_our_token() -> None:
    seen = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("Authorization"))
        reply(handler, encode(RED))

    with http_server(answer) as url:
        assert images("http://label-studio:8080").load(f"{url}/a.png").size == (4, 3)
    assert seen == [None]


def test_a_path_is_fetched_from_label_studio_with_the_token() -> None:
    seen = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append((handler.path, handler.headers.get("Authorization")))
        reply(handler, encode(RED))

    with http_server(answer) as url:
        images(url).load("/data/upload/1/a%20b.png")
        images(url).load(f"{url}/data/upload/1/b.png")
    assert seen == [("/data/upload/1/a%20b.png", f"Token {TOKEN}"), ("/data/upload/1/b.png", f"Token {TOKEN}")]


def test_a_redirect_to_another_host_loses_the_token() -> None:
    seen = []

    def store(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("Authorization"))
        reply(handler, encode(RED))

    with http_server(store) as other:
        with http_server(lambda handler: reply(handler, b"", 302, Location=f"{other}/x")) as url:
            assert images(url).load("/data/upload/1/a.png").size == (4, 3)
    assert seen == [None]


@pytest.mark.parametrize("by", ["address", "redirect"])
def test_an_address_that_two_parsers_read_differently_gets_no_token(by: str) -> None:
    seen = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("Authorization"))
        reply(handler, encode(RED))

    with http_server(answer) as evil, http_server(lambda handler: reply(handler, b"", 404)) as studio:
        tricky = f"{evil}\\@{studio.removeprefix('http://')}/x.png"
        with http_server(lambda handler: reply(handler, b"", 302, Location=tricky)) as detour:
            images(studio).load(tricky if by == "address" else f"{detour}/a")
    assert seen == [None]


def test_a_cookie_of_one_port_is_not_shown_to_another() -> None:
    seen = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("Cookie"))
        reply(handler, encode(RED), Set_Cookie="sessionid=s3cret; Path=/")

    loader = images()
    with http_server(answer) as first, http_server(answer) as second:
        for url in (first, second, first):
            loader.load(url)
    assert seen == [None] * 3


@pytest.mark.parametrize(
    ("location", "reason"),
    [("/again", "redirects more than"), ("file:///etc/passwd", "not http"), ("http://[", "could not be fetched")],
)
def test_a_bad_redirect_is_refused(location: str, reason: str) -> None:
    with http_server(lambda handler: reply(handler, b"", 302, Location=location)) as url:
        with pytest.raises(ImageError, match=reason):
            images().load(f"{url}/a")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", "no picture where"),
        ("file:///etc/passwd", "must be http"),
        ("//evil/x", "must be http"),
        ("ftp://a/b", "must be http"),
        ("picture.png", "must be http"),
        ("/data/upload/1/a.png", "set LABEL_STUDIO_URL"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png;base64,", "file is empty"),
        ("http://127.0.0.1:1/a.png", "could not be fetched"),
        ("http://", "could not be fetched"),
        ("data:,\ud800", "not a picture"),
    ],
)
def test_an_address_that_leads_nowhere_says_why(uri: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        images().load(uri)


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "check LABEL_STUDIO_API_KEY"), (404, "answered HTTP 404"), (500, "answered HTTP 500")]
)
def test_a_refusal_says_what_to_do(status: int, reason: str) -> None:
    with http_server(lambda handler: reply(handler, b"", status)) as url, pytest.raises(ImageError, match=reason):
        images(url).load("/data/upload/1/a.png")


def test_a_login_page_is_recognised() -> None:
    page = b"<!doctype html><html>Log in</html>"
    with http_server(lambda handler: reply(handler, page, Content_Type="text/html")) as url:
        with pytest.raises(ImageError, match="web page instead of a picture"):
            images().load(f"{url}/a.png")


def test_a_long_body_is_cut_off() -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 65536)

    with http_server(endless) as url, pytest.raises(ImageError, match="larger than MAX_IMAGE_BYTES"):
        images().load(url)


def test_a_gzip_bomb_is_cut_off() -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    with http_server(lambda handler: reply(handler, bomb, Content_Encoding="gzip")) as url:
        with pytest.raises(ImageError, match="larger than MAX_IMAGE_BYTES"):
            images().load(url)


@pytest.mark.parametrize(("said", "reason"), [(10, "damaged|not a picture"), (1_000_000, "could not be fetched")])
def test_a_length_that_is_not_true_is_an_error(said: int, reason: str) -> None:
    body = encode(Image.effect_noise((200, 200), 50))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(said))
        handler.end_headers()
        handler.wfile.write(body)

    with http_server(answer) as url, pytest.raises(ImageError, match=reason):
        images().load(f"{url}/a.png")


def test_a_large_data_uri_is_refused() -> None:
    with pytest.raises(ImageError, match="larger than MAX_IMAGE_BYTES"):
        images(max_bytes=10).load(data_uri(RED))


def test_a_slow_body_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "TOTAL_TIMEOUT", 1)

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.1)

    start = time.monotonic()
    with http_server(trickle) as url, pytest.raises(ImageError, match="did not arrive within"):
        images().load(url)
    assert time.monotonic() - start < 4


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG that says it is this large, and nothing behind them."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(12_000, 12_000), (100_000, 100_000)])
def test_too_many_pixels_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="above MAX_IMAGE_PIXELS"):
        images().load(b64(png_header(*size)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%PDF-1.4", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encode(Image.effect_noise((200, 200), 50), "JPEG")[:5000], "damaged"),
        (png_header(20, 20), "damaged"),
    ],
)
def test_what_is_no_picture_says_so(body: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        images().load(b64(body))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = images().load(b64(encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)))
    assert loaded.size == loaded.image.size == (20, 40)
    large = images().load(b64(encode(Image.new("RGB", (400, 200)), "JPEG", exif=exif)))
    assert (large.size, large.image.size) == ((200, 400), (100, 200))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    picture = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert images().load(b64(encode(picture))).image.getpixel((0, 0)) == (127, 127, 127)


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert images().load(b64(encode(clear))).image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize(
    ("size", "reduced"),
    [
        ((1600, 1200), (200, 150)),
        ((800, 800), (100, 100)),
        ((404, 408), (101, 102)),
        ((801, 800), (801, 800)),
        ((120, 90), (120, 90)),
    ],
)
def test_a_large_jpeg_is_decoded_at_a_scale_that_keeps_every_place(
    size: tuple[int, int], reduced: tuple[int, int]
) -> None:
    picture = Image.new("RGB", size, "black")
    left, top = size[0] // 2, size[1] // 3
    picture.paste("white", (left, top, *size))
    loaded = images().load(b64(encode(picture, "JPEG", quality=95)))
    assert (loaded.size, loaded.image.size) == (size, reduced)
    bright = np.asarray(loaded.image.convert("L")).astype(float) / 255
    scale = size[0] / reduced[0]
    assert (1 - bright[-1]).sum() * scale == pytest.approx(left, abs=1)
    assert (1 - bright[:, -1]).sum() * scale == pytest.approx(top, abs=1)


def test_only_jpegs_are_reduced() -> None:
    picture = images().load(b64(encode(Image.new("RGB", (1600, 1200)))))
    assert picture.size == picture.image.size == (1600, 1200)
