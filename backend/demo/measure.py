"""The figures of the model card: `python -m backend.demo.measure`, about a minute.

On pictures that training never drew: other random numbers, and for the second row also other sizes, aspect ratios and
backgrounds.
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
PICTURES = 400
TRAINING_SIZE = ((96, 96),)
UNSEEN_SIZES = ((320, 240), (1024, 768), (600, 900))


def measure(
    detector: Detector, sizes: Sequence[tuple[int, int]], backgrounds: Sequence[shapes.Background], pictures: int
) -> Metrics:
    """Figures on new pictures of the given sizes in turn, each with its own phrases."""
    rng, found, truth = np.random.default_rng(SEED), [], []
    for i in range(pictures):
        scene = shapes.draw_scene(rng, *sizes[i % len(sizes)], backgrounds)
        phrases = shapes.choose_phrases(rng, scene)
        found += detector.detect([scene.image], [Label(phrase, (phrase,), 0.01) for phrase in phrases])
        truth.append([(box, phrases[index]) for box, index in scene.truth(phrases)])
    return evaluate(found, truth)


def figures(detector: Detector, pictures: int = PICTURES) -> dict[str, Metrics]:
    """Both rows of the model card."""
    return {
        "training size": measure(detector, TRAINING_SIZE, shapes.TRAINING_BACKGROUNDS, pictures),
        "other sizes, unseen backgrounds": measure(detector, UNSEEN_SIZES, shapes.UNSEEN_BACKGROUNDS, pictures),
    }


def print_figures(detector: Detector) -> None:
    """The rows of the model card's table."""
    for name, row in figures(detector).items():
        print(f"| {name} | {row.boxes} | {row.ap50:.3f} | {row.precision:.3f} | {row.recall:.3f} |")


if __name__ == "__main__":
    print_figures(Detector(*load_checkpoint(find_checkpoint(*sys.argv[1:2] or ["demo"]).source)))
