"""What is learned from examples, and whether it is better: thresholds, weights, and the gate before them."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backend.detection.detector import Detector
from backend.labelstudio.labeling_config import Label
from backend.training.batches import ImageProvider, TrainConfig, TrainingSet
from backend.training.dataset import Example
from backend.training.evaluation import EvalResult
from backend.training.evaluator import Evaluator, Thresholds
from backend.training.fine_tuning import Tensors, fine_tune
from backend.training.gate import passes_gate
from backend.training.rehearsal import choose_vocabulary, pseudo_label

log = logging.getLogger(__name__)

MIN_TO_TRAIN, MIN_TO_EVALUATE = 10, 5  # pictures
MAX_EVALUATED, MAX_VALIDATION_EXAMPLES = 500, 150  # pictures to choose thresholds by, and to look at after each round
BATCH_SIZES = (4, 2, 1)  # pictures
MAX_BOXES = 300  # on a picture that is trained on
MAX_PARAMETERS_ON_CPU = 20_000_000  # parameters; to train more of them takes days there

# Weights between the old and the new ones keep what the old ones knew (Wortsman et al., "Robust fine-tuning of
# zero-shot models", 2022). The least share of the new ones is taken that scores within this of the best.
INTERPOLATION_SHARES, INTERPOLATION_TOLERANCE = (0.35, 0.5, 0.65, 0.8, 0.9, 1.0), 0.02

Report = Callable[[str, int, int], object]  # what is being done, how far, of how much


@dataclass(frozen=True)
class TrainingResult:
    """What is worth promoting, in words and numbers; neither thresholds nor tensors where nothing is."""

    text: str
    metrics: dict[str, Any]
    thresholds: Thresholds = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingInputs:
    """What there is to learn from, and the model as the checkpoint has it."""

    examples: Sequence[Example]
    pictures: ImageProvider
    labels: Mapping[str, Collection[str]]  # by control: those that may get other thresholds
    model: Any  # not a detector's
    tokenizer: Any
    make_detector: Callable[[Any], Detector]
    device: str
    is_fresh: bool  # whether what serves now has never been trained on these examples

    def exam(self, parts: Collection[str], most: int = MAX_EVALUATED) -> Evaluator:
        """The last examples of these parts."""
        return Evaluator([e for e in self.examples if e.part in parts][-most:], self.pictures, self.labels)

    def to_train_on(self) -> list[Example]:
        """The examples for fine-tuning: not those whose boxes are more than any query could find."""
        return [e for e in self.examples if e.part == "train" and len(e.truth) <= MAX_BOXES]


def run_pipeline(material: TrainingInputs, serving: Detector, train: str, desk: Path, report: Report) -> TrainingResult:
    """Thresholds and weights that are better than what serves, beyond what the choice of pictures explains.

    Args:
        material: what there is to learn from.
        serving: the detector that the project is served by now.
        train: as in the settings.
        desk: the folder from which fine-tuning goes on after a kill.
        report: called as it goes on.
    """
    exam = material.exam(("train", "stop", "gate") if material.is_fresh else ("stop", "gate"))
    if len(exam.examples) < MIN_TO_EVALUATE:
        return TrainingResult(
            f"{_pictures(exam.examples)} to judge by are too few; annotate at least {MIN_TO_EVALUATE}", {}
        )
    report("measuring", 0, 0)
    found = exam.take(serving)
    before, chosen = exam.evaluate(found, exam.present), exam.evaluate(found, exam.cross_calibrate(found))
    reason, weights = _tuned(material, serving, train, desk, report)
    if weights:
        return weights
    figures, metrics = _compared(before, chosen)
    if passes_gate(before, chosen) and (thresholds := exam.calibrate(found)):
        return TrainingResult(f"thresholds: {figures}; {reason}", metrics, thresholds)
    return TrainingResult(f"nothing that is surely better: other thresholds {figures}; {reason}", metrics)


def _compared(before: EvalResult, after: EvalResult) -> tuple[str, dict[str, Any]]:
    old, new = before.metrics(), after.metrics()
    text = f"AP50 {old.ap50:.2f} -> {new.ap50:.2f}, F1 {old.f1:.2f} -> {new.f1:.2f} on {_pictures(before.truth)}"
    return text, {"before": asdict(old), "after": asdict(new), "pictures": len(before.truth)}


def _tuned(
    material: TrainingInputs, serving: Detector, train: str, desk: Path, report: Report
) -> tuple[str, TrainingResult | None]:
    """Better weights, if there are; else why not."""
    held = material.exam(("stop", "gate"))
    if reason := _no_training(material, held, train):
        return reason, None
    tensors = _trained(material, train, desk, report)
    if isinstance(tensors, str):
        return tensors, None
    found = held.take(material.make_detector(_with(material.model, tensors)))
    before = held.evaluate(held.take(serving), held.present, "gate")
    after = held.evaluate(found, held.cross_calibrate(found), "gate")
    figures, metrics = _compared(before, after)
    if not passes_gate(before, after):
        return f"fine-tuned weights are not surely better: {figures}", None
    return "", TrainingResult(f"weights and thresholds: {figures}", metrics, held.calibrate(found), tensors)


def _no_training(material: TrainingInputs, held: Evaluator, train: str) -> str:
    """Why there is no fine-tuning; empty where there is."""
    size = sum(parameter.numel() for parameter in material.model.parameters())
    if train == "thresholds":
        return "TRAIN=thresholds leaves the weights as they are"
    if material.device == "cpu" and size > MAX_PARAMETERS_ON_CPU:
        return f"fine-tuning {size // 1_000_000} million weights needs a GPU, and this worker has none"
    counts = {part: sum(example.part == part for example in held.examples) for part in ("stop", "gate")}
    counts["train"] = len(material.to_train_on())
    for part, what in (("train", "to train on"), ("stop", "to tell when to stop"), ("gate", "to judge by")):
        least = MIN_TO_TRAIN if part == "train" else MIN_TO_EVALUATE
        if counts[part] < least:
            return f"fine-tuning needs {least} pictures {what}, and there are {counts[part]}: annotate more"
    return ""


def _trained(material: TrainingInputs, train: str, desk: Path, report: Report) -> Tensors | str:
    """The tensors that are worth a look at the gate, or why there are none; on less memory in smaller batches."""
    lesson = TrainingSet(material.to_train_on(), _known(material, desk, report), material.pictures)
    for batch_size in BATCH_SIZES:
        try:
            return _attempt(material, lesson, TrainConfig(train, batch_size=batch_size), desk, report)
        except torch.OutOfMemoryError:
            log.warning("out of memory with batches of %d", batch_size)
        torch.cuda.empty_cache()
    return f"fine-tuning needs more memory than {material.device} has"


def _attempt(
    material: TrainingInputs, lesson: TrainingSet, recipe: TrainConfig, desk: Path, report: Report
) -> Tensors | str:
    judge = _judge(material, material.exam(("stop",), MAX_VALIDATION_EXAMPLES))
    model = copy.deepcopy(material.model).to(material.device)
    tensors = fine_tune(
        model, material.tokenizer, lesson, judge, recipe, desk / "state.pt",
        lambda done: report("training", done, recipe.rounds),
    )  # fmt: skip
    return _least_share(material.model, tensors, judge) if tensors else "fine-tuning brought nothing"


def _known(material: TrainingInputs, desk: Path, report: Report) -> list[Example]:
    """The rehearsal's examples; made once, and found again after a kill."""
    path, examples = desk / "known.json", material.to_train_on()
    by_uri = {example.view.uri: example for example in examples}
    if not path.exists():
        plain = material.make_detector(copy.deepcopy(material.model))
        known = pseudo_label(
            examples, material.pictures, plain, choose_vocabulary(material.tokenizer), np.random.default_rng(0),
            lambda done, of: report("rehearsing", done, of),
        )  # fmt: skip
        rows = [[e.view.uri, [label.name for label in e.view.query.labels], e.truth] for e in known]
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(rows))
        aside.replace(path)
    return [_with_phrases(by_uri[uri], phrases, truth) for uri, phrases, truth in json.loads(path.read_text())]


def _with_phrases(example: Example, phrases: Sequence[str], truth: Sequence[Any]) -> Example:
    labels = tuple(Label(phrase, (phrase,), 0.0) for phrase in phrases)
    asked = dataclasses.replace(example.view.query, labels=labels, negatives=())
    view = dataclasses.replace(example.view, query=asked)
    return dataclasses.replace(example, view=view, truth=tuple((tuple(box), label) for box, label in truth))


def _judge(material: TrainingInputs, exam: Evaluator) -> Callable[[Any], float]:
    def judge(model: Any) -> float:
        found = exam.take(material.make_detector(copy.deepcopy(model)))
        return exam.evaluate(found, exam.present).metrics().ap50

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
    own = {name: parameter.detach().cpu() for name, parameter in model.named_parameters() if name in tensors}

    def mixed(share: float) -> Tensors:
        return {name: torch.lerp(own[name], tensor, share) for name, tensor in tensors.items()}

    scores = {share: judge(_with(model, mixed(share))) for share in INTERPOLATION_SHARES}
    return mixed(
        next(share for share in INTERPOLATION_SHARES if scores[share] >= max(scores.values()) - INTERPOLATION_TOLERANCE)
    )


def _pictures(rows: Sequence[Any]) -> str:
    return "1 picture" if len(rows) == 1 else f"{len(rows)} pictures"
