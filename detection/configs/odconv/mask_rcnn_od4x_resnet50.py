# Mask R-CNN on ResNet50, ODConv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 40.1 (AP50 61.5, AP75 43.6); 111.56 M parameters,
# 88.62 M of them in the backbone; 260.49G multiply-adds.
# Here: 109.51 M and 88.62 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/od4x_resnet50.json", frozen_stages=1, norm_eval=True))
