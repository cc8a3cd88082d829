"""Predictions into Label Studio: each exactly once, whoever delivers it.

- `outbox`: the chunks whose predictions are pending, and the claims on who delivers each prediction.
- `batch_import`: the import of a batch of predictions, each exactly once.
- `deliver_job`: the delivery of one project; `deliver_worker`: the threads that run these jobs, and what enqueues them.
- `failures`: the dead letters: tasks whose prediction was given up.
- `bulk`: tasks into the queue and the outbox; `preannotation`: a whole project.
- `import_job`: predicts projects that got new tasks, which `imported_projects` notes for it.

May import `registry`, `monitoring`, `queue`, `labelstudio` and what lies below; never torch. Begin with the table at
the top of `deliver_job`.
"""
