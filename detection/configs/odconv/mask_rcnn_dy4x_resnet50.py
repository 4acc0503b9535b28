# Mask R-CNN on ResNet50, DY-Conv (4x), 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 39.2 (AP50 60.3, AP75 42.5); 121.77 M parameters,
# 98.83 M of them in the backbone; 260.30G multiply-adds.
# Here: 119.72 M and 98.83 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/dy4x_resnet50.json", frozen_stages=1, norm_eval=True))
