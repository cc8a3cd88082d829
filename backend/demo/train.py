"""Trains the bundled checkpoint: `python -m backend.demo.train`, about half an hour on one core.

Writes `backend/demo/checkpoint/` (weights in half precision, tokenizer, configuration) and prints the metrics of the
model card.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import string
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm
from transformers import (
    BertConfig,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from backend.demo import shapes
from backend.demo.measure import measure, print_table
from backend.detection.captions import CLS, QUESTION, SEP, STOP, build_caption
from backend.detection.checkpoints import load_checkpoint
from backend.detection.detector import Detector
from backend.detection.preprocess import ImageFormat
from backend.registry.checkpoint import DEMO_CHECKPOINT
from backend.training.loop import make_ema, train_one_epoch
from backend.training.loss import Batch, Target, boxes_to_cxcywh

IMAGE_FORMAT = ImageFormat(shortest_edge=96, longest_edge=160)
BATCH_SIZE, WARM_UP_STEPS, LEARNING_RATE = 8, 300, 1e-3
STEPS_PER_EPOCH, STEPS_PER_EVALUATION = 100, 500
MAX_SHAPES, MAX_PHRASES = 6, 12  # of an image; more than in `measure`, so that each image teaches more
# Pixels before scaling; several aspect ratios, a square one twice as often
SIZES = ((96, 96), (96, 96), (128, 96), (96, 128), (144, 96), (96, 144), (160, 96), (160, 90))
SCALES, SCALE_PROBABILITIES = (1, 1.5, 2, 3, 4), (0.5, 0.2, 0.15, 0.1, 0.05)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a word-piece tokenizer of colours, shapes and a few common words; other words are split into letters.

    The special tokens keep BERT's ids, because transformers' Grounding DINO relies on them.
    """
    special_tokens = {0: "[PAD]", 100: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", 103: "[MASK]", STOP: ".", QUESTION: "?"}
    letters = string.ascii_lowercase + string.digits
    words = [*shapes.COLOURS, *shapes.SHAPES, "object", "shape", "a", "the", "and", "big", "small", "##s", "##es"]
    words += [c for c in letters if c != "a"] + [f"##{c}" for c in letters if c != "s"] + [",", "-", "/", "'"]
    unassigned = iter(words)
    vocabulary = {special_tokens.get(i) or next(unassigned, f"[unused{i}]"): i for i in range(1030)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special_tokens[100]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)


def build_model() -> MMGroundingDinoForObjectDetection:
    """Builds an untrained model of the real architecture with about a million parameters."""
    swin = SwinConfig(
        image_size=96, embed_dim=24, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=6, mlp_ratio=2.0,
        drop_path_rate=0.0, out_indices=[2, 3],
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=1030, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = MMGroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=64, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_queries=25,
        num_feature_levels=3, dropout=0.0, fusion_droppath=0.0, two_stage=True, auxiliary_loss=True,
    )  # fmt: skip
    model = MMGroundingDinoForObjectDetection(config)
    for layer in model.model.encoder.layers:
        torch.nn.init.constant_(layer.fusion_layer.vision_param, 0.3)
        torch.nn.init.constant_(layer.fusion_layer.text_param, 0.3)
    return model


def _make_target(scene: shapes.Scene, phrases: Sequence[str]) -> Target:
    width, height = scene.image.size
    truth = scene.find_truth(phrases)
    boxes_xyxy = torch.tensor([box for box, _ in truth]).reshape(-1, 4) / torch.tensor([width, height, width, height])
    return Target(boxes_to_cxcywh(boxes_xyxy), torch.tensor([phrase for _, phrase in truth], dtype=torch.long))


def draw_batch(rng: np.random.Generator, tokenizer: Any, size: int = BATCH_SIZE) -> Batch:
    """Draws images of one aspect ratio at several scales, resized to one size as the detector resizes them."""
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    pixels, captions, targets = [], [], []
    for _ in range(size):
        scale = float(rng.choice(SCALES, p=SCALE_PROBABILITIES))
        scene = shapes.draw_scene(rng, int(width * scale), int(height * scale), max_shapes=MAX_SHAPES)
        phrases = shapes.choose_phrases(rng, scene, max_phrases=MAX_PHRASES)
        pixels.append(IMAGE_FORMAT.preprocess(scene.image))
        captions.append(build_caption(tokenizer, phrases))
        targets.append(_make_target(scene, phrases))
    return Batch(torch.stack(pixels), captions, targets)


def _draw_epoch(rng: np.random.Generator, tokenizer: Any, progress: Any) -> Iterator[Batch]:
    for _ in range(STEPS_PER_EPOCH):
        yield draw_batch(rng, tokenizer)
        progress.update()


def _compute_learning_rate_factor(step: int, steps: int) -> float:
    """Returns the factor of `LEARNING_RATE` at a step: linear warm-up, then cosine decay to 2%."""
    warm_up = min(step / WARM_UP_STEPS, 1)
    return warm_up * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


def train(steps: int, seed: int) -> tuple[Any, Any]:
    """Trains a model from scratch; returns the average of its weights and the tokenizer."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer, model = build_tokenizer(), build_model()
    ema = make_ema(model)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _compute_learning_rate_factor(step, steps))
    with tqdm(total=steps, unit="step") as progress:
        for _ in range(steps // STEPS_PER_EPOCH):
            loss = train_one_epoch(model, _draw_epoch(rng, tokenizer, progress), optimizer, scheduler, ema)
            progress.set_postfix(loss=f"{loss:.2f}")
            if progress.n % STEPS_PER_EVALUATION == 0:
                rows = measure(Detector(copy.deepcopy(ema), tokenizer, IMAGE_FORMAT), images=100)
                summary = ", ".join(f"{name} AP50 {metrics.ap50:.3f}" for name, metrics in rows.items())
                progress.write(f"step {progress.n}: {summary}")
    return ema, tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves a checkpoint that any loader of Grounding DINO can read; converts the model to half precision."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edges = {"shortest_edge": IMAGE_FORMAT.shortest_edge, "longest_edge": IMAGE_FORMAT.longest_edge}
    processor = {"image_processor_type": "GroundingDinoImageProcessor", "resample": 2, "rescale_factor": 1 / 255}
    values = {**processor, "size": edges, "image_mean": IMAGE_FORMAT.mean, "image_std": IMAGE_FORMAT.std}
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO_CHECKPOINT, help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="training steps of 8 images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the images (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    start = time.monotonic()
    model, tokenizer = train(args.steps, args.seed)
    print(f"trained in {(time.monotonic() - start) / 60:.1f} minutes")
    save(model, tokenizer, args.out)
    print_table(Detector(*load_checkpoint(str(args.out))))


if __name__ == "__main__":
    main()
