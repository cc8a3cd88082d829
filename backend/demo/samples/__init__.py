"""Sample images and a labeling config to try the backend with; drawn by `python -m backend.demo.samples`."""

from pathlib import Path

FOLDER = Path(__file__).parent
IMAGE_COUNT = 6
SIZE = (640, 480)  # width and height in pixels
