"""Grounding DINO inference: checkpoints, prompts, images, the forward pass and detections.

Begin with `detector.py`: `Detector.detect_inputs` is the whole path from images and labels to detections.

- `detector`: batches, captions, running out of memory.
- `forward_pass`: images and captions -> token logits and boxes; `cuda_graphs`: the same as two CUDA graphs.
- `phrase_scores`: token logits -> phrase scores; `postprocess`: thresholds, suppression, detections.
- `captions`: phrases -> the token ids of a caption and the span of each phrase.
- `preprocess`: an RGB image -> its resized pixels, which the forward pass normalises.
- `checkpoints`: a hub id, a folder or a `.pth` file -> model, tokenizer and image format;
  `convert_original`: original `.pth` files -> the names that transformers reads.
- `detector_cache`: the detectors of one worker, for the base checkpoint and for fine-tuned versions.
- `device`: the device and precision to run on, and which errors mean that a GPU can no longer be used.
- `acceleration`: faster replacements for modules of the model; `deformable_attention` (CPU) and
  `deformable_attention_triton` (GPU) hold the largest one.

May import `registry`, `labelstudio` and the modules beside the packages (boxes, metrics, settings, errors). Loads
torch, so nothing in `web`, `delivery`, `queue` or `registry` may import it.
"""
