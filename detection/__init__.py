"""Object detection and instance segmentation with mmdetection, on the models of this project.

Importing `detection.backbones`, `detection.optimizers`, `detection.hooks` and `detection.datasets` registers them with
mmdetection; the configs do it by `custom_imports`.
"""
