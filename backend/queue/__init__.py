"""Redis and RQ: the queues, what travels through them, and what keeps them going when something dies.

- `redis`: connections, errors, values that expire; `private_redis`: a server of our own, where none is configured.
- `messages`: chunks, answers and training requests, each with the number of its format.
- `predict_queue`, `training_queue`: the two queues as the web front and the commands use them.
- `jobs`: RQ jobs that can run nothing but their worker's own functions.
- `worker_loop`: the loop of every worker; `live_workers`: their heartbeats; `worker_metrics`: their metrics.
- `recovery`: jobs of dead workers back into the queue; `watchdog`: ends a worker whose work hangs.

May import `labelstudio`, `metrics`, `logs`, `settings`, `errors`; never torch. Begin with `predict_queue`, then
`messages`. All Redis keys are listed in docs/design.md.
"""
