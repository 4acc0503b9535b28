# Faster R-CNN on ResNet50, DCD, 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 38.1 (AP50 59.3, AP75 41.3); 48.08 M parameters,
# 27.79 M of them in the backbone; 207.20G multiply-adds.
# Here: 45.80 M and 27.56 M; the paper's total has the backbone's classifier in it,
# its backbone the dynamic part of that.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/dcd_resnet50.json", frozen_stages=1, norm_eval=True))
