# Mask R-CNN on ResNet50, DCD, 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 38.8 (AP50 59.8, AP75 42.2); 50.73 M parameters,
# 27.79 M of them in the backbone; 260.27G multiply-adds.
# Here: 48.45 M and 27.56 M; the paper's total has the backbone's classifier in it,
# its backbone the dynamic part of that.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/dcd_resnet50.json", frozen_stages=1, norm_eval=True))
