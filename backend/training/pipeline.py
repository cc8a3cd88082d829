"""The training pipeline: fine-tunes weights, calibrates thresholds, and keeps only what passes the gate."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from backend.detection.detector import Detector
from backend.labelstudio.labeling_config import Label
from backend.training.batches import ImageProvider, TrainConfig, TrainingSet
from backend.training.dataset import Example, LabeledBox, Split
from backend.training.evaluation import EvalResult
from backend.training.evaluator import Evaluator, ThresholdsByControl
from backend.training.fine_tuning import Tensors, fine_tune
from backend.training.gate import passes_gate
from backend.training.rehearsal import choose_vocabulary, pseudo_label

log = logging.getLogger(__name__)

MIN_TRAIN_IMAGES, MIN_EVALUATION_IMAGES = 10, 5
MAX_EVALUATED = 500  # images to calibrate and to gate on
MAX_VALIDATION_EXAMPLES = 150  # images to score after each epoch
BATCH_SIZES = (4, 2, 1)  # images; the next is tried when memory runs out
MAX_BOXES = 300  # on an image to train on: the model has too few queries for more
MAX_PARAMETERS_ON_CPU = 20_000_000  # to fine-tune more takes days there
INTERPOLATION_SHARES = (0.35, 0.5, 0.65, 0.8, 0.9, 1.0)  # of the fine-tuned weights
INTERPOLATION_TOLERANCE = 0.02  # in score, below the best share

Stage = Literal["reading", "loading", "measuring", "rehearsing", "training"]


class Report(Protocol):
    """Reports the progress of a training: its stage, and how much of the stage is done."""

    def __call__(self, stage: Stage, done: int = 0, total: int = 0) -> object:
        """Reports; `total` is 0 where a stage has no steps to count."""


@dataclass(frozen=True)
class TrainingInputs:
    """The examples and the base model."""

    examples: Sequence[Example]
    images: ImageProvider
    labels: Mapping[str, Collection[str]]  # by control, the names of the labels that may get other thresholds
    model: Any  # of the base checkpoint; not a detector's
    tokenizer: Any
    make_detector: Callable[[Any], Detector]
    device: str
    is_serving_base_weights: bool  # if not, the serving weights were trained on some of the examples

    @property
    def train_examples(self) -> list[Example]:
        """The examples to fine-tune on."""
        return [e for e in self.examples if e.split == "train" and len(e.truth) <= MAX_BOXES]

    def make_evaluator(self, splits: Collection[Split], max_examples: int = MAX_EVALUATED) -> Evaluator:
        """Makes an evaluator of the last examples of these splits."""
        examples = [e for e in self.examples if e.split in splits][-max_examples:]
        return Evaluator(examples, self.images, self.labels)


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training; thresholds and tensors are empty if nothing is worth promoting."""

    text: str
    metrics: dict[str, Any]
    thresholds: ThresholdsByControl = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)


class NotFineTuned(Exception):
    """Fine-tuning was not possible or brought no better weights; the text says why."""


def run_pipeline(
    inputs: TrainingInputs, serving: Detector, train: str, work_dir: Path, report: Report
) -> TrainingResult:
    """Trains weights and thresholds; where the weights do not pass the gate, calibrates thresholds alone.

    Args:
        inputs: the examples and the base model.
        serving: the detector of the version that serves now.
        train: what may change, as the setting TRAIN.
        work_dir: folder from which fine-tuning resumes after the worker was killed.
        report: called as the training proceeds.
    """
    unseen: list[Split] = ["validation", "held_out"]
    evaluator = inputs.make_evaluator(["train", *unseen] if inputs.is_serving_base_weights else unseen)
    if len(evaluator.examples) < MIN_EVALUATION_IMAGES:
        count = _count_images(evaluator.examples)
        return TrainingResult(f"only {count} to evaluate on; annotate at least {MIN_EVALUATION_IMAGES}", {})
    report("measuring")
    predictions = evaluator.predict(serving)
    before = evaluator.evaluate(predictions, evaluator.current_thresholds)
    after = evaluator.evaluate(predictions, evaluator.cross_calibrate(predictions))
    try:
        return try_fine_tuning(inputs, serving, train, work_dir, report)
    except NotFineTuned as error:
        reason = str(error)
    summary, metrics = _compare(before, after)
    if passes_gate(before, after) and (thresholds := evaluator.calibrate(predictions)):
        return TrainingResult(f"thresholds: {summary}; {reason}", metrics, thresholds)
    return TrainingResult(f"no significant gain: other thresholds {summary}; {reason}", metrics)


def try_fine_tuning(
    inputs: TrainingInputs, serving: Detector, train: str, work_dir: Path, report: Report
) -> TrainingResult:
    """Fine-tunes, calibrates, and compares the result with what serves on the held-out examples.

    Arguments are those of `run_pipeline`.

    Raises:
        NotFineTuned: there are no weights that pass the gate.
    """
    evaluator = inputs.make_evaluator(["validation", "held_out"])
    _check_requirements(inputs, evaluator, train)
    tensors = _fine_tune(inputs, train, work_dir, report)
    predictions = evaluator.predict(inputs.make_detector(_with_tensors(inputs.model, tensors)))
    before = evaluator.evaluate(evaluator.predict(serving), evaluator.current_thresholds, "held_out")
    after = evaluator.evaluate(predictions, evaluator.cross_calibrate(predictions), "held_out")
    summary, metrics = _compare(before, after)
    if not passes_gate(before, after):
        raise NotFineTuned(f"fine-tuned weights are not significantly better: {summary}")
    return TrainingResult(f"weights and thresholds: {summary}", metrics, evaluator.calibrate(predictions), tensors)


def _compare(before: EvalResult, after: EvalResult) -> tuple[str, dict[str, Any]]:
    """Returns a summary for people, and the metrics of a version."""
    old, new = before.compute_metrics(), after.compute_metrics()
    count = _count_images(before.truth)
    summary = f"AP50 {old.ap50:.2f} -> {new.ap50:.2f}, F1 {old.f1:.2f} -> {new.f1:.2f} on {count}"
    # The key "pictures" is public: it is in the answers of /versions and in version.json.
    return summary, {"before": asdict(old), "after": asdict(new), "pictures": len(before.truth)}


def _count_images(items: Sequence[Any]) -> str:
    return "1 image" if len(items) == 1 else f"{len(items)} images"


def _check_requirements(inputs: TrainingInputs, evaluator: Evaluator, train: str) -> None:
    """Raises NotFineTuned where fine-tuning is disabled, or lacks a GPU or examples."""
    if train == "thresholds":
        raise NotFineTuned("TRAIN=thresholds leaves the weights as they are")
    parameters = sum(parameter.numel() for parameter in inputs.model.parameters())
    if inputs.device == "cpu" and parameters > MAX_PARAMETERS_ON_CPU:
        millions = parameters // 1_000_000
        raise NotFineTuned(f"fine-tuning {millions} million weights needs a GPU, and this worker has none")
    validation, held_out = (sum(e.split == split for e in evaluator.examples) for split in ("validation", "held_out"))
    for count, required, purpose in (
        (len(inputs.train_examples), MIN_TRAIN_IMAGES, "to train on"),
        (validation, MIN_EVALUATION_IMAGES, "to decide when to stop"),
        (held_out, MIN_EVALUATION_IMAGES, "to evaluate on"),
    ):
        if count < required:
            raise NotFineTuned(f"fine-tuning needs {required} images {purpose}, and there are {count}: annotate more")


def _fine_tune(inputs: TrainingInputs, train: str, work_dir: Path, report: Report) -> Tensors:
    """Returns interpolated weights; where memory runs out, tries smaller batches.

    Raises:
        NotFineTuned: no epoch improved on the base model, or memory ran out.
    """
    pseudo_labeled = _load_pseudo_labels(inputs, work_dir, report)
    training_set = TrainingSet(inputs.train_examples, pseudo_labeled, inputs.images)
    evaluator = inputs.make_evaluator(["validation"], MAX_VALIDATION_EXAMPLES)

    def score(model: Any) -> float:
        predictions = evaluator.predict(inputs.make_detector(copy.deepcopy(model)))
        return evaluator.evaluate(predictions, evaluator.current_thresholds).compute_metrics().ap50

    def train_and_interpolate(config: TrainConfig) -> Tensors:  # when it returns or raises, its model is freed
        tensors = fine_tune(
            copy.deepcopy(inputs.model).to(inputs.device),
            inputs.tokenizer,
            training_set,
            score,
            config,
            work_dir / "state.pt",
            lambda epochs: report("training", epochs, config.epochs),
        )
        if not tensors:
            raise NotFineTuned("fine-tuning did not improve the model")
        return interpolate_weights(inputs.model, tensors, score)

    for batch_size in BATCH_SIZES:
        try:
            return train_and_interpolate(TrainConfig(train, batch_size=batch_size))
        except torch.OutOfMemoryError:
            log.warning("out of memory with batches of %d images", batch_size)
        torch.cuda.empty_cache()
    raise NotFineTuned(f"fine-tuning needs more memory than {inputs.device} has")


def interpolate_weights(model: Any, tensors: Tensors, score: Callable[[Any], float]) -> Tensors:
    """Interpolates between the weights of the base model and the fine-tuned ones.

    Weights in between keep what the base model knew (WiSE-FT: Wortsman et al., "Robust fine-tuning of zero-shot
    models", 2022). Of the shares of fine-tuned weights that score within `INTERPOLATION_TOLERANCE` of the best one,
    the smallest is taken.

    Args:
        model: the base model.
        tensors: the fine-tuned ones, by name.
        score: evaluates a model; higher is better.
    """
    base = {name: parameter.detach().cpu() for name, parameter in model.named_parameters() if name in tensors}

    def interpolate(share: float) -> Tensors:
        return {name: torch.lerp(base[name], tensor, share) for name, tensor in tensors.items()}

    scores = {share: score(_with_tensors(model, interpolate(share))) for share in INTERPOLATION_SHARES}
    lowest = max(scores.values()) - INTERPOLATION_TOLERANCE
    return interpolate(min(share for share in INTERPOLATION_SHARES if scores[share] >= lowest))


def _with_tensors(model: Any, tensors: Tensors) -> Any:
    """Returns a copy of the model with these tensors."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return changed


def _load_pseudo_labels(inputs: TrainingInputs, work_dir: Path, report: Report) -> list[Example]:
    """Loads the pseudo-labeled examples; makes and saves them first if they are not there yet."""
    path, examples = work_dir / "known.json", inputs.train_examples
    example_by_uri = {example.target.uri: example for example in examples}
    if not path.exists():
        labeled = pseudo_label(
            examples,
            inputs.images,
            inputs.make_detector(copy.deepcopy(inputs.model)),
            choose_vocabulary(inputs.tokenizer),
            np.random.default_rng(0),
            lambda done, total: report("rehearsing", done, total),
        )
        entries = [[e.target.uri, [label.name for label in e.target.query.labels], e.truth] for e in labeled]
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(entries))
        temporary.replace(path)
    loaded = []
    for uri, phrases, boxes in json.loads(path.read_text()):
        example = example_by_uri[uri]
        labels = tuple(Label(phrase, (phrase,), 0.0) for phrase in phrases)
        query = dataclasses.replace(example.target.query, labels=labels, negative_phrases=())
        truth: tuple[LabeledBox, ...] = tuple((tuple(box), label) for box, label in boxes)
        target = dataclasses.replace(example.target, query=query)
        loaded.append(dataclasses.replace(example, target=target, truth=truth))
    return loaded
