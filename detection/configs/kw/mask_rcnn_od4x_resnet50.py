# Mask R-CNN on ResNet50, ODConv (4x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 42.1 (AP50 65.1, AP75 46.1), mask AP 38.6.  Parameters: 109.51 M,
# 88.62 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

model = dict(backbone=dict(config="configs/resnet50/od4x_resnet50.json", frozen_stages=1, norm_eval=True))
