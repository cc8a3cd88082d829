"""The bundled demo checkpoint: a small real model, and all that it was made with. Begin with `train`.

- `checkpoint/`: the model, with its model card in README.md
- `shapes`: the generator of its images, and of the phrases that name what is on them
- `train`: makes the checkpoint (`python -m backend.demo.train`)
- `measure`: computes the metrics of the model card (`python -m backend.demo.measure`)
- `samples/`: sample images and a labeling config to try the backend with (`python -m backend.demo.samples` draws them)

May import any package but `cli`. Only tests and deployment scripts import it.
"""
