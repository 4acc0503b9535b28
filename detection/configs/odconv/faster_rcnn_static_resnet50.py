# Faster R-CNN on ResNet50, 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 37.2 (AP50 57.8, AP75 40.4); 43.80 M parameters,
# 23.51 M of them in the backbone; 207.07G multiply-adds.
# Here: 41.75 M and 23.51 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/resnet50.json", frozen_stages=1, norm_eval=True))
