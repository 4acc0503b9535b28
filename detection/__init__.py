"""Object detection and instance segmentation with mmdetection, on the models of this project.

Importing `detection.backbones`, `detection.optimizers` and `detection.hooks` registers their classes with mmdetection;
the configs do so by `custom_imports`.
"""
