# Faster R-CNN on ResNet50, ODConv (1x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 39.0 (AP50 60.5, AP75 42.3); 46.88 M parameters,
# 26.59 M of them in the backbone; 207.18G multiply-adds.
# Here: 44.83 M and 26.59 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/faster_rcnn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/od1x_resnet50.json", frozen_stages=1, norm_eval=True))
