# Faster R-CNN on ResNet50, CondConv (8x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 38.1 (AP50 58.9, AP75 41.5); 133.75 M parameters,
# 113.46 M of them in the backbone; 207.08G multiply-adds.
# Here: 131.71 M and 113.46 M; the paper's total has a static classifier of the backbone in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/cond8x_resnet50.json", frozen_stages=1, norm_eval=True))
