# Faster R-CNN on ResNet50, DY-Conv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 38.3 (AP50 59.7, AP75 41.6); 119.12 M parameters,
# 98.83 M of them in the backbone; 207.23G multiply-adds.
# Here: 117.07 M and 98.83 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/dy4x_resnet50.json", frozen_stages=1, norm_eval=True))
