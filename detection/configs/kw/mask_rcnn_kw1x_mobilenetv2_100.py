# Mask R-CNN on MobileNetV2 (1.0x), KW (1x), 12 epochs on COCO.
# Paper (KernelWarehouse, Table 3): box AP 36.4 (AP50 58.3, AP75 39.2), mask AP 33.7.  Parameters: 24.16 M,
# 3.89 M of them in the backbone.
_base_ = "../_base_/recipe_kw.py"

# As in the released files, the cells of the frozen stage train.
model = dict(
    backbone=dict(
        config="configs/mobilenetv2_100/kw1x_mobilenetv2_100.json",
        frozen_stages=1,
        freeze_warehouses=False,
        norm_eval=True,
    )
)
