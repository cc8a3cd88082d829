"""Draws the sample images again: each shows at least three phrases of the labeling config."""

import numpy as np

from backend.demo.samples import FOLDER, IMAGE_COUNT, SIZE
from backend.demo.shapes import Scene, draw_scene
from backend.labelstudio.labeling_config import read_plan

SEED = 2026
MIN_PHRASES = 3  # shown on each image


def count_named_phrases(scene: Scene, phrases: list[str]) -> int:
    """Counts the phrases that name something in the scene."""
    return len({index for _, index in scene.find_truth(phrases)})


def main() -> None:
    """Writes sample-1.jpg and so on."""
    plan = read_plan((FOLDER / "labeling_config.xml").read_text(), 0.3, 0.7)
    phrases = [phrase for label in plan.controls[0].labels for phrase in label.phrases]
    rng = np.random.default_rng(SEED)
    written = 0
    while written < IMAGE_COUNT:
        scene = draw_scene(rng, *SIZE)
        if count_named_phrases(scene, phrases) >= MIN_PHRASES:
            written += 1
            scene.image.save(FOLDER / f"sample-{written}.jpg", quality=90)


if __name__ == "__main__":
    main()
