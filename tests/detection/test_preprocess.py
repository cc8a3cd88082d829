from PIL import Image
from transformers import GroundingDinoImageProcessorPil

from backend.detection.preprocess import ImageFormat


def test_resizing_follows_transformers() -> None:
    ours = ImageFormat()
    theirs = GroundingDinoImageProcessorPil()
    for size in [(640, 480), (1600, 1200), (1333, 400), (333, 777)]:
        image = Image.effect_noise(size, 80).convert("RGB")
        expected = theirs(image, return_tensors="pt").pixel_values[0]
        pixels = ours.preprocess(image)
        assert pixels.shape == expected.shape
        assert (pixels - expected).abs().max() < 0.02
