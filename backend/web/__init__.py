"""The web front: a Flask application that Label Studio, browsers and Prometheus call.

- `app`: Label Studio's routes (`/setup`, `/predict`, `/webhook`, ...), the probes, and the error handlers.
- `predict_response`: the response to `/predict`, which may take minutes.
- `auth`: the secret URL prefix and basic auth; `request_body`: the JSON body of a request, checked.
- `request_log`: each request's id, its line in the log, and its metrics.
- `pages`: the HTML pages, their static files and the samples; `static/`: the pages themselves.
- `status`: `/status`, the status page's data; `playground`: the playground's data; `metrics_endpoint`: `/metrics`.

The plugin (`model.py`) answers Label Studio's routes; `app` gets it as an argument, so nothing here imports it.
May import every package below; never torch: the model runs in the workers. Begin with `app`.
"""
