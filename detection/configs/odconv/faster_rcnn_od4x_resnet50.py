# Faster R-CNN on ResNet50, ODConv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 39.2 (AP50 60.7, AP75 42.6); 108.91 M parameters,
# 88.62 M of them in the backbone; 207.42G multiply-adds.
# Here: 106.87 M and 88.62 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/od4x_resnet50.json", frozen_stages=1, norm_eval=True))
