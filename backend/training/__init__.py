"""Training: from the annotations of a project to a version that serves it. Begin with `training_job`, then `pipeline`.

- `training_worker`, `training_job`: the worker of the queue "fit", and the job that it runs
- `pipeline`: fine-tunes, calibrates, and keeps what passes the gate
- `dataset`, `image_cache`: annotated tasks -> examples; their images on disk, preprocessed
- `fine_tuning`, `loop`: which weights are trained, early stopping, resuming; one epoch
- `batches`, `loss`: captions with their targets; the loss of Grounding DINO
- `rehearsal`: pseudo-labels, against forgetting
- `evaluation`, `evaluator`: metrics; running detectors on examples
- `calibration`, `gate`: score thresholds; whether a candidate is better

May import `detection`, `registry`, `monitoring`, `queue`, `images`, `labelstudio` and what is below them; never the
packages beside it (`prediction`, `delivery`, `datasets`). `training_worker` loads torch only when there is a training.
"""
