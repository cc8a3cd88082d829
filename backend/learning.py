"""What is learned from examples, and whether it is better: thresholds, weights, and the gate before them."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backend.detector import Detector
from backend.evaluation import FLOOR, Judged, calibrate, cross_calibrated, is_better
from backend.examples import Example
from backend.finetune import Recipe, Tensors, fine_tune
from backend.preprocess import Prepared
from backend.regions import Box, Detection
from backend.rehearsal import known_words, rehearse

LEAST_TO_TRAIN, LEAST_TO_JUDGE = 10, 5  # pictures
MOST_JUDGED = 500  # pictures that thresholds are chosen by
MOST_ON_CPU = 20_000_000  # parameters; to train more of them takes days there
SLICE = 16  # pictures looked at together

# Weights between the old and the new ones keep what the old ones knew (Wortsman et al., "Robust fine-tuning of
# zero-shot models", 2022). The least share of the new ones is taken that scores within this of the best.
SHARES, NEAR = (0.35, 0.5, 0.65, 0.8, 0.9, 1.0), 0.02

Thresholds = dict[str, dict[str, float]]  # control -> label -> threshold
Rounds = Callable[[int, int], object]


@dataclass(frozen=True)
class Learned:
    """What is worth promoting, in words and numbers; neither thresholds nor tensors where nothing is."""

    text: str
    metrics: dict[str, Any]
    thresholds: Thresholds = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What there is to learn from: examples, and the model as the checkpoint has it."""

    examples: Sequence[Example]
    pictures: Callable[[Example], Prepared]
    model: Any  # not a detector's
    make_detector: Callable[[Any], Detector]
    is_fresh: bool  # whether what serves now has never been trained on these examples

    def held_out(self) -> list[Example]:
        """The examples that training never sees."""
        return [example for example in self.examples if example.is_held_out]

    def truth(self, examples: Sequence[Example]) -> list[list[tuple[Box, str]]]:
        """The true boxes in pixels."""
        return [[(_in_pixels(box, self.pictures(e).size), label) for box, label in e.truth] for e in examples]

    def found(self, detector: Detector, examples: Sequence[Example]) -> list[list[Detection]]:
        """What a detector finds, down to the lowest score that a threshold may have."""
        by_asked: dict[Any, list[int]] = defaultdict(list)
        for i, example in enumerate(examples):
            by_asked[example.view.asked].append(i)
        found: list[list[Detection]] = [[] for _ in examples]
        for asked, places in by_asked.items():
            labels = [dataclasses.replace(label, threshold=FLOOR) for label in asked.labels]
            for start in range(0, len(places), SLICE):
                piece = places[start : start + SLICE]
                shown = [self.pictures(examples[i]) for i in piece]
                answers = detector.detect_prepared(shown, labels, asked.negatives, asked.nms_iou)
                for i, answer in zip(piece, answers, strict=True):
                    found[i] = answer if isinstance(answer, list) else []
        return found


def _in_pixels(box: Box, size: tuple[int, int]) -> Box:
    return box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]


def learn(material: Material, serving: Detector, train: str, tokenizer: Any, state: Path, on_round: Rounds) -> Learned:
    """Thresholds and weights that are better than what serves, beyond what the choice of pictures explains.

    Args:
        material: what there is to learn from.
        serving: the detector that the project is served by now.
        train: as in the settings.
        tokenizer: of the model.
        state: the file from which fine-tuning goes on after a kill.
        on_round: called with the rounds done and the most there may be.
    """
    judged_by = list(material.examples if material.is_fresh else material.held_out())[:MOST_JUDGED]
    if len(judged_by) < LEAST_TO_JUDGE:
        return Learned(f"{_pictures(len(judged_by))} to judge by are too few; annotate at least {LEAST_TO_JUDGE}", {})
    found, truth = material.found(serving, judged_by), material.truth(judged_by)
    before = Judged(found, truth, _present(judged_by))
    chosen = Judged(found, truth, _crossed(found, truth, judged_by))
    reason, weights = _tuned(material, serving, train, tokenizer, state, on_round)
    if weights:
        return weights
    metrics = {"before": asdict(before.metrics()), "after": asdict(chosen.metrics()), "pictures": len(judged_by)}
    figures = f"F1 {before.metrics().f1:.2f} -> {chosen.metrics().f1:.2f} on {_pictures(len(judged_by))}"
    if is_better(before, chosen):
        return Learned(f"thresholds: {figures}; {reason}", metrics, _calibrated(found, truth, judged_by))
    return Learned(f"nothing that is surely better: other thresholds {figures}; {reason}", metrics)


def _tuned(
    material: Material, serving: Detector, train: str, tokenizer: Any, state: Path, on_round: Rounds
) -> tuple[str, Learned | None]:
    """Better weights, if there are; else why not."""
    held, seen = material.held_out(), [example for example in material.examples if not example.is_held_out]
    if reason := _no_training(material, serving, train, len(seen), len(held)):
        return reason, None
    truth = material.truth(held)
    before = Judged(material.found(serving, held), truth, _present(held))
    recipe = Recipe(train)
    judge = _judge(material, held, truth)
    plain = material.make_detector(copy.deepcopy(material.model))
    known = rehearse(seen, material.pictures, plain, known_words(tokenizer), np.random.default_rng(0))
    model = copy.deepcopy(material.model).to(serving.device)
    tensors = fine_tune(
        model, tokenizer, [*seen, *known], material.pictures, judge, recipe, state,
        lambda done, loss: on_round(done, recipe.rounds),
    )  # fmt: skip
    if not tensors:
        return "fine-tuning brought nothing on the held-out pictures", None
    tensors = _least_share(material.model, tensors, judge)
    found = material.found(material.make_detector(_with(material.model, tensors)), held)
    after = Judged(found, truth, _crossed(found, truth, held))
    old, new = before.metrics(), after.metrics()
    figures = f"AP50 {old.ap50:.2f} -> {new.ap50:.2f}, F1 {old.f1:.2f} -> {new.f1:.2f} on {_pictures(len(held))}"
    if not is_better(before, after):
        return f"fine-tuned weights are not surely better: {figures}", None
    metrics = {"before": asdict(old), "after": asdict(new), "pictures": len(held)}
    return "", Learned(f"weights and thresholds: {figures}", metrics, _calibrated(found, truth, held), tensors)


def _no_training(material: Material, serving: Detector, train: str, seen: int, held: int) -> str:
    """Why there is no fine-tuning; empty where there is."""
    size = sum(parameter.numel() for parameter in material.model.parameters())
    if train == "thresholds":
        return "TRAIN=thresholds leaves the weights as they are"
    if serving.device.type == "cpu" and size > MOST_ON_CPU:
        return f"fine-tuning {size // 1_000_000} million weights needs a GPU, and this worker has none"
    if seen < LEAST_TO_TRAIN:
        return f"fine-tuning needs {LEAST_TO_TRAIN} pictures to train on, and there are {seen}"
    if held < LEAST_TO_JUDGE:
        return f"fine-tuning needs {LEAST_TO_JUDGE} pictures held out, and there are {held}"
    return ""


def _judge(material: Material, held: Sequence[Example], truth: Any) -> Callable[[Any], float]:
    thresholds = _present(held)

    def judge(model: Any) -> float:
        found = material.found(material.make_detector(copy.deepcopy(model)), held)
        return Judged(found, truth, thresholds).metrics().ap50

    return judge


def _with(model: Any, tensors: Tensors) -> Any:
    """A copy of the model with these tensors."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return changed


def _least_share(model: Any, tensors: Tensors, judge: Callable[[Any], float]) -> Tensors:
    """Tensors between the model's own and the trained ones: as near to its own as scores nearly as well."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        mixed = {s: {n: torch.lerp(own[n].cpu(), t, s) for n, t in tensors.items()} for s in SHARES}
    scores = {share: judge(_with(model, mixed[share])) for share in SHARES}
    return mixed[next(share for share in SHARES if scores[share] >= max(scores.values()) - NEAR)]


# -- thresholds by control --------------------------------------------------------------------------------------------


def _present(examples: Sequence[Example]) -> list[Mapping[str, float]]:
    return [{label.name: label.threshold for label in example.view.asked.labels} for example in examples]


def _by_control(examples: Sequence[Example]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        places[example.view.from_name].append(i)
    return places


def _of_control(examples: Sequence[Example], places: Sequence[int]) -> dict[str, float]:
    return {label: threshold for i in places for label, threshold in _present([examples[i]])[0].items()}


def _calibrated(found: Any, truth: Any, examples: Sequence[Example]) -> Thresholds:
    return {
        name: calibrate([found[i] for i in places], [truth[i] for i in places], _of_control(examples, places))
        for name, places in _by_control(examples).items()
    }


def _crossed(found: Any, truth: Any, examples: Sequence[Example]) -> list[Mapping[str, float]]:
    """For each example thresholds that were chosen without it."""
    thresholds: list[Mapping[str, float]] = [{} for _ in examples]
    for places in _by_control(examples).values():
        of_control = _of_control(examples, places)
        crossed = cross_calibrated([found[i] for i in places], [truth[i] for i in places], of_control)
        for i, own in zip(places, crossed, strict=True):
            thresholds[i] = own
    return thresholds


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
