# Mask R-CNN on ResNet50, CondConv (8x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 38.8 (AP50 59.3, AP75 42.3); 136.4 M parameters,
# 113.46 M of them in the backbone; 260.15G multiply-adds.
# Here: 134.35 M and 113.46 M; the paper's total has a static classifier of the backbone in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/cond8x_resnet50.json", frozen_stages=1, norm_eval=True))
