# Mask R-CNN on ResNet50, 12 epochs on COCO.
# Paper (ODConv, Table 4): box AP 38.0 (AP50 58.6, AP75 41.5); 46.45 M parameters,
# 23.51 M of them in the backbone; 260.14G multiply-adds.
# Here: 44.40 M and 23.51 M; the paper's total has the backbone's classifier in it.
_base_ = [
    "../_base_/mask_rcnn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "../_base_/recipe_odconv.py",
]

model = dict(backbone=dict(config="configs/resnet50/traditional/resnet50.json", frozen_stages=1, norm_eval=True))
