"""Records of what happens, kept in Redis for people: the status page, `/metrics` and `/versions` show them.

- `activity`: recent events: failed tasks, sample images, tasks per minute, the progress of commands.
- `project_stats`: one summary per project: its last labeling config, labels and model version.
- `feedback`: what annotators made of predicted boxes, and the annotations that webhook events reported.

Workers, commands and the plugin write here; `web` reads. No prediction depends on these records: apart from webhook
events and project summaries, which raise, a write that Redis does not take is dropped. All keys are constants at the
top of each module, with their type, content, lifetime and size bound.

May import `queue`, `images`, `labelstudio` and what lies below. Begin with `activity`, the simplest of the three.
"""
