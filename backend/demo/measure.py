"""Computes the metrics of the model card: `python -m backend.demo.measure [MODEL]`, about a minute.

The images are none of those that the model was trained on: they are drawn with another seed, those of the second row
also with other sizes, aspect ratios and backgrounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from backend.demo import shapes
from backend.detection.checkpoints import load_checkpoint
from backend.detection.detector import Detector
from backend.labelstudio.labeling_config import Label
from backend.registry.checkpoint import find_checkpoint
from backend.training.evaluation import Metrics, evaluate

SEED = 7
IMAGES_PER_ROW = 400
TRAINING_SIZE = ((96, 96),)
UNSEEN_SIZES = ((320, 240), (1024, 768), (600, 900))
MIN_SCORE = 0.01  # of the detections that enter AP


def measure(detector: Detector, images: int = IMAGES_PER_ROW) -> dict[str, Metrics]:
    """Computes the metrics of both rows of the model card, by the name of the row."""
    return {
        "training size": measure_scenes(detector, TRAINING_SIZE, shapes.TRAINING_BACKGROUNDS, images),
        "other sizes, unseen backgrounds": measure_scenes(detector, UNSEEN_SIZES, shapes.UNSEEN_BACKGROUNDS, images),
    }


def measure_scenes(
    detector: Detector, sizes: Sequence[tuple[int, int]], backgrounds: Sequence[shapes.Background], images: int
) -> Metrics:
    """Computes metrics on new images of the given sizes in turn, each with its own phrases."""
    rng, predictions, truth = np.random.default_rng(SEED), [], []
    for i in range(images):
        scene = shapes.draw_scene(rng, *sizes[i % len(sizes)], backgrounds)
        phrases = shapes.choose_phrases(rng, scene)
        labels = [Label(phrase, (phrase,), MIN_SCORE) for phrase in phrases]
        predictions += detector.detect([scene.image], labels)
        truth.append([(box, phrases[index]) for box, index in scene.find_truth(phrases)])
    return evaluate(predictions, truth)


def print_table(detector: Detector) -> None:
    """Prints the rows of the model card's table."""
    for name, row in measure(detector).items():
        print(f"| {name} | {row.boxes} | {row.ap50:.3f} | {row.precision:.3f} | {row.recall:.3f} |")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    print_table(Detector(*load_checkpoint(find_checkpoint(model).source)))
