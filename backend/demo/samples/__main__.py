"""Draws the sample pictures again: those that show at least three labels of the labeling config."""

import numpy as np

from backend.demo.samples import FOLDER, PICTURES, SIZE
from backend.demo.shapes import Scene, draw_scene
from backend.labelstudio.labeling_config import read_plan


def asked(scene: Scene, phrases: list[str]) -> int:
    """How many of the phrases name something in the scene."""
    return len({index for _, index in scene.truth(phrases)})


def main() -> None:
    """Writes sample-1.jpg and so on."""
    plan = read_plan((FOLDER / "labeling_config.xml").read_text(), 0.3, 0.7)
    phrases = [phrase for label in plan.controls[0].labels for phrase in label.phrases]
    rng = np.random.default_rng(2026)
    scenes = (scene for _ in iter(int, 1) if asked(scene := draw_scene(rng, *SIZE), phrases) >= 3)
    for number in range(1, PICTURES + 1):
        next(scenes).image.save(FOLDER / f"sample-{number}.jpg", quality=90)


if __name__ == "__main__":
    main()
