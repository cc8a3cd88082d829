import io

import pytest
from PIL import Image

from backend.images import thumbnails
from backend.images.thumbnails import MAX_THUMBNAIL_EDGE, ThumbnailSampler

IMAGE = Image.new("RGB", (640, 480), "red")


def test_a_sample_is_a_small_copy_that_is_returned_once() -> None:
    sampler = ThumbnailSampler(is_on=True)
    sampler.offer("b", IMAGE)
    assert sampler.pop(["a"]) is None
    thumbnail = sampler.pop(["a", "b"])
    assert thumbnail.image_index == 1
    assert Image.open(io.BytesIO(thumbnail.jpeg)).size == (MAX_THUMBNAIL_EDGE, MAX_THUMBNAIL_EDGE * 3 // 4)
    assert sampler.pop(["a", "b"]) is None


def test_no_sample_is_taken_before_the_interval_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ThumbnailSampler(is_on=True)
    sampler.offer("a", IMAGE)
    sampler.offer("b", IMAGE)
    assert sampler.pop(["b"]) is None
    assert sampler.pop(["a"]) is not None
    monkeypatch.setattr(thumbnails.time, "monotonic", lambda: sampler._next_sample_at)
    sampler.offer("b", IMAGE)
    assert sampler.pop(["b"]) is not None


def test_a_data_uri_is_recognised_by_its_hash() -> None:
    sampler, uri = ThumbnailSampler(is_on=True), "data:image/png;base64," + "A" * 1000
    sampler.offer(uri, IMAGE)
    assert len(sampler._key) < len(uri)
    assert sampler.pop([uri]) is not None


def test_nothing_is_sampled_when_switched_off() -> None:
    sampler = ThumbnailSampler(is_on=False)
    sampler.offer("a", IMAGE)
    assert sampler.pop(["a"]) is None
