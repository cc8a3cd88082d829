"""Redis and RQ: the queues, what travels through them, and what keeps them going when something dies.

- `redis`: connections, errors, values that expire; `private_redis`: a server of our own, where none is configured.
- `messages`: chunks, answers and training requests, each with the number of its format.
- `predict_queue`, `training_queue`: the queues as the web front and the commands use them.
- `backlogs`: bulk work of each project, in turn; `pauses`: a circuit breaker for each project.
- `delivery_schedule`: when which predictions are to be delivered.
- `jobs`: RQ jobs that can run nothing but their worker's own functions, and RQ's registries with times of seconds.
- `worker`: RQ's worker, steadier; `worker_loop`: its process; `live_workers`: who is ready; `worker_metrics`.
- `recovery`: the task that killed a worker; `watchdog`: ends a worker whose work hangs.

May import `labelstudio`, `metrics`, `logs`, `settings`, `errors`; never torch. Begin with `predict_queue`, then
`messages`. All Redis keys are listed in docs/design.md.
"""
