"""Pictures and a labeling config to try the backend with; drawn by `python -m backend.demo.samples`."""

from pathlib import Path

FOLDER = Path(__file__).parent
PICTURES = 6
SIZE = (640, 480)
