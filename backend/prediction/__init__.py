"""The predict worker and its job: a chunk of tasks in, one answer for each task out.

- `predict_worker`: the process: loads the model, keeps the worker alive, runs RQ's loop.
- `predict_job`: the job: targets, images, detection, answers; the second attempt of a lost chunk.
- `image_loading`: the images of a chunk, loaded in threads.
- `circuit_breaker`: pauses bulk work whose images cannot be fetched now.
- `job_report`: the log line, the metrics and the status-page data of a finished chunk.

May import `detection`, `registry`, `monitoring`, `queue`, `images`, `labelstudio` and what lies below.
Begin with `predict_job`.
"""
