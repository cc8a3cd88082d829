"""A plain folder of images becomes a labeled dataset.

image_files    finds the images, and gives each a key, a name and a split
labeling_run   sends them through the queue, and saves every answer, so that a run can resume
formats        writes images and boxes for YOLO, COCO and Label Studio
previews       draws the boxes on the images, and a contact sheet for each label

Begin with `LabelingRun` in `labeling_run`; `backend.cli.label` is the command that uses all of it.
May import what lies below: `detection`, `registry`, `monitoring`, `queue`, `images`, `labelstudio` and the ground
modules. Imports nothing of `prediction`, `delivery` and `training`.
"""
