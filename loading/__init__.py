"""The parts of `datasets.py`: images and data sets, transforms, and the order in which images are loaded."""
