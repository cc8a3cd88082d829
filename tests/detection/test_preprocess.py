import pytest
import torch
from PIL import Image
from transformers import GroundingDinoImageProcessorPil

from backend.detection.preprocess import ImageFormat, ModelInput


@pytest.mark.parametrize("size", [(640, 480), (479, 641), (1333, 400), (20_000, 10), (10, 9)])
def test_edges_are_multiples_of_the_divisor_near_the_published_ones(size: tuple[int, int]) -> None:
    published, rounded = ImageFormat().compute_size(*size), ImageFormat(size_divisor=32).compute_size(*size)
    for a, b in zip(published, rounded, strict=True):
        assert b % 32 == 0
        assert abs(a - b) <= 16 or b == 32


def test_padding_is_zero_after_normalising() -> None:
    model_input = ModelInput(torch.full((4, 6, 3), 200, dtype=torch.uint8), (2, 1), (12, 8), ImageFormat())
    pixels = model_input.normalize()
    assert pixels.shape == (3, 5, 8)
    assert (pixels[:, :4, :6] > 0).all()
    assert (pixels[:, 4:] == 0).all()
    assert (pixels[:, :, 6:] == 0).all()
    assert model_input.padded_size == (16, 10)


def test_resizing_follows_transformers() -> None:
    ours = ImageFormat()
    theirs = GroundingDinoImageProcessorPil()
    for size in [(640, 480), (1600, 1200), (1333, 400), (333, 777)]:
        image = Image.effect_noise(size, 80).convert("RGB")
        expected = theirs(image, return_tensors="pt").pixel_values[0]
        pixels = ours.preprocess(image)
        assert pixels.shape == expected.shape
        assert (pixels - expected).abs().max() < 0.02
