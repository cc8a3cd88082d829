"""Everything that follows Label Studio's formats: its REST API, labeling configs, tasks and regions.

Begin with `labeling_config.py`: a `Plan` is what everything else works with.

- `labeling_config`: the XML of a labeling config -> a `Plan`: controls, their labels, phrases and thresholds.
- `targets`: a `Plan` and one task -> the images to run the detector on, and the names that their regions get.
- `regions`: detections -> regions and predictions in Label Studio's result format, and back.
- `client`: the REST API: API keys, tasks, predictions.

May import `boxes`, `settings` and `errors`. Only `client` does I/O; the other modules are pure.
"""
