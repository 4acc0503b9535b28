# Mask R-CNN on ResNet50, KW (1x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 41.8 (AP50 64.5, AP75 45.9), mask AP 38.4.  Parameters: 46.89 M,
# 26.00 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

# As in the released files: drop path 0.1, and the cells of the frozen stage train.
model = dict(
    backbone=dict(
        config="configs/resnet50/kw1x_resnet50.json",
        frozen_stages=1,
        freeze_warehouses=False,
        norm_eval=True,
        drop_path=0.1,
    )
)
