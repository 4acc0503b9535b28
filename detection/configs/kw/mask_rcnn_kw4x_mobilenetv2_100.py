# Mask R-CNN on MobileNetV2 (1.0x), KW (4x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 38.0 (AP50 60.0, AP75 40.8), mask AP 34.9.  Parameters: 30.37 M,
# 10.10 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

# As in the released files, the cells of the frozen stage train.
model = dict(
    backbone=dict(
        config="configs/mobilenetv2_100/kw4x_mobilenetv2_100.json",
        frozen_stages=1,
        freeze_warehouses=False,
        norm_eval=True,
    )
)
