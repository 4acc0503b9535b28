# Mask R-CNN on ResNet50, KW (4x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 42.4 (AP50 65.4, AP75 46.3), mask AP 38.9.  Parameters: 120.85 M,
# 99.97 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

# As in the released files: drop path 0.1, and the cells of the frozen stage train.
model = dict(
    backbone=dict(
        config="configs/resnet50/kw4x_resnet50.json",
        frozen_stages=1,
        freeze_warehouses=False,
        norm_eval=True,
        drop_path=0.1,
    )
)
