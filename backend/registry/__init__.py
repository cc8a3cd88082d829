"""Which model serves a project: the checkpoint that MODEL names, and the versions that were trained for a project.

- `checkpoint`: finds MODEL, fingerprints its files, and makes the `model_version` that Label Studio sees.
- `versions`: what was trained for a project, on disk below MODEL_DIR: add, promote, roll back.
- `project_model`: one project's plan and version, and its tasks in chunks for the workers.

May import `monitoring`, `queue`, `labelstudio` and what lies below; never torch: the web front uses it.
Begin with `project_model`.
"""
