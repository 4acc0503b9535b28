# Mask R-CNN on ResNet50, ODConv (1x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 39.9 (AP50 61.2, AP75 43.5); 49.53 M parameters,
# 26.59 M of them in the backbone; 260.25G multiply-adds.
# Here: 47.47 M and 26.59 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/od1x_resnet50.json", frozen_stages=1, norm_eval=True))
