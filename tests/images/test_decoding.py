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
from tests.scenes import encode, to_data_uri
from tests.servers import http_server, send_reply

RED = Image.new("RGB", (4, 3), (255, 0, 0))
TOKEN = "0123456789abcdef0123456789abcdef01234567"


def make_loader(
    url: str = "", key: str = TOKEN, max_bytes: int = 1_000_000, max_pixels: int = 10_000_000
) -> ImageLoader:
    fetcher = ImageFetcher(LabelStudioClient(url, key), max_bytes, allowed_hosts=["127.0.0.0/8", "::1"])
    return ImageLoader(fetcher, max_pixels, target_size=lambda width, height: (100, 100))


def to_data_uri_of_bytes(body: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(body).decode()


def test_a_data_uri_is_read() -> None:
    loaded = make_loader().load(to_data_uri(RED)).image
    assert (loaded.mode, loaded.size, loaded.getpixel((0, 0))) == ("RGB", (4, 3), (255, 0, 0))


def test_an_http_image_is_fetched_without_our_token() -> None:
    tokens = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        tokens.append(handler.headers.get("Authorization"))
        send_reply(handler, encode(RED))

    with http_server(answer) as url:
        assert make_loader("http://label-studio:8080").load(f"{url}/a.png").size == (4, 3)
    assert tokens == [None]


def test_a_path_is_fetched_from_label_studio_with_the_token() -> None:
    requests = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        requests.append((handler.path, handler.headers.get("Authorization")))
        send_reply(handler, encode(RED))

    with http_server(answer) as url:
        make_loader(url).load("/data/upload/1/a%20b.png")
        make_loader(url).load(f"{url}/data/upload/1/b.png")
    assert requests == [("/data/upload/1/a%20b.png", f"Token {TOKEN}"), ("/data/upload/1/b.png", f"Token {TOKEN}")]


def test_a_redirect_to_another_host_loses_the_token() -> None:
    tokens = []

    def store(handler: BaseHTTPRequestHandler) -> None:
        tokens.append(handler.headers.get("Authorization"))
        send_reply(handler, encode(RED))

    with http_server(store) as other:
        with http_server(lambda handler: send_reply(handler, b"", 302, Location=f"{other}/x")) as url:
            assert make_loader(url).load("/data/upload/1/a.png").size == (4, 3)
    assert tokens == [None]


@pytest.mark.parametrize("source", ["address", "redirect"])
def test_a_url_that_two_parsers_read_differently_gets_no_token(source: str) -> None:
    tokens = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        tokens.append(handler.headers.get("Authorization"))
        send_reply(handler, encode(RED))

    with http_server(answer) as evil, http_server(lambda handler: send_reply(handler, b"", 404)) as label_studio:
        tricky = f"{evil}\\@{label_studio.removeprefix('http://')}/x.png"
        with http_server(lambda handler: send_reply(handler, b"", 302, Location=tricky)) as redirecting:
            make_loader(label_studio).load(tricky if source == "address" else f"{redirecting}/a")
    assert tokens == [None]


def test_a_cookie_of_one_port_is_not_sent_to_another() -> None:
    cookies = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        cookies.append(handler.headers.get("Cookie"))
        send_reply(handler, encode(RED), Set_Cookie="sessionid=s3cret; Path=/")

    loader = make_loader()
    with http_server(answer) as first, http_server(answer) as second:
        for url in (first, second, first):
            loader.load(url)
    assert cookies == [None] * 3


@pytest.mark.parametrize(
    ("location", "reason"),
    [("/again", "redirects more than"), ("file:///etc/passwd", "not http"), ("http://[", "could not be fetched")],
)
def test_a_bad_redirect_is_refused(location: str, reason: str) -> None:
    with http_server(lambda handler: send_reply(handler, b"", 302, Location=location)) as url:
        with pytest.raises(ImageError, match=reason):
            make_loader().load(f"{url}/a")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", "no image where"),
        ("file:///etc/passwd", "must be http"),
        ("//evil/x", "must be http"),
        ("ftp://a/b", "must be http"),
        ("image.png", "must be http"),
        ("/data/upload/1/a.png", "set LABEL_STUDIO_URL"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png;base64,", "file is empty"),
        ("http://127.0.0.1:1/a.png", "could not be fetched"),
        ("http://", "could not be fetched"),
        ("data:,\ud800", "not a supported image"),
    ],
)
def test_the_error_for_an_invalid_address_gives_the_reason(uri: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        make_loader().load(uri)


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "check LABEL_STUDIO_API_KEY"), (404, "answered HTTP 404"), (500, "answered HTTP 500")]
)
def test_the_error_for_a_refusal_says_what_to_do(status: int, reason: str) -> None:
    with http_server(lambda handler: send_reply(handler, b"", status)) as url, pytest.raises(ImageError, match=reason):
        make_loader(url).load("/data/upload/1/a.png")


def test_a_login_page_is_recognised() -> None:
    page = b"<!doctype html><html>Log in</html>"
    with http_server(lambda handler: send_reply(handler, page, Content_Type="text/html")) as url:
        with pytest.raises(ImageError, match="web page instead of an image"):
            make_loader().load(f"{url}/a.png")


def test_a_long_body_is_cut_off() -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 65536)

    with http_server(endless) as url, pytest.raises(ImageError, match="larger than MAX_IMAGE_BYTES"):
        make_loader().load(url)


def test_a_gzip_bomb_is_cut_off() -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    with http_server(lambda handler: send_reply(handler, bomb, Content_Encoding="gzip")) as url:
        with pytest.raises(ImageError, match="larger than MAX_IMAGE_BYTES"):
            make_loader().load(url)


@pytest.mark.parametrize(
    ("content_length", "reason"), [(10, "damaged|not a supported image"), (1_000_000, "could not be fetched")]
)
def test_a_wrong_content_length_is_an_error(content_length: int, reason: str) -> None:
    body = encode(Image.effect_noise((200, 200), 50))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(content_length))
        handler.end_headers()
        handler.wfile.write(body)

    with http_server(answer) as url, pytest.raises(ImageError, match=reason):
        make_loader().load(f"{url}/a.png")


def test_a_large_data_uri_is_refused() -> None:
    with pytest.raises(ImageError, match="larger than MAX_IMAGE_BYTES"):
        make_loader(max_bytes=10).load(to_data_uri(RED))


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
        make_loader().load(url)
    assert time.monotonic() - start < 4


def make_png_header(width: int, height: int) -> bytes:
    """Makes the first bytes of a PNG whose header states this size, without any image data."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    encoded = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


@pytest.mark.parametrize("size", [(12_000, 12_000), (100_000, 100_000)])
def test_too_many_pixels_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="above MAX_IMAGE_PIXELS"):
        make_loader().load(to_data_uri_of_bytes(make_png_header(*size)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a supported image"),
        (b"%PDF-1.4", "not a supported image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a supported image"),
        (encode(Image.effect_noise((200, 200), 50), "JPEG")[:5000], "damaged"),
        (make_png_header(20, 20), "damaged"),
    ],
)
def test_the_error_for_a_file_that_is_no_image_says_so(body: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        make_loader().load(to_data_uri_of_bytes(body))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = make_loader().load(to_data_uri_of_bytes(encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)))
    assert loaded.size == loaded.image.size == (20, 40)
    large = make_loader().load(to_data_uri_of_bytes(encode(Image.new("RGB", (400, 200)), "JPEG", exif=exif)))
    assert (large.size, large.image.size) == ((200, 400), (100, 200))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    assert make_loader().load(to_data_uri_of_bytes(encode(grey))).image.getpixel((0, 0)) == (127, 127, 127)


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert make_loader().load(to_data_uri_of_bytes(encode(clear))).image.getpixel((0, 0)) == (255, 255, 255)


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
def test_a_large_jpeg_is_decoded_at_a_scale_that_shifts_no_pixel(
    size: tuple[int, int], reduced: tuple[int, int]
) -> None:
    original = Image.new("RGB", size, "black")
    left, top = size[0] // 2, size[1] // 3
    original.paste("white", (left, top, *size))
    loaded = make_loader().load(to_data_uri_of_bytes(encode(original, "JPEG", quality=95)))
    assert (loaded.size, loaded.image.size) == (size, reduced)
    bright = np.asarray(loaded.image.convert("L")).astype(float) / 255
    scale = size[0] / reduced[0]
    assert (1 - bright[-1]).sum() * scale == pytest.approx(left, abs=1)
    assert (1 - bright[:, -1]).sum() * scale == pytest.approx(top, abs=1)


def test_only_jpegs_are_reduced() -> None:
    loaded = make_loader().load(to_data_uri_of_bytes(encode(Image.new("RGB", (1600, 1200)))))
    assert loaded.size == loaded.image.size == (1600, 1200)
