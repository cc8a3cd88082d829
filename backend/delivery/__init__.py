"""Predictions into Label Studio: each exactly once, whoever delivers it.

- `outbox`: the chunks whose predictions are pending, and the claims on who delivers each prediction.
- `pusher`: imports finished predictions; enqueues again what failed or expired.
- `preannotation`: a whole project, chunk by chunk, through the queue and the pusher.
- `import_watcher`: pre-annotates projects that got new tasks, which `imported_projects` notes for it.

May import `registry`, `monitoring`, `queue`, `labelstudio` and what lies below; never torch. Begin with the table at
the top of `pusher`.
"""
